"""How far a member is from its world: what a gateway answers to a measurement. worldlm_ray/gateway/checkup.py asks."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from worldlm_ray.gateway.requests import Member, answer, read_raw, send_bytes

PROBE_BYTES = 2**20
"""Of a measurement of speed, each way. aiohttp would warn of a larger body."""


@dataclass(frozen=True, kw_only=True)
class Probed:
    """The answer to a probe."""

    path: str
    """The member's."""
    now_s: float
    """The time of day, seconds since 1970."""


async def echo(request: web.BaseRequest, member: Member) -> Any:
    """Take bytes and tell the time; without any bytes, send as many as a body may have.

    Raises:
        MessageError: wrong_size.
    """
    if await read_raw(request, most=PROBE_BYTES):
        return answer(Probed(path=member.path, now_s=time.time()))
    return await send_bytes(request, memoryview(bytes(PROBE_BYTES)), headers={}, status=200)
