"""Reading documents from files and built-in corpora.

| suffix              | a document is                                                |
|---------------------|--------------------------------------------------------------|
| .txt                | a run of lines between blank lines                           |
| .jsonl, .gz, .zst   | the string under `data.text_key` of one line                 |
| .parquet            | one row of the column `data.text_key`                        |

`check_sources` is cheap and raises `ConfigError` before anything starts; reading raises `DataError` with the
file and the line.
"""

from __future__ import annotations

import difflib
import glob
import gzip
import importlib
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, cast

from worldlm_ray.config import DataConfig, merge_into, positive
from worldlm_ray.data.corpora import CORPORA
from worldlm_ray.errors import ConfigError, DataError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
_EXPECTED = "expected " + ", ".join(SUFFIXES)


def check_sources(config: DataConfig, key: str) -> list[Path]:
    """Find the files behind a data section, without reading their text.

    Args:
        config: the data section.
        key: its dotted key, such as `world.children[0].data`, for messages.

    Returns:
        The files in reading order, each once; empty for a built-in corpus.

    Raises:
        ConfigError: there is no usable source of text, or no usable tokenizer.
    """
    if config.max_bytes is not None:
        positive(config.max_bytes, f"{key}.max_bytes")
    _check_tokenizer(config.tokenizer, f"{key}.tokenizer")
    if not 0.0 < config.train_fraction <= 1.0:
        got = f"got {config.train_fraction}"
        raise ConfigError(f"{key}.train_fraction", got, "give a number above 0, at most 1")
    if config.shard is not None:
        try:
            shard_of(config.shard)
        except ValueError as error:
            raise ConfigError(f"{key}.shard", f"got {config.shard!r}", "write 2/4 for the second of four") from error
    if config.pool:
        if config.files or config.corpus is not None:
            raise ConfigError(f"{key}.pool", "set together with files or a corpus", "keep only one of them")
        found_in = [check_sources(m, f"{key}.pool[{index}]") for index, m in enumerate(members_of(config, key))]
        return [path for paths in found_in for path in paths]
    if config.corpus is not None:
        if config.files:
            raise ConfigError(f"{key}.corpus", "set together with files", "keep only one of corpus and files")
        _check_corpus(config.corpus, f"{key}.corpus")
        return []
    if not config.files:
        raise ConfigError(
            f"{key}.files",
            "neither files nor a corpus given",
            "set files: [PATH, ...] or corpus: " + _names(),
        )
    # A file that is listed twice would land in both the training and the held-out part: each counts once.
    found: dict[Path, Path] = {}
    for index, entry in enumerate(config.files):
        for path in _expand(entry, f"{key}.files[{index}]"):
            found.setdefault(path.resolve(), path)
    return list(found.values())


def members_of(config: DataConfig, key: str) -> list[DataConfig]:
    """The data sections of a pool; what they leave out is the pool's own.

    Raises:
        ConfigError: one of them is not a data section.
    """
    own = replace(config, pool=[], files=[], corpus=None, order=None)
    found = [merge_into(own, member, prefix=f"{key}.pool[{index}]") for index, member in enumerate(config.pool)]
    for index, member in enumerate(found):
        if member.tokenizer != config.tokenizer:
            got = f"{member.tokenizer!r} differs from the pool's {config.tokenizer!r}"
            raise ConfigError(f"{key}.pool[{index}].tokenizer", got, "one world has one vocabulary")
    return found


def shard_of(text: str) -> tuple[int, int]:
    """`2/4` as (2, 4).

    Raises:
        ValueError: it is nothing of the kind.
    """
    shard, _, shards = text.partition("/")
    if not 1 <= int(shard) <= int(shards):
        raise ValueError(text)
    return int(shard), int(shards)


def read_documents(config: DataConfig, key: str) -> Iterator[str]:
    """Read the documents of a data section, at most `max_bytes` of UTF-8 text, in a fixed order.

    Args:
        config: the data section.
        key: its dotted key, for messages.

    Raises:
        ConfigError: as `check_sources`, at once.
        DataError: while iterating: a damaged file, by name and line.
    """
    paths = check_sources(config, key)
    if config.corpus is not None:
        documents = CORPORA[config.corpus].documents()
    else:
        documents = _from_files(paths, text_key=config.text_key, key=key)
    return documents if config.max_bytes is None else _first_bytes(documents, config.max_bytes)


