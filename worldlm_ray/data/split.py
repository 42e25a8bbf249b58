"""Documents -> blocks of text: which of them a shard takes, and to which part each goes.

Conversations go to the parts by the same rule, each as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from typing import Generic, Literal, TypeVar

from worldlm_ray.config.schema import DataConfig
from worldlm_ray.data.readers import Continued
from worldlm_ray.data.text import shard_of
from worldlm_ray.seeds import derive

Item = TypeVar("Item")
Part = Literal["train", "validation", "heldout"]
PARTS: tuple[Part, ...] = ("train", "validation", "heldout")
"""The parts of a client's text. No part shares a block with another."""

BLOCK_CHARS = 3_072
"""Largest block, in characters. A block goes to one part as a whole."""

BLANK = "\n\n"
"""Stands between two documents. A tokenizer's end-of-text token replaces it."""


@dataclass(frozen=True)
class Block:
    """A stretch of text that goes to one part as a whole."""

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


@dataclass(frozen=True)
class Placed(Generic[Item]):
    """A block or a conversation, and the part that it goes to."""

    block: Item
    index: int
    """Of the block in the stream, from 0."""
    part: Part


class Parting(Generic[Item]):
    """Deals the blocks of one stream to the three parts of a client's text.

    A hash chooses one block of every 1/fraction in a row. First for the held-out part, then, of the others, for the
    validation part: so the held-out part does not depend on the share of the validation part.
    Documents of one work lie next to each other, so a held-out tail would differ in kind from the rest.
    The choice does not depend on the run's seed, so runs with different seeds are comparable.
    A user's text may repeat itself in several parts. Built-in corpora have no repeated paragraphs.

    Args:
        heldout: share of the blocks that are held out, above 0.
        validation: share of the blocks for validation; 0 is none. Both together are below 1.
    """

    def __init__(self, *, heldout: float, validation: float) -> None:
        self._heldout = Cells[tuple[int, Item]](heldout, "heldout")
        self._validation = Cells[tuple[int, Item]](validation / (1.0 - heldout), "validation") if validation else None
        self._index = 0

    def add(self, block: Item) -> list[Placed[Item]]:
        """Add a block. Returns the blocks whose part is now decided, of each part in the order of the stream."""
        decided = self._heldout.add((self._index, block))
        self._index += 1
        return self._placed(decided)

    def rest(self) -> list[Placed[Item]]:
        """The blocks that still wait. With little text each part gets one in turn: held-out, validation, train."""
        placed = self._placed(self._heldout.rest())
        return placed if self._validation is None else [*placed, *_parts(self._validation.rest(), "validation")]

    def _placed(self, decided: list[tuple[tuple[int, Item], bool]]) -> list[Placed[Item]]:
        if self._validation is None:
            return _parts(decided, "heldout")
        placed = list[Placed[Item]]()
        for item, is_heldout in decided:
            if is_heldout:
                placed += _parts([(item, True)], "heldout")
            else:
                placed += _parts(self._validation.add(item), "validation")
        return placed


def _parts(decided: Iterable[tuple[tuple[int, Item], bool]], part: Part) -> list[Placed[Item]]:
    return [Placed(block, index, part if is_chosen else "train") for (index, block), is_chosen in decided]


class Cells(Generic[Item]):
    """A stream in cells of 1/fraction items, of each of which a hash chooses one. An item waits until its cell is full.

    Args:
        fraction: share of the items that are chosen, above 0.
        name: of the choice.
    """

    def __init__(self, fraction: float, name: str) -> None:
        self._fraction, self._name, self._cell = fraction, name, 0
        self._group: list[Item] = []

    @property
    def _size(self) -> int:
        return math.ceil((self._cell + 1) / self._fraction) - math.ceil(self._cell / self._fraction)

    def add(self, item: Item) -> list[tuple[Item, bool]]:
        """Add an item. Returns those of its cell, and whether they are chosen, if that is now full; else none."""
        self._group.append(item)
        return self._decided(self._size) if len(self._group) == self._size else []

    def rest(self) -> list[tuple[Item, bool]]:
        """The items of the last cell. A short last cell may have no chosen item, unless it is the only cell."""
        return self._decided(len(self._group) if self._cell == 0 else self._size)

    def _decided(self, size: int) -> list[tuple[Item, bool]]:
        chosen = derive(0, self._name, self._cell) % max(1, size)
        found = [(item, index == chosen) for index, item in enumerate(self._group)]
        self._cell, self._group = self._cell + 1, []
        return found


# ---- how much of the training part is used -----------------------------------------------------------------------


class Share:
    """So many blocks of every hundred in the stream: `train_fraction`.

    Args:
        fraction: share of the blocks that are kept, above 0.
    """

    def __init__(self, fraction: float) -> None:
        self._fraction = fraction

    def kept(self, placed: Placed[Item]) -> Item | None:
        """The block if it is kept."""
        index = placed.index
        return placed.block if int((index + 1) * self._fraction) > int(index * self._fraction) else None


class Allowance:
    """At most so many bytes, spread evenly over the training part: `train_bytes`.

    What is kept is never behind its share of what was seen. The last block that is kept is cut.

    Args:
        most: bytes to keep, blank lines between blocks included.
        total: bytes of the training part.
    """

    def __init__(self, most: int, total: int) -> None:
        self._most, self._total = most, total
        self._seen = self._taken = 0

    def kept(self, placed: Placed[Block]) -> Block | None:
        """The block, or its beginning, if it is kept."""
        size, gap = len(placed.block.text.encode()), len(BLANK) if self._taken else 0
        self._seen += size
        left = self._most - self._taken - gap
        if left <= 0 or self._taken * self._total >= self._most * self._seen:
            return None
        block = placed.block if size <= left else _beginning(placed.block, left)
        self._taken += gap + len(block.text.encode())
        return block


def _beginning(block: Block, size: int) -> Block:
    """The first bytes of a block. A character across the limit is dropped as a whole."""
    text = block.text.encode()[:size].decode(errors="ignore")
    return replace(block, text=text, ends=tuple(at for at in block.ends if at + len(BLANK) <= len(text)))
