"""The parent's methods, as a member calls them over a border."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from aiohttp import web

from worldlm_ray.errors import MessageError
from worldlm_ray.exchange.messages import Packed, read_header
from worldlm_ray.exchange.replies import Verdict, Welcome
from worldlm_ray.gateway import wire
from worldlm_ray.gateway.downloads import Downloads
from worldlm_ray.gateway.receipts import Evidence
from worldlm_ray.gateway.requests import Member, answer, read
from worldlm_ray.gateway.staging import Name, Upload
from worldlm_ray.gateway.uploads import Uploads

POLL_S = 25.0
"""So long a pull waits for a parent that waits for other children; then the member asks again."""
HEARTBEAT_S = 15.0
"""While leaves arrive the parent hears so often that the member lives."""


class Parent(Protocol):
    """The node on whose border a gateway stands: its methods for children, with buffers as arrays.

    A method raises MessageError where the parent refuses, and where it cannot be reached (unreachable).
    """

    async def join(self, child: str, incarnation: int, seq: int) -> Welcome:
        """A child is here."""
        ...

    async def push(self, sender: str, incarnation: int, to: int, header: bytes, values: Any) -> Verdict:
        """Take an update: fp32 [size], or uint8 [bytes of its codec]; read-only."""
        ...

    async def pull(self, child: str, incarnation: int, to: int, started_tokens: int) -> Packed:
        """Give the model, once the child may go on; all children get the same buffer of a version."""
        ...

    async def done(self, child: str, incarnation: int, to: int) -> None:
        """A child will train no more."""
        ...

    async def left(self, child: str, incarnation: int, to: int) -> bool:
        """A child leaves; returns whether it may end."""
        ...

    async def heartbeat(self, child: str, incarnation: int, to: int) -> None:
        """A child lives."""
        ...


@dataclass
class _Asked:
    """A call of the parent that goes on though the member's connection may be cut."""

    key: object
    """What was asked: who asks the same waits for the same answer."""
    task: asyncio.Task[Any]
    ended_s: float | None = None

    def ended(self, _: object) -> None:
        """There is an answer."""
        self.ended_s = asyncio.get_running_loop().time()

    def is_stale(self, after_s: float) -> bool:
        """Whether the answer has waited for its member for so long that the parent may have a newer one."""
        return self.ended_s is not None and asyncio.get_running_loop().time() - self.ended_s > after_s