def describe(config: DataConfig) -> str:
    """The source in a few words, such as `corpus python_stdlib` or `a.txt and 2 more`."""
    if config.pool:
        return f"a pool of {len(config.pool)}"
    if config.corpus is not None:
        return f"corpus {config.corpus}"
    if not config.files:
        return "no text"
    more = len(config.files) - 1
    return config.files[0] + (f" and {more} more" if more else "")


def _names() -> str:
    return "|".join(sorted(CORPORA))


def _check_corpus(name: str, key: str) -> None:
    if name in CORPORA:
        return
    close = difflib.get_close_matches(name, CORPORA, n=1)
    cure = f"did you mean {close[0]!r}?" if close else f"expected one of {_names()}"
    raise ConfigError(key, f"there is no corpus {name!r}", cure)


def _check_tokenizer(spec: str, key: str) -> None:
    if spec == "bytes":
        return
    path = Path(spec).expanduser()
    cure = "give `bytes` or the path of a Hugging Face tokenizer.json"
    try:
        state = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(key, f"cannot read {spec!r} ({error.strerror})", cure) from error
    except ValueError as error:
        raise ConfigError(key, f"{spec!r} is not JSON", cure) from error
    if not isinstance(state, dict) or "model" not in state:
        raise ConfigError(key, f"{spec!r} holds no tokenizer (it has no `model`)", cure)


def _expand(entry: str, key: str) -> list[Path]:
    """Files behind one entry of `files`, sorted where the entry stands for several."""
    path = Path(entry).expanduser()
    if path.is_dir():
        paths = sorted(p for p in path.rglob("*") if _supported(p) and p.is_file())
        if not paths:
            raise ConfigError(key, f"the folder {entry!r} holds no text files", _EXPECTED)
    elif path.exists():  # before globs, so that a file named a[1].txt can be given as it is
        if not _supported(path):
            raise ConfigError(key, f"{entry!r} has an unsupported suffix", _EXPECTED)
        paths = [path]
    elif glob.has_magic(entry):
        matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        paths = [p for p in matches if _supported(p) and p.is_file()]
        if not paths:
            problem = "matches no file" if not matches else "matches no file of a supported suffix"
            raise ConfigError(key, f"{entry!r} {problem}", f"check the pattern; {_EXPECTED}")
    else:
        raise ConfigError(key, f"there is no file {entry!r}", f"check the path (from {os.getcwd()})")
    for found in paths:
        if found.stat().st_size == 0:
            raise ConfigError(key, f"{str(found)!r} is empty", "remove it or give a file with text")
        if not os.access(found, os.R_OK):
            raise ConfigError(key, f"{str(found)!r} is not readable", "mend its permissions")
    return paths


def _supported(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)


def _first_bytes(documents: Iterable[str], max_bytes: int) -> Iterator[str]:
    left = max_bytes
    for document in documents:
        raw = document.encode()
        if len(raw) >= left:
            # A character that straddles the limit is dropped as a whole.
            cut = raw[:left].decode("utf-8", errors="ignore")
            if cut:
                yield cut
            return
        left -= len(raw)
        yield document


def _from_files(paths: list[Path], *, text_key: str, key: str) -> Iterator[str]:
    for path in paths:
        name = path.name.lower()
        if name.endswith(".txt"):
            yield from _read_txt(path)
        elif name.endswith(".parquet"):
            yield from _read_parquet(path, text_key=text_key, key=key)
        else:
            yield from _read_jsonl(path, text_key=text_key, key=key)


@contextmanager
def _open(path: Path) -> Iterator[Iterator[tuple[int, str]]]:
    """Numbered lines of a text file that may be compressed. Every failure names the file."""
    number = 0

    def lines(handle: BinaryIO) -> Iterator[tuple[int, str]]:
        nonlocal number
        for number, raw in enumerate(handle, 1):
            # utf-8-sig drops the mark that some editors write at the start of a file.
            yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")

    with _damage(path):
        try:
            with _decompressed(path) as handle:
                yield lines(handle)
        except UnicodeDecodeError as error:
            problem = f"is not valid UTF-8 (byte {error.start} of the line)"
            raise DataError(f"{path}:{number}: {problem}; convert the file to UTF-8") from error


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (
        OSError,
        EOFError,
        zlib.error,
    ) as error:  # a truncated gzip raises EOFError, a damaged one the others
        detail = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: cannot be read ({detail}); restore or remove the file") from error


