"""Reading the conversations of one file.

| suffix              | a record is                                          |
|---------------------|------------------------------------------------------|
| .jsonl, .ndjson     | one line                                             |
| .json               | one object, in an array or in a sequence of objects  |
| .parquet            | one row                                              |

A record holds `messages`, a list of {role, content}, or the strings `prompt` and `completion`: a message of the user
and one of the assistant. All but .parquet may be compressed: .gz, .zst, .bz2, .xz.

Every failure is a `DataError` that names the file and the line, record or row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from worldlm_ray.data.readers import (
    COMPRESSED,
    KEYS_NAMED,
    format_of,
    json_lines,
    json_values,
    parquet_file,
    refuse_pointer,
)
from worldlm_ray.errors import DataError

MESSAGES, PROMPT, COMPLETION = KEYS = ("messages", "prompt", "completion")
ASSISTANT = "assistant"
ROLES = ("system", "user", ASSISTANT, "tool")
EXPECTED = f"conversations lie in .jsonl, .ndjson, .json (also with {', '.join(COMPRESSED)}) or .parquet"
_CURE = "mend or remove it"


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages in their order."""

    messages: tuple[dict[str, str], ...]
    """`role`, one of `ROLES`, and `content` of each. At least one answers another one."""
    where: str
    """File and line, record or row, for messages."""


def read(path: Path) -> Iterator[Conversation]:
    """The conversations of a file.

    Args:
        path: the file; `format_of` knows it.

    Raises:
        DataError: the file is damaged, or a record holds no conversation.
    """
    refuse_pointer(path)
    records: Iterator[tuple[int, Any]]
    match format_of(path):
        case ".json":
            records, noun = json_values(path), ": record "
        case ".parquet":
            records, noun = _rows(path), ": row "
        case _:
            records, noun = json_lines(path), ":"
    for number, record in records:
        yield conversation_of(record, where=f"{path}{noun}{number}")


def holds_conversations(path: Path) -> bool:
    """Whether a file begins with a conversation; False of an empty one.

    Raises:
        DataError: the beginning is damaged, or the first record holds no conversation.
    """
    try:
        state = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); restore or remove the file") from error
    return _holds_conversations_as_of(path, state.st_mtime_ns, state.st_size, state.st_ino)


@lru_cache(1024)
def _holds_conversations_as_of(path: Path, *_: int) -> bool:
    found = read(path)
    with closing(found):  # type: ignore[type-var]
        return next(found, None) is not None


def is_record(value: Any) -> bool:
    """Whether a value of a .json file seems to be a record of a conversation."""
    return isinstance(value, dict) and (MESSAGES in value or (PROMPT in value and COMPLETION in value))


def conversation_of(record: Any, *, where: str) -> Conversation:
    """The conversation of a record.

    Args:
        record: a JSON value, or a row as a dictionary.
        where: of the record, for messages.

    Raises:
        DataError: it holds none.
    """
    if not isinstance(record, dict):
        raise DataError(f"{where}: is a {type(record).__name__}, not an object; write one object per record")
    given = {name: record[name] for name in KEYS if record.get(name) is not None}
    if MESSAGES in given:
        messages = _messages(given[MESSAGES], where)
    elif PROMPT in given and COMPLETION in given:
        messages = (
            _message("user", given[PROMPT], f"{where}: {PROMPT!r}"),
            _message(ASSISTANT, given[COMPLETION], f"{where}: {COMPLETION!r}"),
        )
    else:
        keys = [str(key) for key in record][:KEYS_NAMED]
        problem = f"has neither {MESSAGES!r} nor {PROMPT!r} and {COMPLETION!r} (keys: {', '.join(keys) or 'none'})"
        raise DataError(f"{where}: {problem}; write a list of {{role, content}} under {MESSAGES!r}")
    return Conversation(messages=messages, where=where)


def _messages(found: Any, where: str) -> tuple[dict[str, str], ...]:
    if not isinstance(found, list) or not found:
        got = "is empty" if found == [] else f"is a {type(found).__name__}, not a list"
        raise DataError(f"{where}: {MESSAGES!r} {got}; write a list of {{role, content}}")
    messages = list[dict[str, str]]()
    for index, each in enumerate(found):
        at = f"{where}: {MESSAGES}[{index}]"
        if not isinstance(each, dict):
            raise DataError(f"{at} is a {type(each).__name__}, not an object; write {{role, content}}")
        if each.get("role") not in ROLES:
            raise DataError(f"{at} has the role {each.get('role')!r}, expected one of {', '.join(ROLES)}; {_CURE}")
        messages.append(_message(each["role"], each.get("content"), at))
    if not any(message["role"] == ASSISTANT for message in messages[1:]):
        raise DataError(f"{where}: no message of the assistant answers another one; {_CURE}")
    return tuple(messages)


def _message(role: str, content: Any, at: str) -> dict[str, str]:
    if not isinstance(content, str):
        raise DataError(f"{at} has a content of {type(content).__name__}, not a string; {_CURE}")
    if not content.strip() and role != "system":  # many data sets leave the system's message empty
        raise DataError(f"{at} has no content; {_CURE}")
    try:
        content.encode()
    except UnicodeEncodeError as error:  # JSON may hold half of a surrogate pair, which no UTF-8 text can
        raise DataError(f"{at} holds half of a surrogate pair; {_CURE}") from error
    return {"role": role, "content": content}


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    row = 0
    try:
        with parquet_file(path) as file:
            columns = [name for name in KEYS if name in file.schema_arrow.names]
            if not columns:
                raise DataError(
                    f"{path}: has no column of {', '.join(KEYS)} (columns: {', '.join(file.schema_arrow.names)}); "
                    f"write a list of {{role, content}} in a column {MESSAGES!r}"
                )
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for record in batch.to_pylist():
                    row += 1
                    yield row, record
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: row {row + 1}: is not valid UTF-8; write the column as UTF-8") from error
