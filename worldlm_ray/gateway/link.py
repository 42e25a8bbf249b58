"""A member's side of a border: an object with the parent's methods, behind which the parent is far away.

A federation or a client calls it as it would call its parent. Everything that keeps it from its parent becomes
`MessageError("unreachable", ...)`: the caller joins again and sends what is in its outbox, as after any loss
(worldlm_ray/protocol/child.py). A call may reach the parent twice; the update's `seq` makes it count once.

Memory: the update is sent from the buffer that it lies in, and a model arrives in the buffer that is handed on.
"""

from __future__ import annotations

import ssl
import weakref
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import worldlm_ray
from worldlm_ray.errors import MessageError, Refused
from worldlm_ray.exchange.messages import Packed, read_header
from worldlm_ray.exchange.replies import Verdict, Welcome
from worldlm_ray.gateway import wire
from worldlm_ray.gateway.http import TRIES, Http, checking
from worldlm_ray.gateway.receipts import Receipts
from worldlm_ray.gateway.seals import MemberSeal
from worldlm_ray.gateway.transfer import Transfer

CONNECTIONS = 4
"""For leaves; small requests have two more."""
THREADS = 2
"""That hash."""
TRIES_OF_PULL = 3
"""A model of which the parent has a newer one meanwhile is asked for again so often."""


@dataclass(frozen=True, kw_only=True)
class LinkSettings:
    """How a link works."""

    url: str
    """Of the gateway, `https://HOST:PORT`."""
    path: str
    """The member's."""
    sizes: wire.Sizes
    hello: wire.Hello
    """What this side has; the parent's side must have it alike."""
    world: str = ""
    """The world's id."""
    connections: int = CONNECTIONS
    tries: int = TRIES


