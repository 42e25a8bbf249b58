"""Tokens of a client on disk: each text is tokenized once and cached under a key of its content, in

    CACHE_DIR/<fingerprint>/train.bin, validation.bin, heldout.bin, meta.json

Every file is replaced atomically, `meta.json` last. Processes that prepare the same text at the same time do
the work twice, but never disturb each other. The key stands for the content, so all of them write the
same bytes, and a file that is replaced while it is mapped lives on until it is unmapped.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from worldlm_ray.config.schema import DataConfig
from worldlm_ray.data.corpora import CORPORA
from worldlm_ray.data.split import BLANK, PARTS, Allowance, Block, Parting, Placed, Share, apart, blocks, deal
from worldlm_ray.data.text import read_documents, shard_of
from worldlm_ray.data.tokenizer import Tokenizer, Tokens
from worldlm_ray.errors import DataError
from worldlm_ray.storage import open_files
from worldlm_ray.storage.filesystem import replacing

FORMAT = 2
"""Part of every cache key: raise it when the corpora, the split or the files change."""

SETTLED_NS = 2_000_000_000
"""A file that has not changed for longer than this is identified by its time and size."""


def source_of(config: DataConfig, paths: list[Path]) -> list[str]:
    """What the text is, for `fingerprint_of`: versions of a corpus, or the suffix and the digest of each file.

    The place of a file and the rest of its name do not count.
    """
    if config.corpus is not None:
        return [CORPORA.get(config.corpus).versions()]
    return [f"{''.join(path.suffixes[-2:]).lower()}:{_text_digest(path)}" for path in paths]


def _text_digest(path: Path) -> str:
    """Digest of a text. The clients of one process that share a text read it once."""
    try:
        state = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); restore or remove the file") from error
    if time.time_ns() - state.st_mtime_ns < SETTLED_NS:
        return _digest(path)  # it may change again within the resolution of its time
    return _digest_as_of(path, state.st_mtime_ns, state.st_size, state.st_ino)


@lru_cache(1024)
def _digest_as_of(path: Path, *_: int) -> str:
    return _digest(path)


def fingerprint_of(config: DataConfig, source: list[str], tokenizer: Tokenizer) -> str:
    """Key of the content: it changes with the text, the tokenizer and the split."""
    content = {
        "format": FORMAT,
        "source": source,
        "text_key": config.text_key,
        "max_bytes": config.max_bytes,
        "heldout_fraction": config.heldout_fraction,
        "validation_fraction": config.validation_fraction,
        "shard": config.shard,
        "train_fraction": config.train_fraction,
        "train_bytes": config.train_bytes,
        "tokenizer": tokenizer.fingerprint,
    }
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "blake2b").hexdigest()[:32]
    except OSError as error:
        cure = open_files.cure(error, "restore or remove the file")
        raise DataError(f"{path}: cannot be read ({error.strerror}); {cure}") from error


# ---- writing and mapping -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PartMeta:
    """What meta.json says of one part."""

    tokens: int
    bytes: int
    digest: str


class _Writer:
    """Appends blocks to one part. It keeps no text in memory."""

    def __init__(self, handle: BinaryIO, tokenizer: Tokenizer) -> None:
        self._handle = handle
        self._tokenizer = tokenizer
        self._hash = hashlib.blake2b()
        self._last = -1
        self.tokens = 0
        self.bytes = 0

    def add(self, block: Block, *, index: int) -> None:
        follows, text, ends = self._last == index - 1, block.text, block.ends
        if self.tokens and not (block.continues and follows):
            text = BLANK + text
            ends = tuple(at + len(BLANK) for at in ends)
            if not (block.goes_on and follows):
                ends = (0, *ends)
        for encoded in _encoded(text, ends, self._tokenizer):
            raw = encoded.tobytes()
            self._handle.write(raw)
            self._hash.update(raw)
            self.tokens += len(encoded)
        self._last = index
        self.bytes += len(text.encode())

    def meta(self) -> PartMeta:
        return PartMeta(tokens=self.tokens, bytes=self.bytes, digest=self._hash.hexdigest()[:32])


def _encoded(text: str, ends: Sequence[int], tokenizer: Tokenizer) -> Iterator[Tokens]:
    """Tokens of a block. Where another text begins in it, the end-of-text token replaces the blank line."""
    if tokenizer.end is None:
        yield tokenizer.encode(text)
        return
    end, start = np.array([tokenizer.end], tokenizer.dtype), 0
    for at in ends:
        if at:
            yield tokenizer.encode(text[start:at])
        yield end
        start = at + len(BLANK)
    yield tokenizer.encode(text[start:])


class _Taker(Protocol):
    """What takes the blocks of one section."""

    def add(self, block: Block) -> None:
        """Take the next block."""


class _TrainBytes:
    """Counts the bytes of a client's training part, before `train_bytes` is taken of it."""

    def __init__(self, config: DataConfig) -> None:
        self._parting, self._bytes = _parting(config), 0

    def add(self, block: Block) -> None:
        self._count(self._parting.add(block))

    def end(self) -> int:
        self._count(self._parting.rest())
        return self._bytes

    def _count(self, blocks: list[Placed[Block]]) -> None:
        self._bytes += sum(len(placed.block.text.encode()) for placed in blocks if placed.part == "train")