@contextmanager
def _decompressed(path: Path) -> Iterator[BinaryIO]:
    name = path.name.lower()
    if name.endswith(".gz"):
        with gzip.open(path) as handle:
            yield cast(BinaryIO, handle)
    elif name.endswith(".zst"):
        try:
            zstandard = importlib.import_module("zstandard")
        except ImportError as error:
            raise DataError(f"{path}: reading .zst needs zstandard; pip install zstandard") from error
        try:
            with path.open("rb") as raw, io.BufferedReader(_ZstReader(raw, zstandard)) as handle:
                yield cast(BinaryIO, handle)
        except zstandard.ZstdError as error:
            raise DataError(f"{path}: cannot be read ({error}); restore or remove the file") from error
    else:
        with path.open("rb") as handle:
            yield handle


class _ZstReader(io.RawIOBase):
    """Decompresses all frames of a file. zstandard's own takes a file that was cut off for a whole one."""

    def __init__(self, raw: BinaryIO, zstandard: Any) -> None:
        self._raw = raw
        self._context = zstandard.ZstdDecompressor()
        self._frame: Any = None
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            compressed = self._raw.read(1 << 17)
            if not compressed:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError("it ends in the middle of a frame")
                return 0
            while compressed:
                if self._frame is None or self._frame.eof:
                    self._frame = self._context.decompressobj()
                self._ready += self._frame.decompress(compressed)
                compressed = self._frame.unused_data if self._frame.eof else b""
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def _read_txt(path: Path) -> Iterator[str]:
    lines: list[str] = []
    with _open(path) as numbered:
        for _, line in numbered:
            if line.strip():
                lines.append(line.rstrip("\r\n"))
            elif lines:
                yield "\n".join(lines)
                lines = []
        if lines:
            yield "\n".join(lines)


def _read_jsonl(path: Path, *, text_key: str, key: str) -> Iterator[str]:
    with _open(path) as numbered:
        for number, line in numbered:
            if line.strip():
                text = _field(line, text_key, where=f"{path}:{number}", key=key)
                if text.strip():
                    yield text


def _field(line: str, text_key: str, *, where: str, key: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: is not valid JSON ({error}); mend or remove the line") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: is a {type(record).__name__}, not an object; write one object per line")
    if text_key not in record:
        known = ", ".join(record) or "none"
        raise DataError(f"{where}: has no key {text_key!r} (keys: {known}); set {key}.text_key")
    text = record[text_key]
    if not isinstance(text, str):
        got = type(text).__name__
        raise DataError(f"{where}: {text_key!r} is a {got}, not a string; set {key}.text_key")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON may hold half of a surrogate pair, which no UTF-8 text can
        problem = f"{text_key!r} holds half of a surrogate pair"
        raise DataError(f"{where}: {problem}; mend or remove the line") from error
    return text


def _read_parquet(path: Path, *, text_key: str, key: str) -> Iterator[str]:
    # pyarrow takes a good part of a second to import: only those who read parquet pay for it.
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with _damage(path), pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if text_key not in columns:
                problem = f"has no column {text_key!r} (columns: {', '.join(columns)})"
                raise DataError(f"{path}: {problem}; set {key}.text_key")
            for batch in file.iter_batches(batch_size=1024, columns=[text_key]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if text is not None and not isinstance(text, str):
                        problem = f"{text_key!r} is a {type(text).__name__}, not a string"
                        raise DataError(f"{path}: row {row}: {problem}; set {key}.text_key")
                    if text and text.strip():
                        yield text
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: row {row + 1}: is not valid UTF-8; write the column as UTF-8") from error
    except pyarrow.ArrowException as error:
        detail = str(error).splitlines()[0]
        raise DataError(f"{path}: cannot be read ({detail}); restore or remove the file") from error
