"""How fast bytes go: a rate that is kept over a second, without a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

BURST_S = 0.25
"""Seconds' worth of bytes that may go at once after a rest."""


class Pace:
    """Holds back bytes that are about to go.

    Args:
        rate_mbps: gives the rate as it is now, Mbit/s; None for none.
    """

    def __init__(self, rate_mbps: Callable[[], float | None]) -> None:
        self._rate_mbps, self._free_s = rate_mbps, 0.0

    async def __call__(self, nbytes: int) -> None:
        """Wait until so many bytes may go."""
        rate = self._rate_mbps()
        if rate is None:
            return
        now_s = asyncio.get_running_loop().time()
        begin_s = max(self._free_s, now_s - BURST_S)
        self._free_s = begin_s + nbytes * 8e-6 / rate
        if begin_s > now_s:
            await asyncio.sleep(begin_s - now_s)
