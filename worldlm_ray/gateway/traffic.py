"""How much may cross a border: bytes a second of a member and of all, and bytes a day of a member.

A rate makes a transfer slower and refuses nothing: who sends more waits, and TCP makes the other side wait. A day's
bytes that are used up refuse leaves until midnight (UTC), with the name `over_quota`; small requests go on, so that
the member is not given up as silent. What has arrived stays, and the rest follows the next day.

The day's bytes outlast the gateway: they are written every SAVED_EVERY_S, so that a kill forgets as much.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from worldlm_ray.errors import MessageError
from worldlm_ray.gateway.certificates import DAY_S
from worldlm_ray.gateway.keys import Clock
from worldlm_ray.gateway.pace import Line
from worldlm_ray.storage.filesystem import make_folder, replace_text

SAVED_EVERY_S = 10.0
FILE = "traffic.json"


class DayIsOver(MessageError):
    """The day's bytes of a member are used up.

    Args:
        detail: of the refusal.
        after_s: seconds until there are new ones.
    """

    def __init__(self, detail: str, after_s: float) -> None:
        super().__init__("over_quota", detail)
        self.after_s = after_s


@dataclass(frozen=True, kw_only=True)
class TrafficLimits:
    """What may cross, both ways together; 0 for no limit."""

    member_bytes_per_s: float = 0.0
    bytes_per_s: float = 0.0
    """Of all members together."""
    member_bytes_per_day: float = 0.0


class Rate:
    """Bytes a second, in the order in which they come.

    Args:
        bytes_per_s: the rate; 0 for none.
    """

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s, self._line = bytes_per_s, Line()

    def wait_s(self, nbytes: int, now_s: float) -> float:
        """Count bytes that have moved.

        Args:
            nbytes: so many.
            now_s: of a clock that only rises.

        Returns:
            Seconds that their owner waits before it moves more.
        """
        if not self._bytes_per_s:
            return 0.0
        _, end_s = self._line.book(nbytes, now_s, self._bytes_per_s)
        return max(end_s - now_s, 0.0)


class Traffic:
    """The bytes of all members.

    Args:
        limits: what may cross.
        folder: where the day's bytes are kept; None keeps them in memory.
        warn: hears, once a day, of a member's path and that its bytes are used up.
        clock: Unix seconds.
    """

    def __init__(
        self,
        limits: TrafficLimits | None = None,
        *,
        folder: Path | None = None,
        warn: Callable[[str, str], None] = lambda path, text: None,
        clock: Clock = time.time,
    ) -> None:
        self._limits, self._folder, self._warn, self._clock = limits or TrafficLimits(), folder, warn, clock
        self._all, self._rates = Rate(self._limits.bytes_per_s), dict[str, Rate]()
        self._day, self._used = 0, Counter[str]()
        self._told: set[str] = set()
        self._save_next_s = 0.0
        self._load()

    def used(self, path: str) -> int:
        """Bytes of a member today."""
        self._turn()
        return self._used[path]

    def check(self, path: str) -> None:
        """Whether a member may move leaves now.

        Raises:
            DayIsOver: they are used up.
        """
        most = self._limits.member_bytes_per_day
        if not most or self.used(path) < most:
            return
        text = f"{path} has moved {self._used[path] / 1e9:.3g} of {most / 1e9:.3g} GB today"
        if path not in self._told:
            self._told.add(path)
            self._warn(path, f"{text}: its updates wait until 00:00 UTC, or raise gateway.member_gb_per_day")
        cure = "it goes on at 00:00 UTC, unless the world's operator raises gateway.member_gb_per_day"
        raise DayIsOver(f"{text}: {cure}", DAY_S - self._clock() % DAY_S)

    async def moved(self, path: str, nbytes: int) -> None:
        """Count bytes of a member, and wait until it may move more."""
        self._turn()
        self._used[path] += nbytes
        self._save()
        rate = self._rates.setdefault(path, Rate(self._limits.member_bytes_per_s))
        now_s = asyncio.get_running_loop().time()
        wait_s = max(rate.wait_s(nbytes, now_s), self._all.wait_s(nbytes, now_s))
        if wait_s > 0.0:
            await asyncio.sleep(wait_s)

    def _turn(self) -> None:
        """A new day begins with nothing."""
        day = int(self._clock() // DAY_S)
        if day != self._day:
            self._day = day
            self._used.clear()
            self._told.clear()

    def _load(self) -> None:
        self._turn()
        if self._folder is None:
            return
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):  # lost without harm
            found = json.loads((self._folder / FILE).read_text(encoding="utf-8"))
            if found["day"] == self._day:
                self._used.update({str(path): int(used) for path, used in found["used"].items()})

    def _save(self) -> None:
        now_s = self._clock()
        if self._folder is None or not self._limits.member_bytes_per_day or now_s < self._save_next_s:
            return
        self._save_next_s = now_s + SAVED_EVERY_S
        with suppress(OSError):  # a full disk must not shut members out
            make_folder(self._folder)
            replace_text(self._folder / FILE, json.dumps({"day": self._day, "used": self._used}))
