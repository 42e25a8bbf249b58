"""What all requests at a gateway have in common: how a body is read, how an answer is made, and who asks."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from aiohttp import web

from worldlm_ray.errors import MessageError
from worldlm_ray.gateway.connections import Connection
from worldlm_ray.gateway.meter import Meter
from worldlm_ray.gateway.wire import MESSAGE_BYTES, Refusal, packed, parsed

PIECE_BYTES = 256 * 1024
"""Of a buffer, that are handed to the socket at once."""
RETRY_S = 5
"""After which a refusal for lack of room is worth another try."""

M = TypeVar("M")

_STATUS = {
    "malformed": 400,
    "not_allowed": 403,
    "bad_signature": 403,
    "unknown_request": 404,
    "gone": 410,
    "wrong_size": 413,
    "wrong_digest": 422,
    "failed": 500,
    "unreachable": 503,
    "busy": 503,
    "over_quota": 507,
}
_RANGE = re.compile(r"bytes=(\d{1,15})-(\d{1,15})")


@dataclass(eq=False)
class Member:
    """What a gateway knows of a member that has called since the gateway began."""

    path: str
    answers: Counter[str] = field(default_factory=Counter)
    """Requests that were answered without a refusal, by method."""
    meter: Meter = field(default_factory=Meter)
    """What has crossed, as this side counts it; `resumed` are leaves that came though they were there, or that were not
    what their digest said."""
    certificate: bytes = b""
    """That it has shown last, in DER."""
    joined: tuple[int, int] | None = None
    """Incarnations of the member and of the parent that it has joined."""
    heard_s: float = 0.0
    """When the parent was last told that the member lives; seconds of the event loop."""

    @property
    def name(self) -> str:
        """Among its siblings."""
        return self.path.rpartition("/")[2]


def connection_of(request: web.BaseRequest) -> Connection:
    """The connection by which a request came."""
    connection = request.protocol
    assert isinstance(connection, Connection)
    return connection


def checked_length(request: web.BaseRequest, *, most: int, exactly: bool = False) -> int:
    """Length of a body, before a byte of it is read.

    Args:
        request: whose body it is.
        most: bytes.
        exactly: whether the body must have so many.

    Raises:
        MessageError: wrong_size: none is given, or another one; malformed: the body is encoded.
    """
    if "Content-Encoding" in request.headers:
        raise MessageError("malformed", "the body is encoded, expected bytes as they are")
    length = request.content_length
    if length is None or length > most or (exactly and length != most):
        got = "no Content-Length" if length is None else f"a body of {length} bytes"
        raise MessageError("wrong_size", f"got {got}, expected {'' if exactly else 'at most '}{most}")
    return length


async def pieces(request: web.BaseRequest) -> AsyncIterator[bytes]:
    """A body, as it comes; the connection is closed if it does not get on."""
    connection = connection_of(request)
    with connection.transfer():
        while piece := await request.content.readany():
            connection.moved += len(piece)
            yield piece


async def read_raw(request: web.BaseRequest, *, most: int) -> bytes:
    """A small body.

    Raises:
        MessageError: wrong_size or malformed.
    """
    length = checked_length(request, most=most)
    body = b"".join([piece async for piece in pieces(request)])
    if len(body) != length:
        raise MessageError("wrong_size", f"the body ended after {len(body)} of {length} bytes")
    return body


async def read(request: web.BaseRequest, kind: type[M], *, most: int = MESSAGE_BYTES) -> M:
    """A message.

    Raises:
        MessageError: see `wire.parsed`.
    """
    return parsed(kind, await read_raw(request, most=most), most_bytes=most)


def answer(message: Any = None) -> web.Response:
    """A message as an answer, or an empty one."""
    return web.Response(status=204) if message is None else web.Response(body=packed(message))


def refused(reason: str, detail: str, *, status: int | None = None, retry_s: float = RETRY_S) -> web.Response:
    """The answer that refuses; where room is missing, it says after how many seconds another try is worth it."""
    status = _STATUS.get(reason, 409) if status is None else status
    headers = {"Retry-After": str(math.ceil(retry_s))} if status == 507 else {}
    return web.Response(status=status, body=packed(Refusal(reason=reason, detail=detail[:1_000])), headers=headers)


def range_of(request: web.BaseRequest, size: int) -> tuple[int, int]:
    """Begin and end of the bytes that are asked for.

    Raises:
        MessageError: malformed: it is not one range inside the buffer.
    """
    match = _RANGE.fullmatch(request.headers.get("Range", ""))
    first, last = (int(match[1]), int(match[2])) if match else (0, size)
    if not first <= last < size:
        raise MessageError("malformed", f"expected one Range of bytes within the first {size}")
    return first, last + 1


async def send_bytes(
    request: web.BaseRequest,
    view: memoryview,
    *,
    headers: dict[str, str],
    status: int,
    paced: Callable[[int], Awaitable[None]] | None = None,
) -> Any:
    """Answer by a part of a buffer, without a copy of it.

    Args:
        request: that is answered.
        view: the part.
        headers: of the answer.
        status: of the answer.
        paced: is told how many bytes have gone, and returns when more may go.
    """
    response = web.StreamResponse(status=status, headers=headers)
    response.content_length = len(view)
    connection = connection_of(request)
    with connection.transfer():
        await response.prepare(request)
        for at in range(0, len(view), PIECE_BYTES):
            piece = view[at : at + PIECE_BYTES]
            await response.write(piece)
            connection.moved += len(piece)
            if paced is not None:
                await paced(len(piece))
        await response.write_eof()
    return response
