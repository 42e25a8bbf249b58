"""Connections of a gateway: who they belong to, how many there may be, and when one is closed.

aiohttp closes a connection that is idle between two requests. What it does not see is here:

    a head that does not end           closed `head_s` after its first byte
    silence after the handshake        closed after `head_s`
    a body, or an answer's reader,     closed when less than LEAST_BYTES have moved within `idle_s`
    that does not get on
    a member that was revoked          closed at the next look, also in the middle of a transfer
    too many connections               of a member, the one that has been silent for longest is closed: its process may
                                       have begun again, and the line never said so; of strangers, the newest

A transfer may take as long as it gets on. (A peer that does not finish the TLS handshake is the event loop's matter.)
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from aiohttp.web_protocol import RequestHandler
from aiohttp.web_server import Server

from worldlm_ray.errors import WorldLMError

LEAST_BYTES = 65_536
"""That a transfer moves within `idle_s`: a tenth of what a line of 100 kbit/s does in a minute."""


@dataclass(frozen=True, kw_only=True)
class ConnectionLimits:
    """How long connections may be silent, and how many there may be."""

    head_s: float = 10.0
    """From the first byte of a request's head to its last; from the handshake to the first byte."""
    idle_s: float = 60.0
    """Between two requests, or between two looks at a transfer."""
    look_s: float = 0.5
    """Between two looks at all connections."""
    of_member: int = 8
    strangers: int = 64
    """Without a certificate, in all."""
    strangers_of_address: int = 8


class Connection(RequestHandler):
    """One connection after its handshake.

    Args:
        table: of all connections.
        server: aiohttp's.
        options: see RequestHandler.
    """

    def __init__(self, table: Connections, server: Server, **options: Any) -> None:
        super().__init__(server, **options)
        self._table = table
        self.certificate: bytes | None = None
        """The peer's, in DER; None of a stranger."""
        self.address = ""
        self.moved = 0
        """Bytes of a transfer since `since_s`."""
        self.since_s: float | None = None
        """Since when the state has been the one that it is: waiting, in a head, in a transfer; None while handling."""
        self.state = "silent"
        self.heard_s = 0.0
        """When its newest bytes came."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The handshake is over."""
        super().connection_made(transport)
        peer = transport.get_extra_info("ssl_object")
        self.certificate = None if peer is None else peer.getpeercert(binary_form=True)
        self.address = str((transport.get_extra_info("peername") or ("",))[0])
        self._enter("silent")
        self._table.add(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        """The connection is gone."""
        self._table.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of a head, or of a body."""
        self.heard_s = self._loop.time()
        if data and self.state in ("silent", "idle"):
            self._enter("head")
        super().data_received(data)

    @contextmanager
    def handling(self) -> Iterator[None]:
        """A request's head is there; until its answer is."""
        self._enter("handling")
        try:
            yield
        finally:
            self._enter("idle")

    @contextmanager
    def transfer(self) -> Iterator[None]:
        """Bytes are to move: `moved` counts them."""
        self._enter("transfer")
        try:
            yield
        finally:
            self._enter("handling")

    def close_reason(self, limits: ConnectionLimits, now_s: float) -> str:
        """Why the connection is to be closed now; empty if it is not."""
        assert self.since_s is not None
        past_s = now_s - self.since_s
        if self.state in ("silent", "head"):
            return "no request" if past_s >= limits.head_s else ""
        if self.state == "idle":
            return "idle" if past_s >= limits.idle_s else ""
        if self.state == "transfer" and past_s >= limits.idle_s:
            if self.moved < LEAST_BYTES:
                return "a transfer does not get on"
            self._enter("transfer")
        return ""

    def abort(self) -> None:
        """Close at once, whatever is on its way."""
        if self.transport is not None:
            self.transport.abort()

    def _enter(self, state: str) -> None:
        self.state, self.since_s, self.moved = state, asyncio.get_running_loop().time(), 0


class Alarms(Protocol):
    """Looks at all connections."""

    def look(self, connections: Iterable[Connection], path_of: Callable[[bytes], str], now_s: float) -> None:
        """Look at them; those of certificates that are refused are gone."""
        ...


class Connections:
    """All connections of a gateway.

    Args:
        limits: of all of them.
        authorise: gives the path of a certificate's member, or raises; it is asked often, so it must be quick.
        alarms: look at all connections, too.
    """

    def __init__(self, limits: ConnectionLimits, authorise: Callable[[bytes], str], alarms: Alarms) -> None:
        self._limits, self._authorise, self._alarms = limits, authorise, alarms
        self._all: set[Connection] = set()
        self.closed: Counter[str] = Counter()
        """By the reason for which they were closed."""

    def __len__(self) -> int:
        return len(self._all)

    def add(self, connection: Connection) -> None:
        """A handshake is over."""
        connection.heard_s = asyncio.get_running_loop().time()
        self._all.add(connection)
        if (extra := self._one_too_many(connection)) is not None:
            self._close(extra, "too many connections")

    def remove(self, connection: Connection) -> None:
        """A connection is gone."""
        self._all.discard(connection)

    async def watch(self) -> None:
        """Look at all connections now and then, for as long as the gateway lives."""
        while True:
            self.look()
            await asyncio.sleep(self._limits.look_s)

    def look(self) -> None:
        """Close what is to be closed."""
        now_s, refused = asyncio.get_running_loop().time(), self._refused()
        for connection in list(self._all):
            reason = connection.close_reason(self._limits, now_s)
            if connection.certificate in refused:
                reason = "not allowed any more"
            if reason:
                self._close(connection, reason)
        self._alarms.look(self._all, self._authorise, now_s)

    def _refused(self) -> set[bytes | None]:
        """Certificates that are not allowed any more."""
        refused: set[bytes | None] = set()
        for certificate in {each.certificate for each in self._all} - {None}:
            try:
                self._authorise(certificate)  # type: ignore[arg-type]
            except WorldLMError:
                refused.add(certificate)
        return refused

    def _one_too_many(self, connection: Connection) -> Connection | None:
        """The connection that must go for a new one; None if there is room."""
        limits, certificate = self._limits, connection.certificate
        alike = [each for each in self._all if each.certificate == certificate]
        if certificate is not None:
            return min(alike, key=lambda each: each.heard_s) if len(alike) > limits.of_member else None
        near = sum(each.address == connection.address for each in alike)
        return connection if len(alike) > limits.strangers or near > limits.strangers_of_address else None

    def _close(self, connection: Connection, reason: str) -> None:
        self.closed[reason] += 1
        connection.abort()
        self._all.discard(connection)