class Link:
    """The parent, as its child over a border sees it.

    Args:
        settings: how it works.
        context: of TLS.
        seal: signs pushes, and checks verdicts; nothing is signed without.
        receipts: keep what is signed.
        say: hears why the other side makes this one wait for hours.
        check_server: refuses a server by its certificate (DER), beside what TLS checks.
        check_charter: refuses a world by its signed charter, whenever the two sides meet.
    """

    def __init__(
        self,
        settings: LinkSettings,
        context: ssl.SSLContext,
        *,
        seal: MemberSeal | None = None,
        receipts: Receipts | None = None,
        say: Callable[[str], None] = lambda text: None,
        check_server: Callable[[bytes], None] = lambda certificate: None,
        check_charter: Callable[[bytes], None] = lambda charter: None,
    ) -> None:
        self._settings, self._seal, self._receipts = settings, seal, receipts
        self._check_charter = check_charter
        self._check_server = check_server
        context = checking(context, check_server)
        self._http = Http(settings.url, context, connections=settings.connections, tries=settings.tries, say=say)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="link")
        self.transfer = Transfer(self._http, self._threads, connections=settings.connections)
        self.terms: wire.Terms | None = None
        """What the parent's side has answered to the newest hello."""
        self._last: tuple[bytes, Callable[[], Any]] | None = None
        """Digest of the newest model, and the way to its buffer if the caller still has it."""

    def limit(self, pace: Callable[[int], Awaitable[None]]) -> None:
        """Have updates go no faster than this lets their bytes pass."""
        self._http.pace = pace

    async def use(self, context: ssl.SSLContext) -> None:
        """Go on by another certificate."""
        await self._http.use(checking(context, self._check_server))

    async def close(self) -> None:
        """Close all connections."""
        await self._http.close()
        self._threads.shutdown(wait=True, cancel_futures=True)

    # ---- the parent's methods ----------------------------------------------------------------------------------

    async def join(self, child: str, incarnation: int, seq: int) -> Welcome:
        """See calls.Parent.

        Raises:
            MessageError: unreachable, or as the parent refuses.
        """
        await self.greet()
        found = await self._http.ask("join", wire.Join(incarnation=incarnation, seq=seq), wire.Joined)
        return Welcome(**vars(found))

    async def push(self, sender: str, incarnation: int, to: int, header: bytes, values: Any) -> Verdict:
        """See calls.Parent.

        Raises:
            MessageError: unreachable, or as the parent refuses.
        """
        fields = read_header(header, most_bytes=len(header))
        codec, seq = fields.get("codec", "fp32"), fields.get("seq", 0)
        leaves, view = self._settings.sizes.update(codec), memoryview(values).cast("B")
        if len(view) != leaves.size:
            raise MessageError("wrong_shape", f"an update of {len(view)} bytes, expected {leaves.size}")
        place = f"up/{incarnation}/{seq}/{codec}"
        for left in reversed(range(TRIES_OF_PULL)):
            digest = await self.transfer.send(place, view, leaves)
            run = (self.terms or await self.greet()).run
            message = wire.Push(
                incarnation=incarnation, to=to, seq=seq, codec=codec, digest=digest, header=header, run=run
            )
            try:
                return await self._judged(message)
            except MessageError as error:  # gone: the other side has lost what was staged
                if error.reason not in ("gone", "wrong_digest") or not left:
                    raise
        raise AssertionError("the last attempt raises")

    async def pull(self, child: str, incarnation: int, to: int, started_tokens: int) -> Packed:
        """See calls.Parent; the values are read-only.

        Raises:
            MessageError: unreachable, or as the parent refuses.
        """
        message = wire.Pull(incarnation=incarnation, to=to, started_tokens=started_tokens)
        leaves, got, there = self._settings.sizes.model, b"", set[int]()
        values: Any = None
        for left in reversed(range(TRIES_OF_PULL)):
            found = await self._http.ask("pull", message, wire.Served, most=self._settings.sizes.message_bytes)
            if found.size != leaves.size:
                raise MessageError("wrong_shape", f"got a model of {found.size} bytes, expected {leaves.size}")
            held = self._held(found.digest)
            if held is not None:
                return Packed(found.header, held)
            if values is None:
                values = np.empty(leaves.size // 4, np.float32)
            if found.digest != got:
                got, there = found.digest, set()
            try:
                await self.transfer.fetch(found.digest, leaves, memoryview(values).cast("B"), there)
            except MessageError as error:  # gone: there is a newer one
                if error.reason != "gone" or not left:
                    raise
            else:
                values.setflags(write=False)
                self.hold(found.digest, values)
                return Packed(found.header, values)
        raise AssertionError("the last attempt raises")

    async def done(self, child: str, incarnation: int, to: int) -> None:
        """See calls.Parent."""
        await self._http.call("POST", "done", wire.packed(wire.Call(incarnation=incarnation, to=to)))

    async def left(self, child: str, incarnation: int, to: int) -> bool:
        """See calls.Parent."""
        return (await self._http.ask("left", wire.Call(incarnation=incarnation, to=to), wire.Left)).may_end

    async def heartbeat(self, child: str, incarnation: int, to: int) -> None:
        """See calls.Parent; it is not made again, since the next one comes soon."""
        await self._http.call("POST", "heartbeat", wire.packed(wire.Call(incarnation=incarnation, to=to)), tries=1)

    # ---- what else a member asks -------------------------------------------------------------------------------

    async def greet(self) -> wire.Terms:
        """Compare what both sides must have alike, and look at the charter.

        Raises:
            MessageError: unreachable, not_allowed; wrong_layout and the like.
            Refused: by `check_charter`.
        """
        terms = await self._http.ask("hello", self._settings.hello, wire.Terms)
        if terms.path != self._settings.path:
            text = f"the certificate is one of {terms.path}, expected {self._settings.path}: join by another invitation"
            raise MessageError("not_allowed", text)
        if terms.leaf_bytes != self._settings.sizes.leaf:
            text = f"got leaves of {terms.leaf_bytes} bytes, expected {self._settings.sizes.leaf}"
            raise MessageError("wrong_protocol", text)
        self.terms = terms
        self._check_charter(terms.charter)
        return terms

    async def renew(self, request: bytes) -> wire.Enrolled:
        """Ask for a new certificate, by a certificate signing request of a new key.

        Raises:
            MessageError: unreachable, or as the other side refuses.
        """
        return await self._http.ask("renew", wire.Renew(request=request), wire.Enrolled)

    async def resign(self) -> None:
        """Have the world let this member in no more.

        Raises:
            MessageError: unreachable, or as the other side refuses.
        """
        await self._http.call("POST", "resign")

    def hold(self, digest: bytes, values: Any) -> None:
        """The newest model lies in this buffer, for as long as its owner keeps it: it need not come again.

        Args:
            digest: of the model.
            values: the buffer, or the same values in shared memory.
        """
        self._last = (digest, weakref.ref(values))

    @property
    def last_digest(self) -> bytes:
        """Of the newest model; empty before the first."""
        return b"" if self._last is None else self._last[0]

    def _held(self, digest: bytes) -> Any:
        return self._last[1]() if self._last is not None and self._last[0] == digest else None

    async def _judged(self, message: wire.Push) -> Verdict:
        """Send a push whose leaves are staged."""
        path = self._settings.path
        manifest = message.manifest(self._settings.world, path)
        if self._seal is not None:
            message = replace(message, signature=self._seal.sign(manifest), chain=self._seal.chain)
            if self._receipts is not None:
                await self._receipts.pushed(path, manifest, message.signature, message.chain)
        found = await self._http.ask("push", message, wire.Judged)
        if self._seal is not None:
            try:
                self._seal.verify(found.chain, found.signature, wire.receipt(manifest, found.verdict))
            except Refused as error:
                raise MessageError(error.reason, f"the verdict on update {message.seq}: {error.detail}") from error
            if self._receipts is not None:
                await self._receipts.judged(path, manifest, found)
        verdict = wire.parsed_verdict(found.verdict)
        self.transfer.meter.judged(verdict)
        return verdict


async def root_of(url: str, context: ssl.SSLContext) -> bytes:
    """The certificate of the world's root, PEM: not to be believed before an invitation has been held against it.

    Args:
        url: of the gateway.
        context: of TLS, which checks nothing yet.

    Raises:
        MessageError: unreachable, or as the other side refuses.
    """
    http = Http(url, context, connections=1)
    try:
        return await http.call("GET", "root", most=wire.ENROL_BYTES)
    finally:
        await http.close()


async def enrol(url: str, context: ssl.SSLContext, message: wire.Enrol) -> wire.Enrolled:
    """Ask for the first certificate.

    Args:
        url: of the gateway.
        context: of TLS, with the world's root and no certificate.
        message: the request, and the proof of an invitation.

    Raises:
        MessageError: unreachable, or as the other side refuses.
    """
    http = Http(url, context, connections=1)
    try:
        return await http.ask("enrol", message, wire.Enrolled)
    finally:
        await http.close()


async def charter(url: str, context: ssl.SSLContext, message: wire.Invited) -> bytes:
    """Ask for the world's charter, signed, before enrolling; the other arguments are those of `enrol`.

    Raises:
        MessageError: unreachable, or as the other side refuses.
    """
    http = Http(url, context, connections=1)
    try:
        return await http.call("POST", "charter", wire.packed(message), most=wire.CHARTER_BYTES)
    finally:
        await http.close()


def hello_of(sizes: wire.Sizes) -> wire.Hello:
    """What a side has.

    Args:
        sizes: of what may come.
    """
    return wire.Hello(layout=sizes.layout.hash, software=f"worldlm_ray {worldlm_ray.__version__}")
