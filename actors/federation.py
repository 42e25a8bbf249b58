"""A federation as an actor: an inner node that exchanges with its parent while its children go on."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from actors.drivers import carried, follow, link_of, send_heartbeat
from actors.inner import InnerActor
from actors.shared import Address
from worldlm_ray.aggregation.events import ParentModel, Send, Shared, UpdateDue, UpdateSent
from worldlm_ray.protocol.child import Steps, Uplink
from worldlm_ray.protocol.node_child import NodeAsChild
from worldlm_ray.records import Record
from worldlm_ray.storage.checkpoint import STORAGE_AGAIN_S

T = TypeVar("T")


class FederationActor(InnerActor):
    """A federation.

    Args:
        address: the run and the node's path.
    """

    def __init__(self, address: Address) -> None:
        self._work = asyncio.Event()
        self._told = False
        """Whether the parent knows that everything below has ended."""
        self._talking = False
        super().__init__(address)
        child = NodeAsChild(self.node)
        self._uplink = Uplink(self.plan, address.path, child, tell=self._record, now_s=self.clock.now_s)
        self._link = link_of(address, self.plan, child)

    def _exchange(self) -> None:
        """Hand the update over to the task that talks to the parent."""
        [due] = [command for command in self.node.handle(UpdateDue()) if isinstance(command, Send)]
        self.node.handle(Shared(own=due.update.values, copy=self._link.share(due.update).values))
        self._work.set()

    def _ask_for_news(self) -> None:
        self._work.set()

    async def _live(self) -> None:
        """Talk to the parent: one task does, so that nothing overtakes. Children are served all the while."""
        while self.node.children.have_never_joined and not self.node.ended:
            self._work.clear()
            await self._work.wait()
        await self._follow(self._uplink.join())
        while True:
            if self._told and not self.node.ended:  # a client below has come back: so does this node
                self._told = False
                await self._follow(self._uplink.join())
            if self.node.in_flight is not None or self.node.wants_refresh:
                self._talking = True
                if self.node.in_flight is not None:
                    await self._until_known()
                    self.node.handle(UpdateSent())
                    await self._follow(self._uplink.push(self.node.in_flight))
                model = await self._follow(self._uplink.pull())
                self._talking = False
                await self._handle(ParentModel(model=model, now_s=self.clock.now_s()))
            elif self.node.ended and not self._told:
                self._told = True
                await self._follow(self._uplink.done())
                if self._told:
                    self._ended.set()
            else:
                await self._rest()

    async def _until_known(self) -> None:
        """Wait until a checkpoint knows the update in flight, or until the storage has refused for too long."""
        patience_s = self.plan.config.checkpoint.patience_s
        while not self.node.may_send:
            await self._checkpoints.save()
            if self._checkpoints.refused_s is None:
                continue
            if patience_s is not None and self.clock.now_s() - self._checkpoints.refused_s >= patience_s:
                self.records.warn(
                    "sends its parent what no checkpoint knows: if it dies now, that counts twice above it"
                )
                return
            await asyncio.sleep(STORAGE_AGAIN_S)

    def _beat(self) -> None:
        """A heartbeat while an exchange is under way: storage may refuse, and a synchronous parent be long."""
        if self._talking:
            send_heartbeat(self._uplink, self._link)

    async def _rest(self) -> None:
        """Until there is something to do, tell the parent now and then that this node lives."""
        self._work.clear()
        try:
            await asyncio.wait_for(self._work.wait(), self.plan.config.liveness.heartbeat_s)
        except TimeoutError:
            if not await self._follow(self._uplink.check()):
                await self._follow(self._uplink.join())
                if self.node.ended:
                    await self._follow(self._uplink.done())

    async def _follow(self, steps: Steps[T]) -> T:
        return await follow(carried(steps, self._link))

    def _finish(self) -> None:
        self.records.audit.flush()
        self.records.tell("finished")
        self._told = False
        self._work.set()

    def _record(self, record: Record) -> None:
        self.records.send([record])
