"""The documents of a data section: of its files, or of a corpus.

`check_sources` reads the beginning of every file and raises `ConfigError` before a run starts. Reading raises
`DataError` with the file and the line. Formats: worldlm_ray/data/readers.py. Folders and globs:
worldlm_ray/data/sources.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from worldlm_ray.config.checks import positive
from worldlm_ray.config.loading import merge_into
from worldlm_ray.config.schema import DataConfig
from worldlm_ray.data.chat_records import holds_conversations
from worldlm_ray.data.chat_template import check_template
from worldlm_ray.data.corpora import CORPORA
from worldlm_ray.data.readers import EXPECTED, holds_text, read
from worldlm_ray.data.sources import Found, find
from worldlm_ray.data.tokenizer import check_tokenizer
from worldlm_ray.errors import ConfigError, DataError


def check_sources(config: DataConfig, key: str) -> list[Path]:
    """Find the files of a data section, and read the beginning of each.

    Args:
        config: the data section.
        key: its dotted key, such as `world.children[0].data`, for messages.

    Returns:
        The files in reading order, each once; empty for a corpus.

    Raises:
        ConfigError: there is no usable source of text, or no usable tokenizer.
    """
    if config.pool:
        find_sources(config, key)
        return [path for index, m in enumerate(members_of(config, key)) for path in check_sources(m, _of(key, index))]
    paths = find_sources(config, key).paths
    try:
        with_text = [path for path in paths if _holds(path, config, key)]
    except DataError as error:
        raise ConfigError(f"{key}.files", str(error)) from error
    if paths and not with_text:
        raise ConfigError(f"{key}.files", f"{describe(config)}: there is no text in it", EXPECTED)
    return paths


def _holds(path: Path, config: DataConfig, key: str) -> bool:
    if config.format == "conversations":
        return holds_conversations(path)
    return holds_text(path, text_key=config.text_key, key=key)


def find_sources(config: DataConfig, key: str) -> Found:
    """Find the files of a data section, and what is left out of its folders, without reading them.

    Args:
        config: the data section.
        key: its dotted key, for messages.

    Raises:
        ConfigError: there is no usable source of text, or no usable tokenizer.
    """
    for name in ("max_bytes", "train_bytes"):
        if getattr(config, name) is not None:
            positive(getattr(config, name), f"{key}.{name}")
    _check_tokenizer(config.tokenizer, f"{key}.tokenizer")
    if not 0.0 < config.train_fraction <= 1.0:
        got = f"got {config.train_fraction}"
        raise ConfigError(f"{key}.train_fraction", got, "give a number above 0, at most 1")
    if config.train_bytes is not None and config.train_fraction != 1.0:
        raise ConfigError(f"{key}.train_bytes", "set together with train_fraction", "keep only one of them")
    if not 0.0 <= config.validation_fraction < 1.0 - config.heldout_fraction:
        got = f"got {config.validation_fraction} beside heldout_fraction {config.heldout_fraction}"
        raise ConfigError(f"{key}.validation_fraction", got, "leave text to train on: give less, or 0 for none")
    check_shard(config, key)
    if config.pool:
        if config.files or config.corpus is not None:
            raise ConfigError(f"{key}.pool", "set together with files or a corpus", "keep only one of them")
        found = [find_sources(m, _of(key, index)) for index, m in enumerate(members_of(config, key))]
        lines = [line for each in found for line in each.left_out]
        return Found([path for each in found for path in each.paths], lines)
    if config.format == "conversations":
        _check_conversations(config, key)
    if config.corpus is not None:
        if config.files:
            raise ConfigError(f"{key}.corpus", "set together with files", "keep only one of corpus and files")
        CORPORA.choice(config.corpus, f"{key}.corpus")
        return Found([], [])
    if not config.files:
        raise ConfigError(
            f"{key}.files",
            "neither files nor a corpus given",
            "set files: [PATH, ...] or corpus: " + "|".join(sorted(CORPORA)),
        )
    text_key = None if config.format == "conversations" else config.text_key
    return find(config.files, text_key=text_key, key=f"{key}.files")


def _check_conversations(config: DataConfig, key: str) -> None:
    if config.corpus is not None:
        raise ConfigError(f"{key}.corpus", f"{config.corpus} is text", "give files of conversations, or format: text")
    for name in ("max_bytes", "train_bytes"):
        if getattr(config, name) is not None:
            cure = "leave it out; train_fraction takes a share of the conversations"
            raise ConfigError(f"{key}.{name}", "cuts text, and a conversation is kept whole", cure)
    check_template(config.tokenizer, key)


def _of(key: str, index: int) -> str:
    return f"{key}.pool[{index}]"


def members_of(config: DataConfig, key: str) -> list[DataConfig]:
    """The data sections of a pool. A setting that a member omits is the pool's.

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


def check_shard(config: DataConfig, key: str) -> None:
    """Raise where `shard` is not of the form 2/4.

    Raises:
        ConfigError: it is not.
    """
    try:
        if config.shard is not None:
            shard_of(config.shard)
    except ValueError as error:
        raise ConfigError(f"{key}.shard", f"got {config.shard!r}", "write 2/4 for the second of four") from error


def shard_of(text: str) -> tuple[int, int]:
    """`2/4` as (2, 4).

    Raises:
        ValueError: it has another form.
    """
    shard, _, shards = text.partition("/")
    if not 1 <= int(shard) <= int(shards):
        raise ValueError(text)
    return int(shard), int(shards)


def read_documents(config: DataConfig, key: str) -> Iterator[str]:
    """Read the documents of a data section in a fixed order, up to `max_bytes` of UTF-8.

    Args:
        config: the data section.
        key: its dotted key, for messages.

    Raises:
        ConfigError: as `find_sources`, at once.
        DataError: while iterating: a damaged file, by name and line.
    """
    paths = find_sources(config, key).paths
    if config.corpus is not None:
        documents = CORPORA.get(config.corpus).documents()
    else:
        documents = _from_files(paths, text_key=config.text_key, key=key)
    return documents if config.max_bytes is None else _first_bytes(documents, config.max_bytes)


def describe(config: DataConfig) -> str:
    """The source in a few words, such as `corpus python_stdlib`, `a.txt and 2 more` or `conversations of a.jsonl`."""
    if config.pool:
        return f"a pool of {len(config.pool)}"
    if config.corpus is not None:
        return f"corpus {config.corpus}"
    if not config.files:
        return "no text"
    more, what = len(config.files) - 1, "conversations of " if config.format == "conversations" else ""
    return what + config.files[0] + (f" and {more} more" if more else "")


def _check_tokenizer(spec: str | None, key: str) -> None:
    try:
        check_tokenizer(spec)
    except DataError as error:
        raise ConfigError(key, str(error)) from error


def _first_bytes(documents: Iterable[str], max_bytes: int) -> Iterator[str]:
    left = max_bytes
    for document in documents:
        raw = document.encode()
        if len(raw) >= left:
            # A character across the limit is dropped as a whole.
            cut = raw[:left].decode("utf-8", errors="ignore")
            if cut:
                yield type(document)(cut)
            return
        left -= len(raw)
        yield document


def _from_files(paths: list[Path], *, text_key: str, key: str) -> Iterator[str]:
    for path in paths:
        yield from read(path, text_key=text_key, key=key)
