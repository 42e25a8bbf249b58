"""What every client is to its run, with its own process or in a pool: its state, its checkpoints, its records."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from actors.drivers import Link, link_of
from actors.shared import Address, was_restarted, write_checkpoint
from worldlm_ray.client.above import Turns
from worldlm_ray.client.client import Client
from worldlm_ray.errors import CheckpointError
from worldlm_ray.plan.plan import Plan
from worldlm_ray.protocol.child import Sleep, Steps, Stopped, Uplink
from worldlm_ray.protocol.life import Life
from worldlm_ray.records import LifeRecord, Record
from worldlm_ray.storage import checkpoint
from worldlm_ray.storage.checkpoint import STORAGE_AGAIN_S
from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.tracking import log_lines


@dataclass(frozen=True)
class GetReady:
    """Make the client, and continue from its checkpoint, unless that is done."""


class Leaf:
    """A client with its link, its checkpoints and what it tells.

    Args:
        plan: the run.
        address: the run and the node's path.
        recorder: handle of the run's recorder.
    """

    client: Client
    uplink: Uplink
    link: Link
    life: Life

    def __init__(self, plan: Plan, address: Address, recorder: Any) -> None:
        self.plan, self.spec = plan, plan.node(address.path)
        self.clock, self.recorder = address.clock, recorder
        self._address = address
        self._place = checkpoint.folder(plan.run_dir, self.spec.path)
        self._is_set_up = False
        self._lock = threading.Lock()
        """Held while the client's knowledge of its exchange is changed or copied."""
        self._is_stopping = self._is_leaving = False

    def _set_up(self) -> None:
        """Make the client, and continue from a checkpoint if there is one.

        Raises:
            WorldLMError: what kept the client from starting.
        """
        incarnation = checkpoint.claim(self._place)
        found = checkpoint.load(self._place, warn=self._warn)  # first: a trainer may be processes, made only once
        self.client = self._make_client()
        self.client.incarnation = incarnation
        if found is not None:
            self.client.restore(*found)
        self.uplink = Uplink(self.plan, self.spec.path, self.client, tell=self._tell, now_s=self.clock.now_s)
        self.link = link_of(self._address, self.plan, self.client)
        self.life = Life(
            self.plan,
            self.client,
            self.uplink,
            tell=self._tell,
            now_s=self.clock.now_s,
            is_stopping=lambda: self._is_stopping,
            is_leaving=lambda: self._is_leaving or not self._is_member(),
            turns=Turns(self.spec.path),
        )
        self._is_set_up = True
        self._tell(self._life("continued" if found else "started"))
        if self.client.warning:
            self._warn(self.client.warning)

    def _is_member(self) -> bool:
        return self.plan.faults.is_member(self.spec.path, self.clock.now_s())

    def _make_client(self) -> Client:
        raise NotImplementedError

    def _get_ready(self) -> Steps[None]:
        """Get ready; after a death, wait for the storage if need be."""
        while True:
            try:
                yield GetReady()
                return
            except CheckpointError as error:
                if not was_restarted():
                    raise
                self._warn(f"cannot go on yet: {error}")
                try:
                    yield Sleep(STORAGE_AGAIN_S)
                except Stopped:
                    raise error from None

    def _write(self, meta: dict[str, Any], arrays: dict[str, Flat]) -> None:
        """Write a checkpoint, or go on without.

        Raises:
            SupersededError: another process plays this client by now.
        """
        incarnation = self.client.incarnation
        try:
            write_checkpoint(self.plan, self.spec.path, meta, arrays, incarnation=incarnation, clock=self.clock)
        except CheckpointError as error:
            self._warn(f"no checkpoint: {error}")

    def _warn(self, text: str) -> None:
        self._tell(self._life("warning", text))

    def _life(self, event: str, detail: str = "") -> LifeRecord:
        version = self.client.base_version if self._is_set_up else 0
        return LifeRecord(node=self.spec.path, now_s=self.clock.now_s(), event=event, version=version, detail=detail)

    def _tell(self, *records: Record) -> None:
        if records:
            for record in records:
                log_lines.note(record)
            self.recorder.record.remote(list(records))
