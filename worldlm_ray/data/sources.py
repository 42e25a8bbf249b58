"""Which files the entries of `data.files` stand for, and what is left out of folders and globs.

A folder stands for the glob FOLDER/**/*. Links to files and folders are followed, each folder once, so loops end.
Names that begin with a dot are hidden: a folder or a glob leaves them out, unless that part of the glob begins with a
dot. A match that is not read (another suffix, hidden, empty, a .json file without records) is counted. A file that an
entry names itself must be readable.

A path that exists is never a pattern, even if its name has brackets or stars. The same holds for the first folders of a
glob.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path

from worldlm_ray.data import chat_records
from worldlm_ray.data.readers import COMPRESSED, EXPECTED, format_of, is_blank, is_record, json_values
from worldlm_ray.errors import ConfigError, DataError
from worldlm_ray.storage.filesystem import expanded

REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
KINDS_NAMED = 5
"""Kinds that a line about left-out files names at most."""


@dataclass(frozen=True)
class Found:
    """The files of some entries."""

    paths: list[Path]
    """In reading order, each file once."""
    left_out: list[str]
    """A line for each entry with left-out files: `3 files of 'texts' left out: 2 .md, 1 empty`."""


def find(entries: list[str], *, text_key: str | None, key: str) -> Found:
    """Find the files behind the entries of `data.files`.

    Args:
        entries: files, folders and globs.
        text_key: field that holds the text. A .json file without it holds no records. None: conversations are read.
        key: dotted key of the list, for messages.

    Raises:
        ConfigError: an entry stands for no file that can be read.
    """
    # A file that is listed twice would be in both the training and the held-out part: each counts once.
    found: dict[Path, Path] = {}
    lines: list[str] = []
    for index, entry in enumerate(entries):
        paths, left_out = _expand(entry, text_key=text_key, key=f"{key}[{index}]")
        for path in paths:
            found.setdefault(path.resolve(), path)
        if left_out:
            number = left_out.total()
            noun = "file" if number == 1 else "files"
            lines.append(f"{number:,} {noun} of {entry!r} left out: {counted(left_out)}")
    return Found(list(found.values()), lines)


def counted(left_out: Counter[str]) -> str:
    """`2 .md, 1 empty`."""
    most = left_out.most_common(KINDS_NAMED)
    more = left_out.total() - sum(number for _, number in most)
    return ", ".join([f"{number:,} {kind}" for kind, number in most] + ([f"{more:,} others"] if more else []))


def _expand(entry: str, *, text_key: str | None, key: str) -> tuple[list[Path], Counter[str]]:
    """The files of one entry, sorted, and how many are left out, by kind."""
    if REMOTE.match(entry):
        cure = "copy it to a folder of this machine first, and give that path"
        raise ConfigError(key, f"{entry!r} is not on a file system, and only files are read", cure)
    path = expanded(entry)
    left_out = Counter[str]()
    if path.is_dir():
        matches = sorted(_below(path, ["**", "*"], left_out, key=key))
        paths = _readable(matches, left_out, text_key=text_key, key=key)
        if not paths:
            problem = f"the folder {entry!r} holds no {'conversations' if text_key is None else 'text files'}"
            raise ConfigError(key, problem + (f" ({counted(left_out)})" if left_out else ""), _expected(text_key))
        return paths, left_out
    if path.exists():
        return [_named(path, entry, text_key=text_key, key=key)], left_out
    if not glob.has_magic(entry):
        raise ConfigError(key, f"there is no file {entry!r}", f"check the path (from {os.getcwd()})")
    folder, parts = _literal(path)
    matches = sorted(_below(folder, parts, left_out, key=key), key=str)
    paths = _readable(matches, left_out, text_key=text_key, key=key)
    if not paths:
        problem = f"matches no file of a supported suffix ({counted(left_out)})" if left_out else "matches no file"
        raise ConfigError(key, f"{entry!r} {problem}", f"check the pattern; {_expected(text_key)}")
    return paths, left_out


def _named(path: Path, entry: str, *, text_key: str | None, key: str) -> Path:
    if not _is_supported(path, text_key):
        raise ConfigError(key, f"{entry!r} has an unsupported suffix", _expected(text_key))
    if not path.is_file():
        raise ConfigError(key, f"{str(path)!r} is no regular file", "copy its text to one, and give that")
    if path.stat().st_size == 0:
        raise ConfigError(key, f"{str(path)!r} is empty", "remove it or give a file with text")
    _require_access(path, key=key)
    return path


def _is_supported(path: Path, text_key: str | None) -> bool:
    return format_of(path) is not None and (text_key is not None or format_of(path) != ".txt")


def _expected(text_key: str | None) -> str:
    return EXPECTED if text_key is not None else chat_records.EXPECTED


def _require_access(path: Path, *, key: str) -> None:
    if not os.access(path, os.R_OK):
        raise ConfigError(key, f"{str(path)!r} is not readable", "mend its permissions")


def _readable(matches: list[Path], left_out: Counter[str], *, text_key: str | None, key: str) -> list[Path]:
    """The matches that are read. The others are counted in `left_out`."""
    paths = []
    for path in matches:
        if not _is_supported(path, text_key):
            left_out[_kind(path)] += 1
            continue
        _require_access(path, key=key)
        if is_blank(path):
            left_out["empty"] += 1
        elif format_of(path) == ".json" and not _has_records(path, text_key):
            left_out[f".json without {text_key or chat_records.MESSAGES!r}"] += 1
        else:
            paths.append(path)
    return paths


def _kind(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if not suffixes:
        return "without a suffix"
    return "".join(suffixes[-2:] if suffixes[-1] in COMPRESSED else suffixes[-1:])


def _has_records(path: Path, text_key: str | None) -> bool:
    """Whether a .json file of a folder holds text, or conversations. Some .json files describe a data set instead.

    A file with one object without text, or with no object, holds none. Several objects without text mean that the key
    is wrong: the reader raises an error.
    """
    state = path.stat()
    return _has_records_as_of(path, text_key, state.st_mtime_ns, state.st_size, state.st_ino)


@lru_cache(1024)
def _has_records_as_of(path: Path, text_key: str | None, *_: int) -> bool:
    try:
        with closing(json_values(path)) as values:
            first = [value for _, value in islice(values, 2)]
    except DataError:
        return True  # the reader says what is wrong
    holds = chat_records.is_record if text_key is None else partial(is_record, text_key=text_key)
    return bool(first) and (holds(first[0]) or len([v for v in first if isinstance(v, dict)]) > 1)


# ---- globs -------------------------------------------------------------------------------------------------------


def _literal(pattern: Path) -> tuple[Path, list[str]]:
    """The first folders of a pattern that exist under exactly these names, and the remaining parts."""
    parts = list(pattern.parts)
    folder = Path(parts.pop(0)) if pattern.is_absolute() else Path()
    while len(parts) > 1 and (folder / parts[0]).is_dir():
        folder /= parts.pop(0)
    return folder, parts + ["*"] * (parts[-1] == "**")


def _below(folder: Path, parts: list[str], left_out: Counter[str], *, key: str) -> Iterator[Path]:
    """Files below a folder whose path matches the parts of a pattern. A match that is no file is counted.

    Each pair of a folder and a part is visited once, by any name of the folder. So loops of links end, and the time
    grows with the number of folders. Names without links go first.
    """
    seen: set[tuple[str, int]] = set()
    now, later = deque([(folder, 0)]), deque[tuple[Path, int]]()
    while now or later:
        place, index = (now or later).popleft()
        if (mark := (os.path.realpath(place), index)) in seen:
            continue
        seen.add(mark)
        part, is_last = parts[index], index == len(parts) - 1
        if part == "**":
            now.append((place, index + 1))
        for path in _matching(place, part, left_out, key=key):
            if os.path.isdir(path):
                if not is_last:
                    queue = later if path.is_symlink() else now
                    queue.append((path, index if part == "**" else index + 1))
                elif "**" not in parts:
                    left_out["folder"] += 1
            elif is_last and os.path.isfile(path):
                yield path
            elif is_last:
                left_out["broken link" if path.is_symlink() else "special file"] += 1


def _matching(folder: Path, part: str, left_out: Counter[str], *, key: str) -> Iterator[Path]:
    """The entries of a folder that a part of a pattern matches. `**` matches folders only."""
    if part != "**" and not glob.has_magic(part):
        path = folder / part
        if os.path.exists(path):
            yield path
        return
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise ConfigError(key, f"cannot list {str(folder)!r} ({error.strerror})", "mend its permissions") from error
    for name in names:
        path = folder / name
        if part == "**" and not os.path.isdir(path):
            continue
        if part != "**" and not fnmatch.fnmatchcase(name, part):
            continue
        if name.startswith(".") and not part.startswith("."):
            # Once: a folder where the pattern goes on, a file where it ends.
            left_out["hidden"] += (part == "**") or not os.path.isdir(path)
            continue
        yield path
