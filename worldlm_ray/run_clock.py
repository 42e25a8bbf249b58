"""Run time: seconds since a run began, the same for all of its processes and continued over a resume.

The wall clock takes no part. It may be set while a run goes on, and those of two machines never agree. A process counts
by the monotonic clock of its machine, which all processes of one boot share. It learns where run time stands

    on the machine where the anchor was taken       from the anchor, exactly
    on any other                                    by asking a process of the run, to within half a round trip
    where no process of the run answers             from what the run folder knows, which may be behind

Within one process run time never goes backwards.
"""

from __future__ import annotations

import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

TRIES = 5
"""Questions to one process: of the answers, the fastest counts."""
CLOSE_S = 0.005
"""An answer that may be off by no more than this needs no second question."""

Ask = Callable[[], float | None]
"""Asks a process of the run what its run time is; None where it does not answer."""


@cache
def this_machine() -> str:
    """What shares a monotonic clock: a machine since its last boot, and a time namespace of it.

    Returns:
        A name that no other machine and no other boot has. Empty where the system does not say (Linux alone does): then
        every process is taken for a separate machine.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = os.readlink("/proc/self/ns/time")
    except OSError:
        return ""
    # Copies of one virtual machine may share a boot, but hardly a name.
    return f"{socket.gethostname()} {boot} {namespace}"


def seconds(value: Any) -> float:
    """A run time that was read from a file: 0 for what is not a finite number, or is negative."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return max(float(value), 0.0) if known else 0.0


@dataclass(frozen=True)
class Stamp:
    """A moment by the monotonic clock of a machine."""

    machine: str
    monotonic_s: float

    @staticmethod
    def now() -> Stamp:
        """This moment."""
        return Stamp(this_machine(), time.monotonic())

    def age_s(self) -> float | None:
        """Seconds since then; None where this machine cannot tell, since it was another one's moment or boot."""
        now = Stamp.now()
        age_s = now.monotonic_s - self.monotonic_s
        return age_s if self.machine and self.machine == now.machine and age_s >= 0.0 else None


@dataclass(frozen=True)
class Anchor:
    """Where run time stood at a moment of a machine."""

    at: Stamp
    run_s: float

    @staticmethod
    def from_mapping(values: Any) -> Anchor:
        """Read what `dataclasses.asdict` made.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        at = Stamp(str(values["at"]["machine"]), float(values["at"]["monotonic_s"]))
        return Anchor(at, seconds(values["run_s"]))


class RunClock:
    """The run time of this process. Pickled, it arrives as an anchor: on the same machine it tells the same time.

    Args:
        anchor: where run time stood at a moment. If that was another machine's, run time goes on from there until
            `settle` has learned more.
        machine: which one this process runs on.
        monotonic: its clock.
    """

    def __init__(
        self, anchor: Anchor, *, machine: str | None = None, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._machine, self._monotonic = this_machine() if machine is None else machine, monotonic
        now_s = monotonic()
        at = anchor.at
        self.is_settled = at.machine == self._machine != "" and at.monotonic_s <= now_s
        """Whether run time here is that of the run's other processes."""
        self._offset_s = anchor.run_s - (at.monotonic_s if self.is_settled else now_s)
        self._last_s = anchor.run_s
        self._reading = threading.Lock()

    @classmethod
    def starting(cls, run_s: float = 0.0) -> RunClock:
        """The clock of the process that begins a run, or goes on with one at `run_s`."""
        clock = cls(Anchor(Stamp.now(), run_s))
        clock.is_settled = True
        return clock

    def __reduce__(self) -> tuple[Any, ...]:
        return RunClock, (self.anchor(),)

    def now_s(self) -> float:
        """Run time now."""
        with self._reading:
            self._last_s = max(self._last_s, self._offset_s + self._monotonic())
            return self._last_s

    def anchor(self) -> Anchor:
        """Run time now, for another process of this machine."""
        with self._reading:
            now_s = self._monotonic()
            return Anchor(Stamp(self._machine, now_s), self._offset_s + now_s)

    def settle(self, peers: Iterable[Ask], *, known_s: Callable[[], float] = lambda: 0.0) -> None:
        """Learn the run time of the others, unless it is known.

        Args:
            peers: asked in turn, until one answers.
            known_s: at least so much has gone by; asked if no peer answers.
        """
        if self.is_settled:
            return
        for ask in peers:
            offset_s = self._offset_of(ask)
            if offset_s is not None:
                self._set(offset_s)
                self.is_settled = True
                return
        self._set(max(self._offset_s, known_s() - self._monotonic()))

    def _offset_of(self, ask: Ask) -> float | None:
        """What is to be added to this machine's clock, by the fastest of a few answers of one peer."""
        best_s, found = math.inf, None
        for _ in range(TRIES):
            asked_s = self._monotonic()
            told_s = ask()
            half_s = (self._monotonic() - asked_s) / 2
            if told_s is None or not math.isfinite(told_s):
                break
            if half_s < best_s:
                best_s, found = half_s, told_s - (asked_s + half_s)  # as if it was read in the middle
            if half_s <= CLOSE_S:
                break
        return found

    def _set(self, offset_s: float) -> None:
        with self._reading:
            self._offset_s = offset_s
