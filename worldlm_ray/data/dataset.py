"""Documents -> memory-mapped train and held-out tokens -> batches.

The text of a client is tokenized once and cached under a key of its content, in

    CACHE_DIR/<fingerprint>/train.bin, heldout.bin, meta.json

Every file is replaced atomically, `meta.json` last. Processes that prepare the same text at the same time do
the work twice, but never disturb each other: the key stands for the content, so that all of them write the
same bytes, and a file that is replaced while it is mapped lives on until it is unmapped.

Shapes: B sequences of a batch, T tokens of a sequence (the context).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt

from worldlm_ray.config.schema import DataConfig
from worldlm_ray.data.corpora import CORPORA
from worldlm_ray.data.fidelity import check_fidelity
from worldlm_ray.data.readers import Continued
from worldlm_ray.data.text import check_shard, describe, find_sources, members_of, read_documents, shard_of
from worldlm_ray.data.tokenizer import Tokenizer, Tokens, load_tokenizer
from worldlm_ray.errors import ConfigError, DataError
from worldlm_ray.seeds import derive
from worldlm_ray.storage import open_files
from worldlm_ray.storage.filesystem import expanded

FORMAT = 1
"""Part of every cache key: raise it when the corpora, the split or the files change."""
BLOCK_CHARS = 3_072
"""Largest block of text that goes to the train or the held-out part as a whole."""

BLANK = "\n\n"
"""Between two documents, and what an end-of-text token stands for where the tokenizer has one."""

SETTLED_NS = 2_000_000_000
"""A file that was changed longer ago than this is known by its time and size."""

Batch = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """A client's tokens, and how batches are drawn from them."""

    train: Tokens
    """Memory-mapped, one-dimensional."""
    heldout: Tokens
    """Memory-mapped, one-dimensional; never trained on."""
    train_bytes: int
    """UTF-8 bytes of the text behind `train`."""
    heldout_bytes: int
    vocab_size: int
    tokenizer: Tokenizer
    fingerprint: str
    """Changes whenever the text, the tokenizer or the split changes."""
    order: str = ""
    """Names the random order in which text is drawn."""
    left_out: tuple[str, ...] = ()
    """What was found beside the text and is not read, a line for each entry of `data.files`; and what of the text the
    tokenizer loses."""

    parts = 1
    """Sequences per step are `batch_size` times this."""

    def batches(self, seed: int, round: int, *, steps: int, batch_size: int, context: int) -> Iterator[Batch]:
        """Draw random training windows; the same seed, order and round give the same batches.

        Args:
            seed: of the run.
            round: of the client, from 0.
            steps: number of batches.
            batch_size: B.
            context: T.

        Yields:
            Inputs and targets, both [B, T], int64, C-contiguous; targets are one token ahead.

        Raises:
            DataError: the training part is shorter than a window.
        """
        _require(len(self.train), "training", context)
        # A plain view: fancy indexing of np.memmap itself is several times slower.
        tokens = np.asarray(self.train)
        generator = np.random.Generator(np.random.PCG64(derive(seed, self.order, "batches", round)))
        for _ in range(steps):
            starts = generator.integers(0, len(tokens) - context, size=batch_size)
            yield _windows(tokens, starts, context=context)

    def records(self, *, context: int) -> int:
        """Sequences of the training part, of `context` tokens and the one that follows: no token is in two of them."""
        return len(self.train) // (context + 1)

    def poisson_batches(
        self, generator: np.random.Generator, *, steps: int, rate: float, context: int
    ) -> Iterator[Batch]:
        """Batches into which every record comes by itself with the same probability: some are large, some empty.

        Args:
            generator: of the draws. Privacy amplification needs them to be secret: seed it from the operating system.
            steps: number of batches.
            rate: probability of a record to be in a batch.
            context: T.

        Yields:
            Inputs and targets as `batches`, [records, T].
        """
        tokens = np.asarray(self.train)
        count = self.records(context=context)
        for _ in range(steps):
            # As many as independent draws would take, and then which: the same distribution, without a draw for each.
            chosen = generator.choice(count, size=generator.binomial(count, rate), replace=False)
            yield _windows(tokens, chosen.astype(np.int64) * (context + 1), context=context)

    def heldout_windows(self, tokens: int, *, context: int, batch_size: int) -> Iterator[Batch]:
        """Windows for measuring: they do not overlap, and lie evenly spread over the held-out part.

        Args:
            tokens: largest number of predicted tokens; one window is the least.
            context: T.
            batch_size: B; the last batch may be smaller.

        Yields:
            Inputs and targets, as `batches`; the same at every call.

        Raises:
            DataError: the held-out part is shorter than a window.
        """
        _require(len(self.heldout), "held-out", context)
        available = (len(self.heldout) - 1) // context
        wanted = max(1, min(available, tokens // context))
        starts = np.arange(wanted, dtype=np.int64) * available // wanted * context
        for first in range(0, wanted, batch_size):
            yield _windows(np.asarray(self.heldout), starts[first : first + batch_size], context=context)

    def heldout_bytes_per_token(self) -> float:
        """Mean bytes of a held-out token: divides a loss in bits per token into bits per byte."""
        return self.heldout_bytes / len(self.heldout)


@dataclass(frozen=True, kw_only=True, eq=False)
class Pool(Dataset):
    """Several datasets trained on together: every step takes as many sequences of each.

    The text of each part is drawn in that part's own order: a client of its own would see the same.
    """

    members: tuple[Dataset, ...]

    @property
    def parts(self) -> int:  # type: ignore[override]
        """Sequences per step are `batch_size` times this."""
        return len(self.members)

    def batches(self, seed: int, round: int, *, steps: int, batch_size: int, context: int) -> Iterator[Batch]:
        """As those of the parts, one after the other: [parts * B, T]."""
        drawn = (m.batches(seed, round, steps=steps, batch_size=batch_size, context=context) for m in self.members)
        for step in zip(*drawn, strict=True):
            yield np.concatenate([inputs for inputs, _ in step]), np.concatenate([targets for _, targets in step])

    def heldout_windows(self, tokens: int, *, context: int, batch_size: int) -> Iterator[Batch]:
        """As those of the parts, an equal number of tokens each."""
        for member in self.members:
            yield from member.heldout_windows(tokens // self.parts, context=context, batch_size=batch_size)

    def heldout_bytes_per_token(self) -> float:
        """Mean over the parts."""
        return math.fsum(member.heldout_bytes_per_token() for member in self.members) / self.parts


def prepare(config: DataConfig, *, context: int, key: str, order: str = "") -> Dataset:
    """Tokenize and split a client's text, or map what an earlier call cached.

    Args:
        config: the data section.
        context: tokens per sequence; both parts must hold at least one window.
        key: dotted key of the section, such as `world.children[0].data`, for messages.
        order: names the random order of the text unless the section does.

    Raises:
        ConfigError: a value of the section cannot be used.
        DataError: the text is damaged or too short, the tokenizer loses most of it, or the cache cannot be written.
    """
    if not 0.0 < config.heldout_fraction < 1.0:
        got = f"got {config.heldout_fraction}"
        raise ConfigError(f"{key}.heldout_fraction", got, "give a number between 0 and 1")
    found = find_sources(config, key)
    if config.pool:
        members = [
            prepare(member, context=context, key=f"{key}.pool[{index}]", order=f"{order}/{index}")
            for index, member in enumerate(members_of(config, key))
        ]
        return _pool(members)
    tokenizer = load_tokenizer(config.tokenizer)
    source = _source(config, found.paths)
    whole = _fingerprint(replace(config, shard=None), source, tokenizer)
    lossy = check_fidelity(config, tokenizer, key=key, known_as=whole)
    fingerprint = _fingerprint(config, source, tokenizer)
    folder = expanded(config.cache_dir) / fingerprint
    parts = _cached(folder) or _build(folder, config, tokenizer, key=key)
    for part, cure in (
        ("train", "give more text"),
        ("heldout", f"give more text or raise {key}.heldout_fraction"),
    ):
        text = describe(config) + (f", shard {config.shard}" if config.shard is not None else "")
        _require(parts[part].tokens, f"{part} part of {key} ({text})", context, cure=cure)
    return Dataset(
        train=_map(folder / "train.bin", tokenizer.dtype),
        heldout=_map(folder / "heldout.bin", tokenizer.dtype),
        train_bytes=parts["train"].bytes,
        heldout_bytes=parts["heldout"].bytes,
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer,
        fingerprint=fingerprint,
        order=config.order or order,
        left_out=(*found.left_out, *lossy),
    )


SHARDS_AT_ONCE = 64
"""Parts of a text that are cut in one pass over it, or fewer where files are short: two files each are open."""


def prepare_shards(configs: Sequence[DataConfig], *, context: int, key: str) -> None:
    """Fill the cache for many parts of one text, reading it once for every `SHARDS_AT_ONCE` of those that are missing.

    `prepare` then finds each of them. Sections that are no parts of a text are left to it.

    Args:
        configs: data sections that differ in `shard` alone.
        context: tokens per sequence.
        key: dotted key of the section, for messages.

    Raises:
        ConfigError: a value of the section cannot be used.
        DataError: the text is damaged, or the cache cannot be written.
    """
    shared = [config for config in configs if config.shard is not None and not config.pool]
    if len(shared) < 2:
        return
    if len({repr(replace(config, shard=None)) for config in shared}) > 1:
        raise ValueError("the sections are not parts of one text")
    found, tokenizer = find_sources(shared[0], key), load_tokenizer(shared[0].tokenizer)
    source = _source(shared[0], found.paths)
    missing = dict[str, DataConfig]()
    for config in shared:
        check_shard(config, key)
        folder = expanded(config.cache_dir) / _fingerprint(config, source, tokenizer)
        if not (folder / "meta.json").is_file():
            missing[str(folder)] = config
    folders = list(missing)
    number = open_files.at_once(SHARDS_AT_ONCE, each=2)
    for first in range(0, len(folders), number):
        some = {Path(folder): missing[folder] for folder in folders[first : first + number]}
        _build_many(some, tokenizer, key=key)


def _pool(members: Sequence[Dataset]) -> Pool:
    first = members[0]
    return Pool(
        members=tuple(members),
        train=first.train,
        heldout=first.heldout,
        train_bytes=sum(member.train_bytes for member in members),
        heldout_bytes=sum(member.heldout_bytes for member in members),
        vocab_size=first.vocab_size,
        tokenizer=first.tokenizer,
        fingerprint="+".join(member.fingerprint for member in members),
        left_out=tuple(line for member in members for line in member.left_out),
    )


def _windows(tokens: Tokens, starts: npt.NDArray[np.int64], *, context: int) -> Batch:
    window_BT = tokens[starts[:, None] + np.arange(context + 1)].astype(np.int64)
    return np.ascontiguousarray(window_BT[:, :-1]), np.ascontiguousarray(window_BT[:, 1:])


def _require(got: int, part: str, context: int, *, cure: str = "give more text") -> None:
    needed = context + 2
    if got < needed:
        problem = f"{part}: {got} tokens, but a context of {context} needs at least {needed}"
        raise DataError(f"{problem}; {cure}, or lower model.context")


def _source(config: DataConfig, paths: list[Path]) -> list[str]:
    """What the text is: neither the place of a file nor its name counts, but for the suffix."""
    if config.corpus is not None:
        return [CORPORA[config.corpus].versions()]
    return [f"{''.join(path.suffixes[-2:]).lower()}:{_text_digest(path)}" for path in paths]


def _text_digest(path: Path) -> str:
    """Digest of a text; the clients of one process, who share it out, have it read once."""
    try:
        state = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); restore or remove the file") from error
    if time.time_ns() - state.st_mtime_ns < SETTLED_NS:
        return _digest(path)  # it may be changed again within the resolution of its time
    return _digest_as_of(path, state.st_mtime_ns, state.st_size, state.st_ino)


@lru_cache(1024)
def _digest_as_of(path: Path, *_: int) -> str:
    return _digest(path)


def _fingerprint(config: DataConfig, source: list[str], tokenizer: Tokenizer) -> str:
    """Key of the content."""
    content = {
        "format": FORMAT,
        "source": source,
        "text_key": config.text_key,
        "max_bytes": config.max_bytes,
        "heldout_fraction": config.heldout_fraction,
        "shard": config.shard,
        "train_fraction": config.train_fraction,
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


# ---------------------------------------------------------------------------------------------- the split


@dataclass(frozen=True)
class Block:
    """A stretch of text that is held out, or not, as a whole."""

    text: str
    continues: bool = False
    """It begins in the middle of a document, where the block before it ended."""
    goes_on: bool = False
    """It begins with a further run of lines of the text before it."""
    ends: tuple[int, ...] = ()
    """Where in it another text begins: the blank line there stands between two texts. In characters."""


def blocks(documents: Iterable[str]) -> Iterator[Block]:
    """Gather short documents, and cut long ones at the ends of lines, to at most BLOCK_CHARS each."""
    pending: list[str] = []
    size = 0
    for document in documents:
        if pending and size + len(document) > BLOCK_CHARS:
            yield _gathered(pending)
            pending, size = [], 0
        if len(document) <= BLOCK_CHARS:
            pending.append(document)
            size += len(document) + 2
        else:
            for index, piece in enumerate(_pieces(document)):
                yield Block(piece, continues=index > 0, goes_on=isinstance(document, Continued))
    if pending:
        yield _gathered(pending)


def _gathered(documents: Sequence[str]) -> Block:
    ends, at = [], 0
    for document, following in pairwise(documents):
        at += len(document)
        if not isinstance(following, Continued):
            ends.append(at)
        at += len(BLANK)
    return Block(BLANK.join(documents), goes_on=isinstance(documents[0], Continued), ends=tuple(ends))


def deal(stream: Iterable[Block], config: DataConfig) -> Iterator[Block]:
    """The blocks of this shard: every n-th of the stream."""
    if config.shard is None:
        yield from stream
        return
    shard, shards = shard_of(config.shard)
    for block in islice(stream, shard - 1, None, shards):
        yield apart(block) if shards > 1 else block


def apart(block: Block) -> Block:
    """A block whose neighbours belong to others: it goes on with nothing."""
    return replace(block, continues=False, goes_on=False)


def _pieces(document: str) -> Iterator[str]:
    piece = ""
    for line in document.splitlines(keepends=True):
        if piece and len(piece) + len(line) > BLOCK_CHARS:
            yield piece
            piece = ""
        if len(line) <= BLOCK_CHARS:
            piece += line
            continue
        at = 0  # a line longer than a block: cut by index, since to cut the rest off again and again is quadratic
        while len(line) - at > BLOCK_CHARS:
            yield line[at : at + BLOCK_CHARS]
            at += BLOCK_CHARS
        piece = line[at:]
    if piece:
        yield piece


def split(stream: Iterable[Block], fraction: float) -> Iterator[tuple[Block, bool]]:
    """Tell for each block whether it is held out: one, chosen by a hash, of every 1/fraction in a row.

    Documents of one work lie next to each other, so a held-out tail would be of another kind than the rest.
    The choice does not depend on the run's seed: a run's numbers stay comparable with those of another seed.
    A user's text is taken as it is: what it repeats may be on both sides. Built-in corpora repeat nothing.
    """
    cells = _Cells(fraction)
    for block in stream:
        yield from cells.add(block)
    yield from cells.rest()


class _Cells:
    """The split of one stream, block by block: they wait until their cell is full."""

    def __init__(self, fraction: float) -> None:
        self._fraction, self._cell = fraction, 0
        self._group: list[Block] = []

    @property
    def _size(self) -> int:
        return math.ceil((self._cell + 1) / self._fraction) - math.ceil(self._cell / self._fraction)

    def add(self, block: Block) -> list[tuple[Block, bool]]:
        """One block more; returns those whose cell it has filled."""
        self._group.append(block)
        return self._decided(self._size) if len(self._group) == self._size else []

    def rest(self) -> list[tuple[Block, bool]]:
        """The blocks of the last cell. One that is cut short may lack its chosen block, unless it is the only one."""
        return self._decided(len(self._group) if self._cell == 0 else self._size)

    def _decided(self, size: int) -> list[tuple[Block, bool]]:
        chosen = derive(0, "heldout", self._cell) % max(1, size)
        found = [(block, index == chosen) for index, block in enumerate(self._group)]
        self._cell, self._group = self._cell + 1, []
        return found


# ---------------------------------------------------------------------------------------------- the cache


@dataclass(frozen=True)
class _Part:
    """What meta.json says of one part."""

    tokens: int
    bytes: int
    digest: str


class _Writer:
    """Appends blocks to one part. Text is written as it comes: it need not fit into memory."""

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

    def part(self) -> _Part:
        return _Part(tokens=self.tokens, bytes=self.bytes, digest=self._hash.hexdigest()[:32])


def _encoded(text: str, ends: Sequence[int], tokenizer: Tokenizer) -> Iterator[Tokens]:
    """Tokens of a text. Where others begin in it, the end-of-text token stands in place of the blank line."""
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


class _Cut:
    """A client's two parts while they are written."""

    def __init__(self, folder: Path, config: DataConfig, tokenizer: Tokenizer, files: ExitStack) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._train, self._heldout = (
            _Writer(files.enter_context(_replacing(folder / f"{part}.bin")), tokenizer) for part in ("train", "heldout")
        )
        self._cells, self._fraction = _Cells(config.heldout_fraction), config.train_fraction
        self._index = 0

    def add(self, block: Block) -> None:
        self._write(self._cells.add(block))

    def end(self) -> dict[str, _Part]:
        self._write(self._cells.rest())
        return {"train": self._train.part(), "heldout": self._heldout.part()}

    def _write(self, blocks: list[tuple[Block, bool]]) -> None:
        for block, is_heldout in blocks:
            index = self._index
            if is_heldout:
                self._heldout.add(block, index=index)
            elif int((index + 1) * self._fraction) > int(index * self._fraction):
                self._train.add(block, index=index)
            self._index += 1


def _build(folder: Path, config: DataConfig, tokenizer: Tokenizer, *, key: str) -> dict[str, _Part]:
    return _build_many({folder: config}, tokenizer, key=key)[folder]


def _build_many(configs: dict[Path, DataConfig], tokenizer: Tokenizer, *, key: str) -> dict[Path, dict[str, _Part]]:
    """Cut a text once into the parts that are asked for, by the folder of each."""
    first = next(iter(configs.values()))
    documents = read_documents(first, key)
    folder = next(iter(configs))
    try:
        with ExitStack() as files:
            cuts = {folder: _Cut(folder, config, tokenizer, files) for folder, config in configs.items()}
            if len(cuts) == 1:
                for block in deal(blocks(documents), first):
                    cuts[folder].add(block)
            else:
                _deal_out(blocks(documents), configs, cuts)
            parts = {folder: cut.end() for folder, cut in cuts.items()}
        for folder in configs:
            with _replacing(folder / "meta.json") as meta_file:
                meta_file.write(json.dumps({name: vars(part) for name, part in parts[folder].items()}).encode())
    except OSError as error:
        problem = f"cannot write the token cache in {folder} ({error.strerror})"
        cure = open_files.cure(error, "set it to a folder with space that you may write")
        raise DataError(f"{key}.cache_dir: {problem}; {cure}") from error
    return parts


def _deal_out(stream: Iterable[Block], configs: dict[Path, DataConfig], cuts: dict[Path, _Cut]) -> None:
    """Give every block to those whose part it belongs to: as `deal` for each of them."""
    takers: dict[int, dict[int, list[_Cut]]] = {}
    for folder, config in configs.items():
        assert config.shard is not None
        shard, shards = shard_of(config.shard)
        takers.setdefault(shards, {}).setdefault(shard - 1, []).append(cuts[folder])
    for index, block in enumerate(stream):
        for shards, theirs in takers.items():
            for cut in theirs.get(index % shards, ()):
                cut.add(apart(block) if shards > 1 else block)


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when it is complete and on disk, or not at all."""
    # delete=False: on success the file is renamed away from its temporary name. It keeps mode 0600, since a
    # client's text is its own. A process that is killed here leaves a .tmp- file, which nobody reads.
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".tmp-", delete=False) as handle:
        try:
            yield cast(BinaryIO, handle)
            handle.flush()
            os.fsync(handle.fileno())
            os.replace(handle.name, path)
        except BaseException:
            os.unlink(handle.name)
            raise


def _cached(folder: Path) -> dict[str, _Part] | None:
    """What the cache holds, or None if it is missing or damaged in any way."""
    try:
        meta: Any = json.loads((folder / "meta.json").read_bytes())
        parts = {name: _Part(**meta[name]) for name in ("train", "heldout")}
        for name, part in parts.items():
            if _digest(folder / f"{name}.bin") != part.digest:
                return None
    except (OSError, DataError, ValueError, KeyError, TypeError):
        return None
    return parts


def _map(path: Path, dtype: np.dtype[Any]) -> Tokens:
    try:
        with path.open("rb") as file:
            return open_files.mapped(file, dtype)
    except OSError as error:
        problem = f"cannot be mapped ({error.strerror})"
        cure = open_files.cure(error, "remove it, so that it is made again")
        raise DataError(f"{path}: {problem}; {cure}") from error
