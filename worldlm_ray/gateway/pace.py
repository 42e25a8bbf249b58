"""How fast bytes go: a rate that is kept over a second, without a thread, on either side of a border."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

BURST_S = 0.25
"""Seconds' worth of bytes that may go at once after a rest."""


class Line:
    """The times at which bytes go, in the order in which they come."""

    def __init__(self) -> None:
        self._free_s = 0.0

    def book(self, nbytes: int, now_s: float, bytes_per_s: float) -> tuple[float, float]:
        """Give bytes their time.

        Args:
            nbytes: so many.
            now_s: of a clock that only rises.
            bytes_per_s: the rate now.

        Returns:
            When they begin and when they have gone, by the same clock.
        """
        begin_s = max(self._free_s, now_s - BURST_S)
        self._free_s = begin_s + nbytes / bytes_per_s
        return begin_s, self._free_s


class Pace:
    """Holds back bytes that are about to go.

    Args:
        rate_mbps: gives the rate as it is now, Mbit/s; None for none.
    """

    def __init__(self, rate_mbps: Callable[[], float | None]) -> None:
        self._rate_mbps, self._line = rate_mbps, Line()

    async def __call__(self, nbytes: int) -> None:
        """Wait until so many bytes may go."""
        rate = self._rate_mbps()
        if rate is None:
            return
        now_s = asyncio.get_running_loop().time()
        begin_s, _ = self._line.book(nbytes, now_s, rate * 1e6 / 8.0)
        if begin_s > now_s:
            await asyncio.sleep(begin_s - now_s)
