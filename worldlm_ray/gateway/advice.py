"""How well a border's line does for the clients behind it, and which setting would keep them busy. No input or output.

A client that waits for its exchange is busy for `round / (round + up + down)` of its time, where `up` and `down` are
the bits of an update and of a model over the line's speed each way. A model travels as fp32, an update by its codec.
With `exchange.overlap`, the next round goes on meanwhile: the client is busy for `round / max(round, up + down)`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from worldlm_ray.exchange import compression

BUSY = 0.9
"""Share of its time that a client should train."""
MEGABIT = 1e6
CODECS = ("fp32", "bf16", "int8", "int4")
"""From the most bytes to the fewest: of those that would do, the one that loses least is advised."""


@dataclass(frozen=True, kw_only=True)
class LinkFacts:
    """What is known of a line and of what crosses it."""

    parameters: int
    """Of the model."""
    mbit_up: float
    """Megabits per second from the member to the world."""
    mbit_down: float
    round_s: float
    """That a client trains between two exchanges."""
    codec: str = "fp32"
    """`exchange.codec`."""
    overlap: bool = False
    """`exchange.overlap`; what a federation does by itself."""

    @property
    def up_s(self) -> float:
        """That an update takes."""
        return 8 * compression.nbytes(self.codec, self.parameters) / (MEGABIT * self.mbit_up)

    @property
    def down_s(self) -> float:
        """That a model takes."""
        return 8 * compression.nbytes("fp32", self.parameters) / (MEGABIT * self.mbit_down)

    @property
    def busy(self) -> float:
        """Share of its time that a client trains, 0 to 1."""
        exchange_s = self.up_s + self.down_s
        return self.round_s / (max(self.round_s, exchange_s) if self.overlap else self.round_s + exchange_s)


@dataclass(frozen=True)
class Change:
    """A change of the configuration."""

    text: str
    busy: float
    """Share of its time that a client would train with it."""


def changes(facts: LinkFacts) -> Iterator[Change]:
    """Changes that would keep a client busy, the mildest first; nothing where it is busy already.

    A codec with fewer bytes, the mildest that is enough; an exchange beside the next round; longer rounds, which is
    always enough. If only several of them together are enough, a codec comes with the overlap.
    """
    if facts.busy >= BUSY:
        return
    smaller = CODECS[CODECS.index(facts.codec) + 1 :] if facts.codec in CODECS else ()
    beside = replace(facts, overlap=True)
    enough = [codec for codec in smaller if replace(facts, codec=codec).busy >= BUSY]
    if enough:
        yield Change(f"exchange.codec: {enough[0]}", replace(facts, codec=enough[0]).busy)
    if not facts.overlap and beside.busy >= BUSY:
        yield Change("exchange.overlap: true", beside.busy)
    if not enough and beside.busy < BUSY:
        both = [codec for codec in smaller if replace(beside, codec=codec).busy >= BUSY]
        if both:
            text = f"exchange.codec: {both[0]}" + ("" if facts.overlap else " with exchange.overlap: true")
            yield Change(text, replace(beside, codec=both[0]).busy)
    times = rounds_longer(facts)
    longer = replace(facts, round_s=times * facts.round_s)
    yield Change(f"training.local_steps: {times} times as many", longer.busy)


def rounds_longer(facts: LinkFacts) -> int:
    """How many times as long a round has to be for a client to be busy."""
    exchange_s = facts.up_s + facts.down_s
    enough_s = BUSY * exchange_s if facts.overlap else BUSY / (1.0 - BUSY) * exchange_s
    return max(math.ceil(round(enough_s / facts.round_s, 6)), 1)


def advice(facts: LinkFacts) -> str:
    """The share in which a client is busy, of what it follows, and what would keep it busy: one line."""
    exchange = f"an update takes {facts.up_s:.1f} s up and a model {facts.down_s:.1f} s down"
    said = f"clients are busy for {facts.busy:.0%}: {exchange}, a round {facts.round_s:.1f} s"
    cures = [f"{change.text} ({change.busy:.0%})" for change in changes(facts)]
    return f"{said}; to keep them busy: {', or '.join(cures)}" if cures else said
