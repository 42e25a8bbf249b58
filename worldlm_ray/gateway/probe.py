"""How far a member is from its world: what `worldlm gateway check` asks a gateway."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

from worldlm_ray.errors import GatewayError, MessageError
from worldlm_ray.gateway import wire
from worldlm_ray.gateway.contexts import client_context
from worldlm_ray.gateway.http import Http, checking
from worldlm_ray.gateway.link import CLOCK_S
from worldlm_ray.gateway.profile import Profile
from worldlm_ray.gateway.requests import Member, answer, read_raw, send_bytes

PROBE_BYTES = 2**20
"""Of a measurement of speed, each way; the first try has a sixteenth of it. aiohttp would warn of a larger body."""
ROUND_TRIPS = 5
"""Of which the shortest is told."""
ENOUGH_S = 1.0
"""A first try that takes so long has measured the speed."""


@dataclass(frozen=True, kw_only=True)
class Probed:
    """The answer to a probe."""

    path: str
    """The member's."""
    now_s: float
    """The time of day, seconds since 1970."""


# ---- the world's side --------------------------------------------------------------------------------------------


async def echo(request: web.BaseRequest, member: Member) -> Any:
    """Take bytes and tell the time; without any bytes, send as many as a body may have.

    Raises:
        MessageError: wrong_size.
    """
    if await read_raw(request, most=PROBE_BYTES):
        return answer(Probed(path=member.path, now_s=time.time()))
    return await send_bytes(request, memoryview(bytes(PROBE_BYTES)), headers={}, status=200)


# ---- the member's side -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    text: str
    is_good: bool = True
    mbit: tuple[float, float] | None = None
    """Of a measurement of speed: megabits per second up and down."""


async def check(profile: Profile) -> AsyncIterator[Finding]:
    """Look at all that lies between a member and its world, one after the other; the first that fails is the last.

    Args:
        profile: the member's.
    """
    parts = urlsplit(profile.url)
    host, port = parts.hostname or "", parts.port or 443
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        yield Finding("name", f"{host} is {', '.join(sorted({str(each[4][0]) for each in found}))}")
    except OSError as error:
        # With a proxy, the proxy looks names up.
        yield Finding("name", f"{host} is not known here ({error.strerror or error})")
    try:
        days = profile.days_left()
    except GatewayError as error:
        yield Finding("certificate", str(error), is_good=False)
        return
    yield Finding("certificate", f"of {profile.path}, good for {days:.1f} days", is_good=days > 0)
    http = Http(profile.url, checking(client_context(profile), profile.check_server), connections=1, tries=2)
    try:
        async for finding in _asked(http):
            yield finding
    except MessageError as error:
        what = "gateway" if error.reason == "unreachable" else "world"
        yield Finding(what, f"{error.reason}: {error.detail}", is_good=False)
    finally:
        await http.close()


async def _asked(http: Http) -> AsyncIterator[Finding]:
    began = time.monotonic()
    await _probe(http, b"\0")
    yield Finding("gateway", f"answers by TLS 1.3, after {1e3 * (time.monotonic() - began):.0f} ms for the first time")
    trips = []
    for _ in range(ROUND_TRIPS):
        began = time.monotonic()
        found = await _probe(http, b"\0")
        trips.append(time.monotonic() - began)
    apart_s = time.time() - found.now_s
    yield Finding("clock", f"{apart_s:+.1f} s from the world's", is_good=abs(apart_s) < CLOCK_S)
    yield Finding("round trip", f"{1e3 * min(trips):.1f} ms")
    for size in (PROBE_BYTES // 16, PROBE_BYTES):
        began = time.monotonic()
        await _probe(http, bytes(size))
        took_s = time.monotonic() - began
        if took_s > ENOUGH_S:
            break
    up = 8e-6 * size / took_s
    began = time.monotonic()
    got = await http.call("POST", "probe", most=PROBE_BYTES)
    down = 8e-6 * len(got) / (time.monotonic() - began)
    text = f"{up:,.1f} Mbit/s up, {down:,.1f} Mbit/s down, over one connection"
    yield Finding("speed", text, mbit=(up, down))


async def _probe(http: Http, body: bytes) -> Probed:
    return wire.parsed(Probed, await http.call("POST", "probe", body))
