"""A member's link with its policy in front: nothing crosses that the guard has not looked at.

What may not be sent stays with the caller. A call that is refused, or cut off because the link is shut meanwhile,
raises `MessageError("unreachable", ...)`, as if the parent were away: the caller joins again, and `join` waits until
the link is open. Meanwhile a federation's clients go on, and their work gathers in its model.

A model that is refused is replaced by one of nan alone, under the parent's header without its residuals. Every child
refuses it and goes on with its own model (worldlm_ray/exchange/parent.py), and yet hears what else the parent says.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

import msgpack
import numpy as np

from worldlm_ray.errors import GatewayError, MessageError, Refused, detail_of
from worldlm_ray.exchange.messages import Packed, read_header
from worldlm_ray.exchange.replies import Verdict, Welcome
from worldlm_ray.gateway.guard import Guard
from worldlm_ray.gateway.link import Link
from worldlm_ray.gateway.pace import Pace

LOOK_S = 0.5
"""Between two looks at what the operator says."""
AGAIN_S = 0.5
"""Between two questions whether the member may end."""
REFUSED = b"refused"
"""In place of a digest: of the model that stands for every refused one."""

T = TypeVar("T")


class GuardedLink:
    """The parent, as its child sees it through a member's policy. The methods are those of `Link`.

    Args:
        link: to the world.
        guard: the policy.
        tell: hears an event (`waiting`, `training`, `warning`) and a line for the operator.
    """

    def __init__(self, link: Link, guard: Guard, *, tell: Callable[[str, str], None]) -> None:
        self.link, self.guard, self._tell = link, guard, tell
        self._before: Any = None
        """The newest model that was handed on."""
        self.last_digest = b""
        """Of what the newest pull has brought."""
        self._calls: set[asyncio.Task[Any]] = set()
        self._said = self._warned = ""
        self._watch: asyncio.Task[None] | None = None
        link.limit(Pace(lambda: guard.policy.send.rate_mbps))

    # ---- the parent's methods ----------------------------------------------------------------------------------

    async def join(self, child: str, incarnation: int, seq: int) -> Welcome:
        """See Link; waits while the link is shut."""
        if self._watch is None:
            self._watch = asyncio.create_task(self._look())
        while reason := self.guard.shut():
            self._say(reason)
            await asyncio.sleep(LOOK_S)
        self._log("join")
        welcome = await self._while_open(self.link.join(child, incarnation, seq))
        self._say("")  # not before: a charter that does not fit is met each time
        return welcome

    async def push(self, sender: str, incarnation: int, to: int, header: bytes, values: Any) -> Verdict:
        """See Link; the header is what the policy leaves of it."""
        size, before = values.nbytes, self.link.transfer.meter.up.bytes
        try:
            header = self.guard.update(header, size)
        except GatewayError as error:
            raise self._kept(error) from error
        try:
            return await self._while_open(self.link.push(sender, incarnation, to, header, values))
        finally:
            if (again := self.link.transfer.meter.up.bytes - before - size) > 0:
                self._log("sent again", nbytes=again)

    async def pull(self, child: str, incarnation: int, to: int, started_tokens: int) -> Packed:
        """See Link; a model that the policy refuses is replaced."""
        started = self.guard.policy.allowed({"started_tokens": started_tokens})["started_tokens"]
        self._log("pull", started_tokens=started)
        found = await self._while_open(self.link.pull(child, incarnation, to, started))
        loop, before = asyncio.get_running_loop(), self._before
        known = self.link.last_digest == self.last_digest and before is not None
        problem = "" if known else await loop.run_in_executor(None, self.guard.model_problem, found.values, before)
        if problem:
            found = self._replaced(found, problem)
        else:
            self.last_digest, self._before, self._warned = self.link.last_digest, found.values, ""
        return Packed(_finished(found.header), found.values) if self.guard.is_leaving else found

    async def done(self, child: str, incarnation: int, to: int) -> None:
        """See Link; a member that leaves says so instead, once the world's checkpoints know its work."""
        if not self.guard.is_leaving:
            self._log("done")
            return await self._while_open(self.link.done(child, incarnation, to))
        self._log("leave")
        while not await self._while_open(self.link.left(child, incarnation, to)):
            await asyncio.sleep(AGAIN_S)
        self.guard.has_left()
        self._tell("finished", "the world knows that this member has left")
        try:
            await self.link.resign()
        except MessageError as error:  # the certificate is good until it ends, and no run uses it
            self._tell("warning", f"the world's operator may revoke this member: {error.detail}")
        return None

    async def left(self, child: str, incarnation: int, to: int) -> bool:
        """See Link."""
        self._log("left")
        return await self._while_open(self.link.left(child, incarnation, to))

    async def heartbeat(self, child: str, incarnation: int, to: int) -> None:
        """See Link."""
        if reason := self.guard.shut():
            raise MessageError("unreachable", reason)
        self.guard.sent.beat()
        await self._while_open(self.link.heartbeat(child, incarnation, to))

    # ---- what else a member does -------------------------------------------------------------------------------

    async def greet(self) -> None:
        """Compare what both sides must have alike, and the charter with the policy.

        Raises:
            GatewayError: the policy refuses, or the two sides differ.
            MessageError: unreachable: the world, or the link is shut; or as the world refuses.
        """
        self.guard.begin()
        if reason := self.guard.shut():
            raise MessageError("unreachable", reason)
        self._log("hello")
        try:
            await self.link.greet()
        except Refused as error:
            if error.reason != "charter_waits":
                raise
            raise MessageError("unreachable", error.detail) from error

    def hold(self, digest: bytes, values: Any) -> None:
        """See Link: the newest model lies in this buffer."""
        if digest == self.link.last_digest:
            self.link.hold(digest, values)
            self._before = values

    async def close(self) -> None:
        """Look no more; the link is the caller's to close."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)

    @property
    def said(self) -> str:
        """Why nothing has crossed since the last join, as the operator was told; empty if this side keeps nothing."""
        return self._said

    # ---- shut or open ------------------------------------------------------------------------------------------

    async def _look(self) -> None:
        """Cut off what is under way once the link is shut, and leave in time."""
        while True:
            with suppress(GatewayError):  # of storage: looked at again
                if self.guard.leave_if_over():
                    self._tell("warning", "the day of stop.after is over: the member leaves")
            if self._calls and (reason := self.guard.shut()):
                self._say(reason)
                for call in list(self._calls):
                    call.cancel()
            await asyncio.sleep(LOOK_S)

    async def _while_open(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of a call that ends when the link is shut.

        Raises:
            MessageError: unreachable: it was cut off; or as the call raises.
        """
        call = asyncio.ensure_future(work)
        self._calls.add(call)
        try:
            return await call
        except asyncio.CancelledError:
            call.cancel()
            me = asyncio.current_task()
            if me is None or me.cancelling():
                raise
            raise MessageError("unreachable", self._said) from None
        except GatewayError as error:
            raise self._kept(error) from error
        finally:
            self._calls.discard(call)

    def _kept(self, error: GatewayError) -> MessageError:
        """What the caller hears of a refusal by this side: try again later."""
        reason = detail_of(error)
        self._say(reason)
        return MessageError("unreachable", reason)

    def _say(self, reason: str) -> None:
        """One line for the operator, when the reason is another one than before."""
        if reason != self._said:
            self._said = reason
            self._tell(*(("waiting", reason) if reason else ("training", "the link is open again")))

    def _log(self, request: str, **facts: Any) -> None:
        try:
            self.guard.sent.add(self.guard.now_s(), request, **facts)
        except GatewayError as error:
            raise self._kept(error) from error

    def _replaced(self, found: Packed, problem: str) -> Packed:
        if not self._warned:  # the first of several
            self._warned = problem
            self._tell("warning", f"a model of the world is refused: {problem}")
        self.last_digest = REFUSED
        fields = read_header(found.header, most_bytes=len(found.header)) | {"residuals": []}
        values = np.full(found.values.size, np.nan, np.float32)
        values.setflags(write=False)
        return Packed(msgpack.packb(fields), values)


def _finished(header: bytes) -> bytes:
    """The header of a model, as if the world's run had ended: below it all rounds end, and are pushed."""
    packed: bytes = msgpack.packb(read_header(header, most_bytes=len(header)) | {"finished": True})
    return packed