class _ShardWriter:
    """Writes the parts of a client's text."""

    def __init__(self, folder: Path, config: DataConfig, tokenizer: Tokenizer, files: ExitStack, total: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._writers = {
            part: _Writer(files.enter_context(replacing(folder / f"{part}.bin")), tokenizer) for part in PARTS
        }
        self._parting = _parting(config)
        most = config.train_bytes
        self._used = Share(config.train_fraction) if most is None else Allowance(most, total)

    def add(self, block: Block) -> None:
        self._write(self._parting.add(block))

    def end(self) -> dict[str, PartMeta]:
        self._write(self._parting.rest())
        return {part: writer.meta() for part, writer in self._writers.items()}

    def _write(self, blocks: list[Placed[Block]]) -> None:
        for placed in blocks:
            block = self._used.kept(placed) if placed.part == "train" else placed.block
            if block is not None:
                self._writers[placed.part].add(block, index=placed.index)


def _parting(config: DataConfig) -> Parting[Block]:
    return Parting[Block](heldout=config.heldout_fraction, validation=config.validation_fraction)


def build(configs: dict[Path, DataConfig], tokenizer: Tokenizer, *, key: str) -> dict[Path, dict[str, PartMeta]]:
    """Read a text once, and write the files of each section. With `train_bytes` it is read twice.

    Args:
        configs: data sections by the folder of their files. They differ in `shard` alone.
        tokenizer: of the text.
        key: dotted key of the section, for messages.

    Returns:
        By folder: what meta.json says of each of `PARTS`.

    Raises:
        DataError: the text is damaged, or the cache cannot be written.
    """
    first = next(iter(configs.values()))
    totals = dict[Path, int]()
    if first.train_bytes is not None:
        counters = {folder: _TrainBytes(config) for folder, config in configs.items()}
        _deal(blocks(read_documents(first, key)), configs, counters)
        totals = {folder: counter.end() for folder, counter in counters.items()}
    documents = read_documents(first, key)
    folder = next(iter(configs))
    try:
        with ExitStack() as files:
            writers = {
                folder: _ShardWriter(folder, config, tokenizer, files, totals.get(folder, 0))
                for folder, config in configs.items()
            }
            _deal(blocks(documents), configs, writers)
            parts = {folder: writer.end() for folder, writer in writers.items()}
        for folder in configs:
            with replacing(folder / "meta.json") as meta_file:
                meta_file.write(json.dumps({name: vars(part) for name, part in parts[folder].items()}).encode())
    except OSError as error:
        problem = f"cannot write the token cache in {folder} ({error.strerror})"
        cure = open_files.cure(error, "set it to a folder with space that you may write")
        raise DataError(f"{key}.cache_dir: {problem}; {cure}") from error
    return parts


def _deal(stream: Iterable[Block], configs: dict[Path, DataConfig], to: Mapping[Path, _Taker]) -> None:
    """Give each block to the sections whose shard it belongs to: the result is that of `deal` for each section."""
    if len(configs) == 1:
        [(only, config)] = configs.items()
        for block in deal(stream, config):
            to[only].add(block)
        return
    takers: dict[int, dict[int, list[_Taker]]] = {}
    for folder, config in configs.items():
        assert config.shard is not None
        shard, shards = shard_of(config.shard)
        takers.setdefault(shards, {}).setdefault(shard - 1, []).append(to[folder])
    for index, block in enumerate(stream):
        for shards, theirs in takers.items():
            for taker in theirs.get(index % shards, ()):
                taker.add(apart(block) if shards > 1 else block)


def cached(folder: Path) -> dict[str, PartMeta] | None:
    """What the cache holds, or None if it is missing or damaged in any way."""
    try:
        meta: Any = json.loads((folder / "meta.json").read_bytes())
        parts: dict[str, PartMeta] = {name: PartMeta(**meta[name]) for name in PARTS}
        for name, part in parts.items():
            if _digest(folder / f"{name}.bin") != part.digest:
                return None
    except (OSError, DataError, ValueError, KeyError, TypeError):
        return None
    return parts


def mapped(path: Path, dtype: np.dtype[Any]) -> Tokens:
    """The tokens of one part, memory-mapped.

    Raises:
        DataError: the file cannot be mapped.
    """
    try:
        with path.open("rb") as file:
            return open_files.mapped(file, dtype)
    except OSError as error:
        problem = f"cannot be mapped ({error.strerror})"
        cure = open_files.cure(error, "remove it, so that it is made again")
        raise DataError(f"{path}: {problem}; {cure}") from error