class Calls:
    """Makes a member's requests calls of the parent.

    Args:
        parent: the node.
        uploads: has the updates.
        downloads: gets the models.
        sizes: of what may come.
        evidence: checks, signs and keeps what is pushed and judged.
        poll_s: see POLL_S.
    """

    def __init__(
        self,
        parent: Parent,
        uploads: Uploads,
        downloads: Downloads,
        sizes: wire.Sizes,
        *,
        evidence: Evidence,
        poll_s: float = POLL_S,
    ) -> None:
        self._parent, self._uploads, self._downloads, self._sizes = parent, uploads, downloads, sizes
        self._evidence, self._poll_s = evidence, poll_s
        self._pulls: dict[str, _Asked] = {}
        self._pushes: dict[str, _Asked] = {}
        self._others: set[asyncio.Task[Any]] = set()

    # ---- small ones ------------------------------------------------------------------------------------------

    async def join(self, request: web.BaseRequest, member: Member) -> web.Response:
        """See Parent."""
        asked = await read(request, wire.Join)
        welcome = await self._parent.join(member.name, asked.incarnation, asked.seq)
        member.joined = (asked.incarnation, welcome.incarnation)
        return answer(wire.Joined(**vars(welcome)))

    async def done(self, request: web.BaseRequest, member: Member) -> web.Response:
        """See Parent."""
        asked = await read(request, wire.Call)
        await self._parent.done(member.name, asked.incarnation, asked.to)
        return answer()

    async def left(self, request: web.BaseRequest, member: Member) -> web.Response:
        """See Parent."""
        asked = await read(request, wire.Call)
        return answer(wire.Left(may_end=await self._parent.left(member.name, asked.incarnation, asked.to)))

    async def heartbeat(self, request: web.BaseRequest, member: Member) -> web.Response:
        """See Parent."""
        asked = await read(request, wire.Call)
        await self._parent.heartbeat(member.name, asked.incarnation, asked.to)
        member.heard_s = asyncio.get_running_loop().time()
        return answer()

    def alive(self, member: Member) -> None:
        """Leaves come and go: the parent is to hear that the member lives, without waiting for its answer."""
        now_s = asyncio.get_running_loop().time()
        if member.joined is not None and now_s - member.heard_s >= HEARTBEAT_S:
            member.heard_s = now_s
            self._beside(self._parent.heartbeat(member.name, *member.joined))

    def close(self) -> None:
        """Wait for no answer any more."""
        for task in [asked.task for asked in (*self._pulls.values(), *self._pushes.values())] + list(self._others):
            task.cancel()

    # ---- push ------------------------------------------------------------------------------------------------

    async def push(self, request: web.BaseRequest, member: Member) -> web.Response:
        """See Parent; the update's leaves are staged.

        Raises:
            MessageError: malformed, not_allowed, bad_signature; gone: leaves are missing; wrong_digest.
        """
        asked = await read(request, wire.Push, most=self._sizes.message_bytes)
        _check_header(asked, member)
        manifest = self._evidence.check(asked, member.path)
        under_way = self._pushes.get(member.path)
        key = replace(asked, signature=b"", chain=b"")
        if under_way is None or under_way.key != key:
            upload = self._whole(member, asked)
            under_way = _Asked(key, self._beside(self._judge(member, asked, manifest, upload)))
            self._pushes[member.path] = under_way
        verdict, judged = await asyncio.shield(under_way.task)
        if not verdict.accepted and self._pushes.get(member.path) is under_way:
            del self._pushes[member.path]  # the same update may be judged otherwise later
        return answer(judged)

    async def _judge(
        self, member: Member, asked: wire.Push, manifest: bytes, upload: Upload
    ) -> tuple[Verdict, wire.Judged]:
        values = np.frombuffer(upload.view(), np.float32 if asked.codec == "fp32" else np.uint8)
        try:
            await self._evidence.pushed(asked, member.path, manifest)
            verdict = await self._parent.push(member.name, asked.incarnation, asked.to, asked.header, values)
        except BaseException:
            self._pushes.pop(member.path, None)
            raise
        upload.judged = True
        member.meter.judged(verdict)
        return verdict, await self._evidence.judged(wire.packed(verdict), member.path, manifest)

    def _whole(self, member: Member, asked: wire.Push) -> Upload:
        upload = self._uploads.staged(member, Name(asked.incarnation, asked.seq, asked.codec))
        if upload is None or not upload.is_whole:
            raise MessageError("gone", f"leaves of update {asked.seq} are missing: send them again")
        if not upload.matches(asked.digest):
            self._uploads.drop(member)
            raise MessageError("wrong_digest", f"update {asked.seq} is not what its digest says: send it again")
        return upload

    # ---- pull ------------------------------------------------------------------------------------------------

    async def pull(self, request: web.BaseRequest, member: Member) -> web.Response:
        """See Parent; 202 where the parent waits, and the member is to ask again."""
        asked = await read(request, wire.Pull)
        under_way = self._pulls.get(member.path)
        if under_way is None or under_way.key != asked or under_way.is_stale(self._poll_s):
            if under_way is not None:
                under_way.task.cancel()
            under_way = _Asked(asked, self._beside(self._ask(member, asked)))
            under_way.task.add_done_callback(under_way.ended)
            self._pulls[member.path] = under_way
        ready, _ = await asyncio.wait({under_way.task}, timeout=self._poll_s)
        if not ready:
            return web.Response(status=202)
        if self._pulls.get(member.path) is under_way:
            del self._pulls[member.path]
        header, version = under_way.task.result()
        return answer(wire.Served(header=header, digest=version.digest, size=version.leaves.size))

    async def _ask(self, member: Member, asked: wire.Pull) -> Any:
        found = await self._parent.pull(member.name, asked.incarnation, asked.to, asked.started_tokens)
        return found.header, await self._downloads.publish(found.values)

    def _beside(self, work: Awaitable[Any]) -> asyncio.Task[Any]:
        """A task whose error is no event loop's matter if nothing waits for it any more."""
        task = asyncio.ensure_future(work)
        assert isinstance(task, asyncio.Task)
        self._others.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._others.discard(task)
        if not task.cancelled():
            task.exception()


def _check_header(asked: wire.Push, member: Member) -> None:
    """The update's header says what the request says.

    Raises:
        MessageError: malformed; not_allowed: it is another member's.
    """
    header = read_header(asked.header, most_bytes=len(asked.header))
    if header.get("sender") != member.name:
        raise MessageError("not_allowed", f"an update of {str(header.get('sender'))[:80]!r} comes from {member.path}")
    if header.get("seq") != asked.seq or header.get("codec", "fp32") != asked.codec:
        raise MessageError("malformed", "the update's header names another seq or codec than the request")
