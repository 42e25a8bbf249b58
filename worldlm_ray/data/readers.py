"""Reading the documents of one file.

| suffix              | a document is                                                                     |
|---------------------|-----------------------------------------------------------------------------------|
| .txt                | a run of lines between blank lines                                                |
| .jsonl, .ndjson     | the string under `data.text_key` of one line                                      |
| .json               | that string of one object, in an array or in a sequence of objects                |
| .parquet            | one row of the column `data.text_key`                                             |

All but .parquet may be compressed: .gz, .zst, .bz2, .xz. Upper and lower case are alike. A `text_key` such as
`meta.text` names a field of a field, unless a field has that exact name.

Every failure is a `DataError` that names the file and the line, record or row.
"""

from __future__ import annotations

import difflib
import io
import json
import re
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from worldlm_ray.data.opening import damage_named, decompressed, numbered_lines
from worldlm_ray.errors import DataError

FORMATS = (".txt", ".jsonl", ".ndjson", ".json")
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
EXPECTED = f"expected {', '.join(FORMATS)} (also with {', '.join(COMPRESSED)}) or .parquet"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""The beginning of a file whose content git-lfs has not fetched."""
SMALL_BYTES = 1024
CHUNK_CHARS = 1 << 16
KEYS_NAMED = 20
"""Keys of a record that a message names at most."""

_MISSING = object()


def format_of(path: Path) -> str | None:
    """The suffix of a file that can be read, without its compression; None for any other file."""
    name = path.name.lower()
    for suffix in (*FORMATS, ".parquet"):
        endings = (suffix,) if suffix == ".parquet" else (suffix, *(suffix + packed for packed in COMPRESSED))
        if name.endswith(endings):
            return suffix
    return None


def read(path: Path, *, text_key: str, key: str) -> Iterator[str]:
    """The documents of a file, without blank ones.

    Args:
        path: the file; `format_of` knows it.
        text_key: field or column that holds the text.
        key: dotted key of the data section, for messages.

    Raises:
        DataError: the file is damaged or holds no such field.
    """
    refuse_pointer(path)
    match format_of(path):
        case ".txt":
            yield from _read_txt(path)
        case ".json":
            for number, record in json_values(path):
                where = f"{path}: record {number}"
                yield from _unless_blank(text_of(record, text_key, where=where, key=key))
        case ".parquet":
            yield from _read_parquet(path, text_key=text_key, key=key)
        case _:
            for number, record in json_lines(path):
                yield from _unless_blank(text_of(record, text_key, where=f"{path}:{number}", key=key))


def holds_text(path: Path, *, text_key: str, key: str) -> bool:
    """Whether the beginning of a file has text.

    A .txt file is read up to its first characters, other files up to their first record with text. Of a .parquet file
    only the header is read.

    Raises:
        DataError: the beginning is damaged, or the first record has no text under this key.
    """
    try:
        state = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); restore or remove the file") from error
    return _holds_text_as_of(path, text_key, key, state.st_mtime_ns, state.st_size, state.st_ino)


@lru_cache(1024)
def _holds_text_as_of(path: Path, text_key: str, key: str, *_: int) -> bool:
    refuse_pointer(path)
    match format_of(path):
        case ".txt":
            return _has_characters(path)  # not by documents: a file of one line would be read as a whole
        case ".parquet":
            return _parquet_rows(path, text_key=text_key, key=key) > 0
        case _:
            return next(read(path, text_key=text_key, key=key), None) is not None


def is_blank(path: Path) -> bool:
    """Whether a small file, perhaps compressed, is white space only. A large file is not read: False."""
    if path.stat().st_size > SMALL_BYTES or format_of(path) == ".parquet":
        return False
    try:
        return not _has_characters(path)
    except DataError:
        return False  # the reader says what is wrong


def is_record(value: Any, text_key: str) -> bool:
    """Whether a value of a .json file has text under this key."""
    return isinstance(value, dict) and isinstance(_lookup(value, text_key), str)


def _has_characters(path: Path) -> bool:
    with damage_named(path), decompressed(path) as handle:
        return any(chunk.strip(b"\xef\xbb\xbf \t\r\n") for chunk in iter(lambda: handle.read(1 << 16), b""))


def _unless_blank(text: str) -> Iterator[str]:
    if text.strip():
        yield text


def refuse_pointer(path: Path) -> None:
    """Refuse a pointer of git-lfs.

    Raises:
        DataError: the file is one.
    """
    with damage_named(path), path.open("rb") as handle:
        if handle.read(len(LFS_POINTER)) == LFS_POINTER:
            raise DataError(f"{path}: is a pointer of git-lfs, not the text itself; run `git lfs pull` in its folder")


# ---- formats -----------------------------------------------------------------------------------------------------


class Continued(str):
    """A run of lines that continues the text before it: in a .txt file, all runs but the first.

    A tokenizer puts its end-of-text token between two texts, and a blank line between the runs of one text.
    """

    __slots__ = ()


def _read_txt(path: Path) -> Iterator[str]:
    kind: type[str] = str
    lines: list[str] = []
    with numbered_lines(path) as numbered:
        for _, line in numbered:
            if line.strip():
                lines.append(line.rstrip("\r\n"))
            elif lines:
                yield kind("\n".join(lines))
                kind, lines = Continued, []
        if lines:
            yield kind("\n".join(lines))


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The values of the lines of a .jsonl file, numbered from 1, without blank lines.

    Raises:
        DataError: a line is not JSON.
    """
    with numbered_lines(path) as numbered:
        for number, line in numbered:
            if line.strip():
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    problem = f"is not valid JSON ({error})"
                    raise DataError(f"{path}:{number}: {problem}; mend or remove the line") from error
                yield number, record


