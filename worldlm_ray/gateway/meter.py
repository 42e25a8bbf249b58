"""What one side of a border counts: bytes and how fast they moved, verdicts, refusals, and how long it hears nothing.

A side takes what has come together since it last did (`Meter.take`), so that a run's files add up over restarts.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from worldlm_ray.exchange.replies import ACCEPTED, Verdict

MEGABIT = 1e6 / 8
"""Bytes."""


class Way:
    """One direction. Transfers that are under way at the same time share its seconds.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.bytes = 0
        """That have moved, those that were sent again included."""
        self._under_way = 0
        self._since_s = self._busy_s = self._taken_s = 0.0
        self._taken = 0

    @contextmanager
    def moving(self) -> Iterator[None]:
        """A transfer is under way."""
        if not self._under_way:
            self._since_s = self._clock()
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._busy_s += self._clock() - self._since_s

    def count(self, moved: int) -> None:
        """So many bytes have moved."""
        self.bytes += moved

    def take(self) -> tuple[int, float]:
        """Bytes since the last call, and the seconds in which a transfer was under way."""
        busy_s = self._busy_s + (self._clock() - self._since_s if self._under_way else 0.0)
        moved, took_s = self.bytes - self._taken, busy_s - self._taken_s
        self._taken, self._taken_s = self.bytes, busy_s
        return moved, took_s


@dataclass(frozen=True, kw_only=True)
class Crossed:
    """What has crossed a border since the last look."""

    bytes_up: int
    bytes_down: int
    up_s: float
    """Seconds in which a transfer was under way."""
    down_s: float
    resumed: int
    """Parts that were sent again."""
    accepted: int
    refused: dict[str, int]
    """By name."""
    tau: int | None
    """Staleness of the newest update, versions; None if there was none."""
    every_s: float | None
    """Between the newest two updates; None if there was none."""


class Meter:
    """Counts for one member, on either side.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.up, self.down = Way(clock), Way(clock)
        self.resumed = 0
        """Parts that were sent again."""
        self.refusals: Counter[str] = Counter()
        """By name."""
        self._accepted = self._taken_resumed = 0
        self._taken_refusals: Counter[str] = Counter()
        self._tau: int | None = None
        self._every_s: float | None = None
        self._updated_s: float | None = None
        self._heard_s, self._missed_s = clock(), -1.0

    def heard(self) -> None:
        """The other side has been heard."""
        self._heard_s = self._clock()

    def missed(self) -> None:
        """The other side should have been heard, and was not."""
        self._missed_s = self._clock()

    def judged(self, verdict: Verdict) -> None:
        """An update has its verdict."""
        now_s = self._clock()
        if verdict.reason == ACCEPTED:
            self._accepted += 1
        else:
            self.refusals[verdict.reason] += 1
        self._tau = verdict.tau if verdict.tau >= 0 else None
        self._every_s = None if self._updated_s is None else now_s - self._updated_s
        self._updated_s = now_s

    def offline_s(self, *, patience_s: float = 0.0) -> float:
        """Seconds since the other side was heard; 0 if it was not missed since.

        Args:
            patience_s: silence of so many seconds counts as missed.
        """
        silent_s = self._clock() - self._heard_s
        is_missed = self._missed_s > self._heard_s or (patience_s > 0.0 and silent_s > patience_s)
        return silent_s if is_missed else 0.0

    def take(self) -> Crossed:
        """What has come together since the last call."""
        (bytes_up, up_s), (bytes_down, down_s) = self.up.take(), self.down.take()
        found = Crossed(
            bytes_up=bytes_up,
            bytes_down=bytes_down,
            up_s=up_s,
            down_s=down_s,
            resumed=self.resumed - self._taken_resumed,
            accepted=self._accepted,
            refused=dict(self.refusals - self._taken_refusals),
            tau=self._tau,
            every_s=self._every_s,
        )
        self._taken_resumed, self._taken_refusals = self.resumed, self.refusals.copy()
        self._accepted, self._tau, self._every_s = 0, None, None
        return found


def mbit_per_s(moved: int, took_s: float) -> float | None:
    """Speed of a transfer; None if there was none."""
    return moved / MEGABIT / took_s if moved and took_s > 0.0 else None
