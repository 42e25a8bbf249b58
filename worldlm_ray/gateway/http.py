"""A member's connections to the parent's side: requests, what their failures mean, and when they are made again."""

from __future__ import annotations

import asyncio
import random
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import aiohttp

from worldlm_ray.errors import MessageError, WorldLMError
from worldlm_ray.gateway.meter import Meter
from worldlm_ray.gateway.wire import MESSAGE_BYTES, Refusal, packed, parsed

CONNECT_S = 10.0
"""For a connection and its handshake."""
IDLE_S = 60.0
"""Without a byte, a request is given up."""
TRIES = 4
"""Attempts at a request without any progress; then the parent is unreachable, and the caller waits."""
FIRST_S, MOST_S = 0.2, 2.0
"""Pauses between attempts: doubled each time, and spread at random by half, so that members do not come all at once."""
LONG_S = 30.0
"""A member that is to wait for hours asks again so often: the other side's operator may have thought better of it."""
PIECE_BYTES = 256 * 1024
"""Of a buffer, that are handed to the socket at once."""
READ_BYTES = 1024 * 1024
"""Of an answer, that may wait in memory."""

M = TypeVar("M")
Failures = (aiohttp.ClientError, OSError, TimeoutError)
"""What is raised where the other side cannot be reached. (An SSL error is an OSError.)"""


def checking(context: ssl.SSLContext, check: Callable[[bytes], None]) -> ssl.SSLContext:
    """Have every handshake of a context end with a check of the server's certificate (DER), which raises to refuse."""

    class Checked(ssl.SSLObject):
        def do_handshake(self) -> None:
            super().do_handshake()
            try:
                check(self.getpeercert(binary_form=True) or b"")
            except WorldLMError as error:
                raise ssl.SSLCertVerificationError(str(error)) from error

    context.sslobject_class = Checked
    return context


class Backoff:
    """Pauses between attempts at the same thing.

    Args:
        tries: attempts in all.
        say: hears why the other side asks for a wait of hours.
        meter: hears of each attempt that has failed.
    """

    def __init__(
        self, tries: int, say: Callable[[str], None] = lambda text: None, *, meter: Meter | None = None
    ) -> None:
        self._left, self._pause_s, self._say, self._meter = tries, FIRST_S, say, meter or Meter()

    async def wait(self, error: BaseException, *, at_least_s: float = 0.0) -> None:
        """Wait for the next attempt.

        Args:
            error: why the last one failed.
            at_least_s: what the other side asks for; at most MOST_S count, and of LONG_S or more LONG_S. Such a wait
                costs no attempt: it ends when the other side says so.

        Raises:
            MessageError: there has been the last attempt: what the other side has refused, or unreachable.
        """
        if at_least_s >= LONG_S:
            self._say(str(error))
            await asyncio.sleep(LONG_S)
            return
        self._left -= 1
        if not isinstance(error, MessageError):
            self._meter.missed()
        if self._left <= 0:
            raise error if isinstance(error, MessageError) else unreachable(error)
        pause_s = max(self._pause_s * random.uniform(0.5, 1.5), min(at_least_s, MOST_S))
        await asyncio.sleep(pause_s)
        self._pause_s = min(2 * self._pause_s, MOST_S)


def unreachable(error: BaseException) -> MessageError:
    """What a caller hears of a failure: its name and text, in one line."""
    text = " ".join(str(error).split())[:200]
    return MessageError("unreachable", f"{type(error).__name__}{': ' if text else ''}{text}")