def json_values(path: Path) -> Generator[tuple[int, Any]]:
    """The values of a .json file, numbered from 1: the elements of its array, or the values in sequence.

    Raises:
        DataError: it is not JSON.
    """
    with damage_named(path):
        try:
            with decompressed(path) as handle, io.TextIOWrapper(handle, encoding="utf-8-sig") as text:
                yield from enumerate(_values(path, text), 1)
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: is not valid UTF-8; convert the file to UTF-8") from error


def _values(path: Path, text: io.TextIOWrapper) -> Iterator[Any]:
    decoder, gap = json.JSONDecoder(), re.compile(r"[ \t\r\n]*")
    buffer, at, count, in_array, closed = "", 0, 0, False, False
    while True:
        match = gap.match(buffer, at)
        at = match.end() if match else at
        if at == len(buffer):
            buffer, at = text.read(CHUNK_CHARS), 0
            if not buffer:
                break
            continue
        if buffer[at] == "[" and not count and not in_array:
            gap, in_array, at = re.compile(r"[ \t\r\n,]*"), True, at + 1
            continue
        if buffer[at] == "]" and in_array and not closed:
            closed, at = True, at + 1
            continue
        if closed:
            raise DataError(f"{path}: holds more than its array; mend or remove the file")
        try:
            value, at = decoder.raw_decode(buffer, at)
        except (ValueError, RecursionError) as error:
            more = text.read(max(CHUNK_CHARS, len(buffer) - at))  # the value may go on: read twice as much
            if not more:
                problem = f"record {count + 1}: is not valid JSON ({error})"
                raise DataError(f"{path}: {problem}; mend or remove the file") from error
            buffer, at = buffer[at:] + more, 0
            continue
        count += 1
        yield value
    if in_array and not closed:
        raise DataError(f"{path}: ends in the middle of its array; restore or remove the file")


def text_of(record: Any, text_key: str, *, where: str, key: str) -> str:
    """The text of a JSON record.

    Raises:
        DataError: it has none.
    """
    if not isinstance(record, dict):
        raise DataError(f"{where}: is a {type(record).__name__}, not an object; write one object per line")
    text = _lookup(record, text_key)
    if text is _MISSING:
        raise DataError(_no_key(where, "key", text_key, list(record), list(_names_of_texts(record)), key=key))
    if not isinstance(text, str):
        got = type(text).__name__
        raise DataError(f"{where}: {text_key!r} is a {got}, not a string; set {key}.text_key")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON may hold half of a surrogate pair, which no UTF-8 text can
        problem = f"{text_key!r} holds half of a surrogate pair"
        raise DataError(f"{where}: {problem}; mend or remove the line") from error
    return text


