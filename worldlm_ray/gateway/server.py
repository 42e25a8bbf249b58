"""The parent's side of a border: an HTTP server that speaks for one node.

    GET  /healthz  /v1/root      no certificate: that it lives; the world's root, which an invitation pins
    POST /v1/enrol  /v1/charter  no certificate, but an invitation
    POST /v1/METHOD              hello, charter, join, push, pull, done, left, heartbeat, renew, resign, probe
    GET  /v1/up/...   PUT ...    worldlm_ray/gateway/uploads.py
    GET  /v1/down/...            worldlm_ray/gateway/downloads.py

The member's path comes from its certificate, at every request anew, and never from a body. What a request may do
follows from that path alone. The server knows nothing of Ray: `Parent` is the node behind it.
"""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from aiohttp import ClientPayloadError, web
from aiohttp.http_exceptions import HttpProcessingError

import worldlm_ray
from worldlm_ray.errors import MessageError, NamedError, WorldLMError
from worldlm_ray.exchange.limits import LARGEST_COUNT, shown
from worldlm_ray.gateway import probe, wire
from worldlm_ray.gateway.alarms import Alarms
from worldlm_ray.gateway.calls import POLL_S, Calls, Parent
from worldlm_ray.gateway.connections import Connection, ConnectionLimits, Connections
from worldlm_ray.gateway.downloads import Downloads
from worldlm_ray.gateway.receipts import Evidence, Receipts
from worldlm_ray.gateway.requests import PIECE_BYTES, RETRY_S, Member, answer, connection_of, read, read_raw, refused
from worldlm_ray.gateway.seals import WorldSeal
from worldlm_ray.gateway.staging import Name, Staging
from worldlm_ray.gateway.traffic import DayIsOver, Traffic
from worldlm_ray.gateway.uploads import Uploads

LOG = logging.getLogger(__name__)
HANDSHAKE_S = 10.0
"""For the TLS handshake, and for all of a stranger's request."""
THREADS = 2
"""That hash."""
READ_BYTES = 4 * PIECE_BYTES
"""Of a body, that may wait in memory."""

_UP = re.compile(r"/v1/up/(\d{1,16})/(\d{1,16})/([\w.-]{1,64})(?:/(\d{1,7}))?", re.ASCII)
_DOWN = re.compile(r"/v1/down/([0-9a-f]{64})(/leaves)?")


class Authority(Protocol):
    """Who may come, and who gets a certificate. A method raises WorldLMError with a `reason` where it refuses."""

    def authorise(self, certificate: bytes) -> str:
        """The path of a certificate's member, as things are now. It is asked at every request, and often beside."""
        ...

    def enrol(self, request: bytes, invitation: str, proof: bytes) -> Any:
        """A certificate for a stranger with an invitation: an object with `path` and `chain_pem`."""
        ...

    def check_invited(self, invitation: str, proof: bytes) -> None:
        """Refuse a stranger without an invitation."""
        ...

    def renew(self, certificate: bytes, request: bytes) -> bytes:
        """A new certificate for a member, with its chain, as PEM."""
        ...

    def resign(self, path: str) -> None:
        """Let a member in no more: it has asked for that."""
        ...


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a gateway works."""

    sizes: wire.Sizes
    hello: wire.Hello
    """What the parent's side has; a member must have it alike."""
    staging_dir: Path
    staging_bytes: int
    """Of all staged updates together."""
    connections: int = 4
    """That a member may use at once for leaves."""
    limits: ConnectionLimits = field(default_factory=ConnectionLimits)
    poll_s: float = POLL_S
    world: str = ""
    """The world's id."""
    run: str = ""
    """Id of the run."""
    root_pem: bytes = b""
    """The certificate of the world's root."""
    charter: bytes = b""
    """The world's charter, signed."""


