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
"""Largest block of text that goes to the train or the held-out part as a whole."""

BLANK = "\n\n"
"""Between two documents, and what an end-of-text token stands for where the tokenizer has one."""


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
    cells = Cells(fraction)
    for block in stream:
        yield from cells.add(block)
    yield from cells.rest()


class Cells:
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