def _lookup(record: Mapping[str, Any], text_key: str) -> Any:
    if text_key in record:
        return record[text_key]
    value: Any = record
    for part in text_key.split("."):
        if not isinstance(value, dict) or part not in value:
            return _MISSING
        value = value[part]
    return value


def _names_of_texts(record: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in record.items():
        if isinstance(value, str):
            yield prefix + name
        elif isinstance(value, dict) and prefix.count(".") < 3:
            yield from _names_of_texts(value, f"{prefix}{name}.")


def _no_key(where: str, what: str, text_key: str, keys: list[str], texts: list[str], *, key: str) -> str:
    """One line: what is missing, what is there, and what was probably meant."""
    known = ", ".join(keys[:KEYS_NAMED]) + (f" and {len(keys) - KEYS_NAMED} more" if len(keys) > KEYS_NAMED else "")
    leaf = text_key.rpartition(".")[2]
    close = [name for name in texts if name.rpartition(".")[2] == leaf] or difflib.get_close_matches(text_key, texts)
    if not close and len(texts) == 1:
        close = texts
    line = f"{where}: has no {what} {text_key!r} ({what}s: {known or 'none'}); set {key}.text_key"
    return line + (f": did you mean {close[0]!r}?" if close else "")


def _read_parquet(path: Path, *, text_key: str, key: str) -> Iterator[str]:
    row = 0
    try:
        with parquet_file(path) as file:
            parts = _column(path, file.schema_arrow, text_key, key=key)
            for batch in file.iter_batches(batch_size=1024, columns=[text_key]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    for part in parts[1:]:
                        text = None if text is None else text[part]
                    if text is not None and not isinstance(text, str):
                        problem = f"{text_key!r} is a {type(text).__name__}, not a string"
                        raise DataError(f"{path}: row {row}: {problem}; set {key}.text_key")
                    if text and text.strip():
                        yield text
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: row {row + 1}: is not valid UTF-8; write the column as UTF-8") from error


def _parquet_rows(path: Path, *, text_key: str, key: str) -> int:
    """Number of rows, from the header."""
    import pyarrow

    with parquet_file(path) as file:
        column: Any = file.schema_arrow
        for part in _column(path, column, text_key, key=key):
            column = column.field(part) if isinstance(column, pyarrow.Schema) else column.type.field(part)
        if not any(word in str(column.type) for word in ("string", "null")):
            raise DataError(f"{path}: {text_key!r} is a {column.type}, not a string; set {key}.text_key")
        return int(file.metadata.num_rows)


@contextmanager
def parquet_file(path: Path) -> Iterator[Any]:
    """A .parquet file, opened by pyarrow.

    Raises:
        DataError: it cannot be read, or its rows cannot.
    """
    # pyarrow takes a large part of a second to import: only readers of parquet pay for it.
    import pyarrow
    import pyarrow.parquet

    try:
        with damage_named(path), pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except pyarrow.ArrowException as error:
        detail = str(error).splitlines()[0]
        raise DataError(f"{path}: cannot be read ({detail}); restore or remove the file") from error


def _column(path: Path, schema: Any, text_key: str, *, key: str) -> list[str]:
    """Names from the column to the field that holds the text."""
    if text_key in schema.names:
        return [text_key]
    parts = text_key.split(".")
    found: Any = schema.field(parts[0]) if parts[0] in schema.names else None
    for part in parts[1:]:
        fields = {field.name: field for field in found.type} if found is not None and _is_struct(found) else {}
        found = fields.get(part)
    if found is None:
        texts = [name for name in schema.names if "string" in str(schema.field(name).type)]
        texts += [f"{f.name}.{inner.name}" for f in schema if _is_struct(f) for inner in f.type]
        raise DataError(_no_key(str(path), "column", text_key, schema.names, texts, key=key))
    return parts


def _is_struct(field: Any) -> bool:
    return str(field.type).startswith("struct<")