class Gateway:
    """A border's server.

    Args:
        parent: the node that it speaks for.
        authority: who may come.
        settings: how it works.
        seal: signs verdicts, and checks members' signatures; nothing is signed without.
        receipts: keep what is signed.
        traffic: limits what crosses.
        warn: hears of a member's path and of what the world's operator should know about it.
    """

    def __init__(
        self,
        parent: Parent,
        authority: Authority,
        settings: Settings,
        *,
        seal: WorldSeal | None = None,
        receipts: Receipts | None = None,
        traffic: Traffic | None = None,
        warn: Callable[[str, str], None] = lambda path, text: None,
    ) -> None:
        self._authority, self._settings = authority, settings
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="gateway")
        self._staging = Staging(settings.staging_dir, most_bytes=settings.staging_bytes)
        traffic, self._alarms = traffic or Traffic(), Alarms(warn)
        self._uploads = Uploads(self._staging, settings.sizes, self._threads, traffic)
        self._downloads = Downloads(settings.sizes.leaf, self._threads, traffic)
        evidence = Evidence(world=settings.world, run=settings.run, seal=seal, receipts=receipts)
        self._calls = Calls(
            parent, self._uploads, self._downloads, settings.sizes, evidence=evidence, poll_s=settings.poll_s
        )
        self._methods: dict[str, Callable[[web.BaseRequest, Member], Awaitable[Any]]] = {
            name: getattr(self._calls, name) for name in ("push", "pull", "done", "left", "heartbeat")
        } | {
            "join": self._join,
            "hello": self._hello,
            "renew": self._renew,
            "resign": self._resign,
            "charter": self._charter,
            "probe": probe.echo,
        }
        self.connections = Connections(settings.limits, authority.authorise, self._alarms)
        self.members: dict[str, Member] = {}
        """That have called, by path."""
        self.refusals: Counter[str] = Counter()
        """Of strangers, by name."""
        self._listener: asyncio.Server | None = None
        self._watch: asyncio.Task[None] | None = None
        self._web: web.Server | None = None

    # ---- life --------------------------------------------------------------------------------------------------

    async def start(self, context: ssl.SSLContext, *, host: str = "0.0.0.0", port: int = 8443) -> int:
        """Listen.

        Args:
            context: of TLS, with certificates of clients optional: a stranger may enrol.
            host: to bind.
            port: to bind; 0 for one that is free.

        Returns:
            The port.

        Raises:
            OSError: it cannot listen there.
        """
        loop, limits = asyncio.get_running_loop(), self._settings.limits
        self._web = web.Server(self._handle, handler_cancellation=True)
        options = {
            "loop": loop,
            "access_log": None,
            "logger": LOG,
            "read_bufsize": READ_BYTES,
            "keepalive_timeout": limits.idle_s,
            "lingering_time": min(2.0, limits.head_s),
            "auto_decompress": False,
        }
        server = self._web
        self._listener = await loop.create_server(
            lambda: Connection(self.connections, server, **options),
            host,
            port,
            ssl=context,
            ssl_handshake_timeout=min(HANDSHAKE_S, limits.head_s),
            ssl_shutdown_timeout=1.0,
            backlog=128,
        )
        self._watch = loop.create_task(self.connections.watch())
        found: int = self._listener.sockets[0].getsockname()[1]
        return found

    async def stop(self) -> None:
        """Close all connections; what is staged stays for the next process."""
        if self._listener is not None:
            self._listener.close()
        if self._watch is not None:
            self._watch.cancel()
        self._calls.close()
        if self._web is not None:
            await self._web.shutdown(timeout=0.5)
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._staging.close()

    # ---- requests ----------------------------------------------------------------------------------------------

    async def _handle(self, request: web.BaseRequest) -> Any:
        member: Member | None = None
        after_s: float = RETRY_S
        with connection_of(request).handling():
            try:
                if request.path == "/healthz" and request.method == "GET":
                    return web.Response(text=f"worldlm_ray {worldlm_ray.__version__}, protocol {wire.PROTOCOL}\n")
                if connection_of(request).certificate is None:
                    return await self._enrol(request)
                member = self._member(request)
                return await self._route(request, member)
            except NamedError as error:
                reason, detail = error.reason, error.detail
                after_s = error.after_s if isinstance(error, DayIsOver) else RETRY_S
            except WorldLMError as error:
                reason, detail = "not_allowed", str(error)
            except (ConnectionError, ClientPayloadError, HttpProcessingError) as error:
                reason, detail = "malformed", f"the body did not come ({type(error).__name__})"
            except Exception as error:
                LOG.exception("a request failed")
                reason, detail = "failed", f"the gateway failed ({type(error).__name__}); its log says where"
        (self.refusals if member is None else member.meter.refusals)[reason] += 1
        is_stranger = connection_of(request).certificate is None and reason == "not_allowed"
        if member is not None:
            self._alarms.refused(member.path, reason, detail)
        return refused(reason, detail, status=401 if is_stranger else None, retry_s=after_s)

    def _member(self, request: web.BaseRequest) -> Member:
        path = self._authority.authorise(connection_of(request).certificate or b"")
        if path not in self.members:
            self.members[path] = Member(path)
        member = self.members[path]
        member.certificate = connection_of(request).certificate or b""
        member.meter.heard()
        return member

    async def _route(self, request: web.BaseRequest, member: Member) -> Any:
        method, path = request.method, request.path
        if method == "POST" and path.startswith("/v1/") and (call := self._methods.get(path[4:])):
            found = await call(request, member)
            member.answers[path[4:]] += 1
            return found
        if method in ("GET", "PUT") and (match := _UP.fullmatch(path)):
            self._calls.alive(member)
            name = Name(_count(match[1]), _count(match[2]), match[3])
            if method == "PUT" and match[4]:
                return await self._uploads.take(request, member, name, int(match[4]))
            if method == "GET" and not match[4]:
                return await self._uploads.there(member, name)
        if method == "GET" and (match := _DOWN.fullmatch(path)):
            self._calls.alive(member)
            digest = bytes.fromhex(match[1])
            return await (self._downloads.leaves(digest) if match[2] else self._downloads.give(request, member, digest))
        raise MessageError("unknown_request", f"there is no {method[:16]} {path[:80]}")

    async def _enrol(self, request: web.BaseRequest) -> web.Response:
        if (request.method, request.path) == ("GET", "/v1/root"):
            return web.Response(body=self._settings.root_pem)
        if (request.method, request.path) == ("POST", "/v1/charter"):
            invited = wire.parsed(wire.Invited, await self._from_stranger(request), most_bytes=wire.ENROL_BYTES)
            check = partial(self._authority.check_invited, invited.invitation, invited.proof)
            await asyncio.get_running_loop().run_in_executor(self._threads, check)
            return web.Response(body=self._settings.charter)
        if (request.method, request.path) != ("POST", "/v1/enrol"):
            raise MessageError("not_allowed", "a request without a certificate of this world may only enrol")
        asked = wire.parsed(wire.Enrol, await self._from_stranger(request), most_bytes=wire.ENROL_BYTES)
        fields = (asked.request, asked.invitation, asked.proof)
        found = await asyncio.get_running_loop().run_in_executor(self._threads, self._authority.enrol, *fields)
        return answer(wire.Enrolled(path=found.path, chain=found.chain_pem))

    async def _from_stranger(self, request: web.BaseRequest) -> bytes:
        try:
            async with asyncio.timeout(HANDSHAKE_S):
                return await read_raw(request, most=wire.ENROL_BYTES)
        except TimeoutError as error:
            raise MessageError("malformed", f"the body did not come within {HANDSHAKE_S:.0f} s") from error

    async def _renew(self, request: web.BaseRequest, member: Member) -> web.Response:
        asked = await read(request, wire.Renew, most=wire.ENROL_BYTES)
        fields = (connection_of(request).certificate or b"", asked.request)
        chain = await asyncio.get_running_loop().run_in_executor(self._threads, self._authority.renew, *fields)
        return answer(wire.Enrolled(path=member.path, chain=chain))

    async def _resign(self, request: web.BaseRequest, member: Member) -> web.Response:
        await read_raw(request, most=0)
        await asyncio.get_running_loop().run_in_executor(self._threads, self._authority.resign, member.path)
        return answer()

    async def _charter(self, request: web.BaseRequest, member: Member) -> web.Response:
        await read_raw(request, most=0)
        return web.Response(body=self._settings.charter)

    async def _join(self, request: web.BaseRequest, member: Member) -> web.Response:
        before = member.joined
        found = await self._calls.join(request, member)
        assert member.joined is not None, "it has joined"
        self._alarms.joined(member.path, None if before is None else before[0], member.joined[0])
        return found

    async def _hello(self, request: web.BaseRequest, member: Member) -> web.Response:
        """Speak the same protocol; what else must be alike the member finds in the charter.

        Raises:
            MessageError: wrong_protocol, wrong_schema or wrong_layout.
        """
        theirs, ours = await read(request, wire.Hello), self._settings.hello
        for name in ("protocol", "schema", "layout"):
            got, expected = getattr(theirs, name), getattr(ours, name)
            if got != expected:
                text = f"got {name} {shown(got)} of {member.path}, expected {shown(expected)}"
                raise MessageError(f"wrong_{name}", f"{text}: have it alike on both sides")
        terms = wire.Terms(
            path=member.path,
            now_s=time.time(),
            leaf_bytes=self._settings.sizes.leaf,
            connections=self._settings.connections,
            codecs=self._settings.sizes.codecs,
            charter=self._settings.charter,
            run=self._settings.run,
            software=f"worldlm_ray {worldlm_ray.__version__}",
        )
        return answer(terms)


def _count(digits: str) -> int:
    value = int(digits)
    if value > LARGEST_COUNT:
        raise MessageError("malformed", f"a number is {shown(value)}, expected at most {LARGEST_COUNT}")
    return value
