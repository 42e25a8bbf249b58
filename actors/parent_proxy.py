"""A border's end in a member's cluster: what stands for the parent there.

A proxy has the parent's name and the parent's methods, so that a child does not know that its parent is elsewhere. It
knows nothing that a restart could lose. The other end is actors/gateway.py.
"""

from __future__ import annotations

import asyncio
import os
from functools import partial
from typing import Any

import ray

from actors.graceful_shutdown import GracefulShutdown
from actors.shared import Address, Carried, once_storage_answers
from worldlm_ray.errors import MessageError
from worldlm_ray.exchange.replies import Verdict, Welcome
from worldlm_ray.gateway import profile, renewal, report, terms
from worldlm_ray.gateway.contexts import client_context
from worldlm_ray.gateway.guard import Guard
from worldlm_ray.gateway.guarded import GuardedLink
from worldlm_ray.gateway.link import Link, LinkSettings, hello_of
from worldlm_ray.gateway.receipts import FOLDER, SENT, Receipts
from worldlm_ray.gateway.renewal import MemberRenewal
from worldlm_ray.gateway.seals import MemberKey
from worldlm_ray.gateway.standing import Standing
from worldlm_ray.plan.tree import parent_path
from worldlm_ray.storage.filesystem import expanded


class ParentProxy(GracefulShutdown):
    """The parent of a member, in the member's cluster.

    Args:
        address: the run, and the path of the member.
    """

    def __init__(self, address: Address) -> None:
        plan, path = address.logged_plan("border"), address.path
        above = plan.node(parent_path(path) or "")
        assert plan.config.joins is not None, "a proxy is made for a run that joins another world"
        self._profile = once_storage_answers(partial(profile.joined, expanded(plan.config.joins)), above.path)
        settings = LinkSettings(
            url=self._profile.url,
            path=path,
            sizes=terms.sizes_of(plan, above),
            hello=hello_of(terms.sizes_of(plan, above)),
            world=self._profile.world,
        )
        mine = once_storage_answers(partial(terms.alike, plan, above), above.path)
        guard = once_storage_answers(partial(Guard, self._profile, plan, mine), above.path)
        self._seal = MemberKey(self._profile)
        kept = Receipts(plan.run_dir / FOLDER, SENT, root=self._profile.root, warn=address.warn)
        context, check = client_context(self._profile), self._profile.check_server
        warn = partial(address.warn, path)
        self._link = Link(
            settings, context, seal=self._seal, receipts=kept, say=warn, check_server=check, check_charter=guard.meet
        )
        self._guarded = GuardedLink(self._link, guard, tell=self._tell)
        Standing(self._profile.folder).run()
        self._last: tuple[bytes, Any] = (b"", None)
        """Digest of the newest model, and its reference."""
        self._address, self._above, self._said = address, above.path, ("", "")
        self._certificate = MemberRenewal(self._profile, self._link, self._seal, warn)
        self.loop = asyncio.get_running_loop()
        self._renewal = asyncio.create_task(renewal.hourly(self._certificate.look))
        self._freight = report.freight(plan, is_member=True)
        self._reports = asyncio.create_task(report.tell_often(self._report))

    # ---- the parent's methods --------------------------------------------------------------------------------

    async def join(self, child: str, incarnation: int, seq: int) -> Welcome:
        """See InnerActor."""
        try:
            await self._certificate.ready()
            welcome = await self._guarded.join(child, incarnation, seq)
        except MessageError as error:
            if not self._guarded.said:
                self._tell("lost", f"over the border: {error}")
            raise
        self._tell("training", f"over the border, at {self._profile.url}")
        return welcome

    async def push(self, sender: str, incarnation: int, to: int, header: bytes, refs: list[Any]) -> Verdict:
        """See InnerActor."""
        return await self._guarded.push(sender, incarnation, to, header, await refs[0])

    async def pull(self, child: str, incarnation: int, to: int, started_tokens: int) -> Carried:
        """See InnerActor."""
        found = await self._guarded.pull(child, incarnation, to, started_tokens)
        digest = self._guarded.last_digest
        if digest != self._last[0]:
            ref = await asyncio.get_running_loop().run_in_executor(None, ray.put, found.values)
            self._last = (digest, ref)
            self._guarded.hold(digest, await ref)
        return found.header, [self._last[1]]

    async def done(self, child: str, incarnation: int, to: int) -> None:
        """See InnerActor."""
        await self._guarded.done(child, incarnation, to)
        self._report()

    async def left(self, child: str, incarnation: int, to: int) -> bool:
        """See InnerActor."""
        return await self._guarded.left(child, incarnation, to)

    async def heartbeat(self, child: str, incarnation: int, to: int) -> None:
        """See InnerActor."""
        await self._guarded.heartbeat(child, incarnation, to)

    async def published(self) -> tuple[int, list[Any]]:
        """See InnerActor; no model crosses the border to be measured, so that there is none."""
        return 0, []

    async def run_time_s(self) -> float | None:
        """The other cluster's clock is another one."""
        return None

    # ---- called by the launcher --------------------------------------------------------------------------------

    async def process(self) -> int:
        """Id of this process."""
        return os.getpid()

    async def greet(self) -> str:
        """Compare what both sides must have alike; returns why the parent cannot be reached, if so.

        Raises:
            MessageError: the parent refuses this member.
            GatewayError: the member's policy refuses, or its configuration does not fit the charter.
        """
        try:
            await self._certificate.ready()
            await self._guarded.greet()
        except MessageError as error:
            if error.reason != "unreachable":
                raise
            return error.detail
        return ""

    def shut_down(self) -> None:
        """See GracefulShutdown: there is nothing to be saved."""

    def _tell(self, event: str, detail: str) -> None:
        """Have the run's files say what has changed about the link to the parent."""
        if (event, detail) != self._said:
            self._said = (event, detail)
            self._address.tell(self._above, event, detail)

    def _report(self) -> None:
        """Have the run's files say how well the line does."""
        meter, now_s = self._link.transfer.meter, self._address.clock.now_s()
        record = report.of_parent(self._above, meter, self._profile, self._freight, now_s=now_s)
        self._address.recorder.record.remote([record])
