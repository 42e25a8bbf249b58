"""Documents -> blocks of text, and which of them a shard takes and which are held out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise

from worldlm_ray.config.schema import DataConfig
from worldlm_ray.data.readers import Continued
from worldlm_ray.data.text import shard_of
from worldlm_ray.seeds import derive

BLOCK_CHARS = 3_072
"""Largest block, in characters. A block goes to the train or to the held-out part as a whole."""

BLANK = "\n\n"
"""Stands between two documents. A tokenizer's end-of-text token replaces it."""


@dataclass(frozen=True)
class Block:
    """A stretch of text that is held out, or not, as a whole."""

    text: str
    continues: bool = False
    """Whether it begins inside a document, where the block before it ended."""
    goes_on: bool = False
    """Whether it begins with a further run of lines of the text before it."""
    ends: tuple[int, ...] = ()
    """Offsets, in characters, of the blank lines in it that stand between two texts."""


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
    """The blocks of this shard: every n-th block of the stream."""
    if config.shard is None:
        yield from stream
        return
    shard, shards = shard_of(config.shard)
    for block in islice(stream, shard - 1, None, shards):
        yield apart(block) if shards > 1 else block


def apart(block: Block) -> Block:
    """A block whose neighbours are in other shards: it continues nothing."""
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
        at = 0  # A line longer than a block is cut by index: to cut off its rest again and again takes quadratic time.
        while len(line) - at > BLOCK_CHARS:
            yield line[at : at + BLOCK_CHARS]
            at += BLOCK_CHARS
        piece = line[at:]
    if piece:
        yield piece


def split(stream: Iterable[Block], fraction: float) -> Iterator[tuple[Block, bool]]:
    """Say for each block whether it is held out: a hash chooses one block of every 1/fraction in a row.

    Documents of one work lie next to each other, so a held-out tail would differ in kind from the rest.
    The choice does not depend on the run's seed, so runs with different seeds are comparable.
    A user's text may repeat itself in both parts. Built-in corpora have no repeated paragraphs.
    """
    cells = Cells(fraction)
    for block in stream:
        yield from cells.add(block)
    yield from cells.rest()


class Cells:
    """The split of one stream in cells of 1/fraction blocks. A block waits until its cell is full."""

    def __init__(self, fraction: float) -> None:
        self._fraction, self._cell = fraction, 0
        self._group: list[Block] = []

    @property
    def _size(self) -> int:
        return math.ceil((self._cell + 1) / self._fraction) - math.ceil(self._cell / self._fraction)

    def add(self, block: Block) -> list[tuple[Block, bool]]:
        """Add a block. Returns the blocks of its cell if that is now full, else none."""
        self._group.append(block)
        return self._decided(self._size) if len(self._group) == self._size else []

    def rest(self) -> list[tuple[Block, bool]]:
        """The blocks of the last cell. A short last cell may have no held-out block, unless it is the only cell."""
        return self._decided(len(self._group) if self._cell == 0 else self._size)

    def _decided(self, size: int) -> list[tuple[Block, bool]]:
        chosen = derive(0, "heldout", self._cell) % max(1, size)
        found = [(block, index == chosen) for index, block in enumerate(self._group)]
        self._cell, self._group = self._cell + 1, []
        return found
