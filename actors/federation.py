"""A federation as an actor: an inner node that exchanges with its parent while its children go on."""

from __future__ import annotations

from typing import Any

from actors.inner import InnerActor
from actors.shared import Address
from worldlm_ray.aggregation.events import ParentModel
from worldlm_ray.messages import Packed, unpack_model
from worldlm_ray.records import PullRecord, PushRecord


class FederationActor(InnerActor):
    """A federation.

    Args:
        address: the run and the node's path.
    """

    def __init__(self, address: Address) -> None:
        super().__init__(address)
        self.parent = address.parent

    async def start(self) -> None:
        """Join the parent, then begin."""
        await self.parent.join.remote(self.spec.name)
        await super().start()

    async def _exchange(self, header: bytes, ref: Any, nbytes: int) -> None:
        """Push, then pull, then merge; children are served from this actor's loop all the while.

        Args:
            header: of the update.
            ref: its buffer in the object store.
            nbytes: size of the buffer.
        """
        pushed = PushRecord(node=self.spec.path, now_s=self.clock.now_s(), bytes=len(header) + nbytes)
        await self.parent.push.remote(self.spec.name, header, [ref])
        header, refs = await self.parent.pull.remote(self.spec.name, self.node.started_tokens)
        received = Packed(header, await refs[0])
        model = unpack_model(received, self.plan.layout)
        now_s = self.clock.now_s()
        pulled = PullRecord(node=self.spec.path, now_s=now_s, version=model.version, bytes=received.nbytes)
        self.recorder.record.remote([pushed, pulled])
        self._handle(ParentModel(model=model, now_s=now_s))

    async def _finish(self) -> None:
        await self.parent.done.remote(self.spec.name)
        await super()._finish()