class Http:
    """Requests to one gateway.

    Args:
        url: of the gateway, `https://HOST:PORT`.
        context: of TLS, with the member's certificate and the world's root.
        connections: that may be open at once.
        tries: see TRIES.
        say: see Backoff.
    """

    def __init__(
        self,
        url: str,
        context: ssl.SSLContext,
        *,
        connections: int,
        tries: int = TRIES,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._url, self._context, self._connections, self._tries = url.rstrip("/"), context, connections, tries
        self._say = say
        self._session: aiohttp.ClientSession | None = None
        self.pace: Callable[[int], Awaitable[None]] = _at_once
        """Waits until so many bytes of a buffer may go."""
        self._users: Counter[aiohttp.ClientSession] = Counter()
        """Requests under way, by session: one that is used no more for new ones is closed after the last of them."""
        self.meter = Meter()
        """What has crossed, as this side counts it."""

    def backoff(self, tries: int | None = None) -> Backoff:
        """Pauses for a new thing to be attempted."""
        return Backoff(self._tries if tries is None else tries, self._say, meter=self.meter)

    async def use(self, context: ssl.SSLContext) -> None:
        """Make further connections by another certificate; requests under way end on those that they have."""
        self._context = context
        session, self._session = self._session, None
        if session is not None and not self._users[session]:
            await session.close()

    async def close(self) -> None:
        """Close all connections."""
        for session in {*self._users, self._session} - {None}:
            await session.close()  # type: ignore[union-attr]
        self._users.clear()
        self._session = None

    async def ask(self, method: str, message: Any, kind: type[M], *, most: int = MESSAGE_BYTES) -> M:
        """Send a message and read the one that answers it.

        Raises:
            MessageError: unreachable, as the other side refuses, or malformed.
        """
        return parsed(kind, await self.call("POST", method, packed(message), most=most), most_bytes=most)

    async def call(
        self, method: str, place: str, body: bytes = b"", *, most: int = MESSAGE_BYTES, tries: int | None = None
    ) -> bytes:
        """A small request, made again while the other side cannot be reached; 202 is asked again without end.

        Args:
            method: GET or POST.
            place: below /v1/.
            body: of the request.
            most: bytes of the answer.
            tries: see TRIES.

        Raises:
            MessageError: unreachable, or as the other side refuses.
        """
        again = self.backoff(tries)
        while True:
            try:
                status, found = await self._once(method, place, body, most)
                if status != 202:
                    return found
                again = self.backoff(tries)
            except aiohttp.ClientConnectorCertificateError as error:
                raise unreachable(error) from error  # it will not become another server by itself
            except Failures as error:
                await again.wait(error)
            except Later as error:
                await again.wait(error.refusal, at_least_s=error.seconds)

    async def put(self, place: str, view: memoryview, *, headers: dict[str, str], count: Callable[[int], None]) -> None:
        """Send a part of a buffer, once.

        Args:
            place: below /v1/.
            view: the part.
            headers: of the request.
            count: hears how many bytes are about to go.

        Raises:
            MessageError: as the other side refuses.
            ClientError, OSError, TimeoutError: it did not arrive.
        """
        async with asyncio.timeout(IDLE_S) as limit:

            async def body() -> AsyncIterator[memoryview]:
                for at in range(0, len(view), PIECE_BYTES):
                    piece = view[at : at + PIECE_BYTES]
                    await self.pace(len(piece))
                    _push_back(limit)
                    count(len(piece))
                    yield piece
                _push_back(limit)

            headers = {**headers, "Content-Length": str(len(view))}
            async with self._request("PUT", place, data=body(), headers=headers) as response:
                await _read(response, MESSAGE_BYTES)

    async def get_range(
        self, place: str, into: memoryview, begin: int, end: int, *, arrived: Callable[[int, int], None]
    ) -> None:
        """Get a part of a buffer, once.

        Args:
            place: below /v1/.
            into: the whole buffer.
            begin: of the part.
            end: of the part.
            arrived: hears how many bytes have come, and where in the buffer they end.

        Raises:
            MessageError: as the other side refuses, or wrong_size.
            ClientError, OSError, TimeoutError: it did not arrive.
        """
        headers, at = {"Range": f"bytes={begin}-{end - 1}"}, begin
        async with asyncio.timeout(IDLE_S) as limit, self._request("GET", place, headers=headers) as response:
            if response.status != 206:
                await _read(response, MESSAGE_BYTES)
                raise MessageError("malformed", f"got status {response.status} to a Range, expected 206")
            while piece := await response.content.readany():
                if at + len(piece) > end:
                    raise MessageError("wrong_size", f"got more than the {end - begin} bytes that were asked for")
                into[at : at + len(piece)] = piece
                at += len(piece)
                _push_back(limit)
                arrived(len(piece), at)
        if at != end:
            raise ConnectionResetError(f"the answer ended after {at - begin} of {end - begin} bytes")

    async def _once(self, method: str, place: str, body: bytes, most: int) -> tuple[int, bytes]:
        async with asyncio.timeout(IDLE_S), self._request(method, place, data=body or None) as response:
            self.meter.heard()
            return response.status, await _read(response, most)

    @asynccontextmanager
    async def _request(self, method: str, place: str, **options: Any) -> AsyncIterator[aiohttp.ClientResponse]:
        session = self._open()
        self._users[session] += 1
        try:
            url = f"{self._url}/v1/{place}"
            async with session.request(method, url, allow_redirects=False, **options) as response:
                yield response
        finally:
            self._users[session] -= 1
            if self._users[session] <= 0:
                del self._users[session]
                if session is not self._session:
                    await session.close()

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            # HTTPS_PROXY counts (trust_env): aiohttp asks such a proxy to CONNECT, and TLS goes through it.
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(ssl=self._context, limit=self._connections + 2),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=True,
                auto_decompress=False,
                read_bufsize=READ_BYTES,
                skip_auto_headers=("Accept-Encoding", "User-Agent", "Content-Type"),
            )
        return self._session


class Later(Exception):
    """The other side refuses for now."""

    def __init__(self, refusal: MessageError, seconds: float) -> None:
        super().__init__(str(refusal))
        self.refusal, self.seconds = refusal, seconds


async def _at_once(nbytes: int) -> None:
    """Any rate."""


def _push_back(limit: asyncio.Timeout) -> None:
    limit.reschedule(asyncio.get_running_loop().time() + IDLE_S)


async def _read(response: aiohttp.ClientResponse, most: int) -> bytes:
    """The body of an answer.

    Raises:
        MessageError: it is a refusal, or longer than `most`.
        Later: it is a refusal for now.
    """
    is_good = response.status in (200, 202, 204, 206)
    most = most if is_good else MESSAGE_BYTES
    if (response.content_length or 0) > most:
        raise MessageError("wrong_size", f"the answer has {response.content_length} bytes, expected at most {most}")
    body = b""
    while piece := await response.content.readany():
        body += piece
        if len(body) > most:
            raise MessageError("wrong_size", f"the answer has more than {most} bytes")
    if is_good:
        return body
    try:
        found = parsed(Refusal, body)
    except MessageError:  # not of a gateway: a proxy, or another server
        text = f"the answer is {response.status} {str(response.reason)[:80]}, and not of a gateway"
        found = Refusal(reason="unreachable", detail=text)
    refusal = MessageError(found.reason, found.detail)
    if response.status in (502, 503, 504, 507):
        after = response.headers.get("Retry-After", "")
        raise Later(refusal, float(after) if after.isdecimal() else 0.0)
    raise refusal
