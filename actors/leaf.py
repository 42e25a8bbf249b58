"""What every client is to its run, whether it has a process of its own or shares one: its state and its words."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from actors.drivers import Link, link_of
from actors.shared import Address, write_checkpoint
from worldlm_ray.client.above import Turns
from worldlm_ray.client.client import Client
from worldlm_ray.errors import CheckpointError
from worldlm_ray.plan.plan import Plan
from worldlm_ray.protocol.child import Uplink
from worldlm_ray.records import LifeRecord, Record
from worldlm_ray.storage import checkpoint
from worldlm_ray.tensors.buffers import Flat


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

    def __init__(self, plan: Plan, address: Address, recorder: Any) -> None:
        self.plan, self.spec = plan, plan.node(address.path)
        self.clock, self.recorder = address.clock, recorder
        self._address = address
        self._place = checkpoint.folder(plan.run_dir, self.spec.path)
        self._model: AbstractContextManager[Any] = nullcontext()
        """Held by whoever uses the trainer."""
        self._is_set_up = False
        self._busy_s = 0.0
        self._turns = Turns(self.spec.path)
        self._began_s = self._saved_s = self.clock.now_s()

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
        self._is_set_up = True
        self._tell(self._life("continued" if found else "started"))
        if self.client.warning:
            self._warn(self.client.warning)

    def _make_client(self) -> Client:
        raise NotImplementedError

    def _train_stretch(self, should_stop: Callable[[], bool]) -> float:
        """Train the round that is under way until its end, or until somebody wants the client to stop; seconds."""
        began_s = self.clock.now_s()
        with self._model:
            train_s = self.client.train(should_stop)
        self._busy_s += self.clock.now_s() - began_s
        return train_s

    def _end_round(self, train_s: float) -> float:
        """All steps of the round are done: measure, tell. Returns the seconds of both, training and measuring."""
        began_s, measure = self.clock.now_s(), None
        if self.client.measure_is_due:
            with self._model:
                measure = self.client.measure(self.plan.config.evaluation.tokens)
        now_s = self.clock.now_s()
        self._busy_s += now_s - began_s
        self._turns.expect(now_s - began_s)
        busy = min(self._busy_s / max(now_s - self._began_s, 1e-9), 1.0)
        self._tell(self.client.round_record(now_s=now_s, train_s=train_s, busy_fraction=busy, measure=measure))
        return train_s + now_s - began_s

    def _due_above(self) -> str | None:
        """The node above whose model is to be measured now, if one is."""
        return self._turns.due(self._busy_s) if self.client.measure_is_due else None

    def _measure_above(self, path: str, found: tuple[int, Flat] | None, *, waited_s: float = 0.0) -> None:
        """Measure the model of a node above on this client's text, and tell.

        Args:
            path: of the node.
            found: version and values of its model; None if it could not be had.
            waited_s: how long the client has done nothing but wait for it.
        """
        began_s, record = self.clock.now_s(), None
        if found is not None:
            version, values = found
            with self._model:
                record = self.client.measure_above(path, values, version=version, now_s=began_s)
        spent_s = waited_s + self.clock.now_s() - began_s
        self._busy_s += spent_s
        self._turns.done(spent_s, measured=record is not None)
        if record is not None:
            self._tell(record)

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

    def _say_left_out(self) -> None:
        """Warn of files beside the client's text that are not read."""
        for text in self.client.left_out:
            self._warn(text)

    def _warn(self, text: str) -> None:
        self._tell(self._life("warning", text))

    def _life(self, event: str, detail: str = "") -> LifeRecord:
        version = self.client.base_version if self._is_set_up else 0
        return LifeRecord(node=self.spec.path, now_s=self.clock.now_s(), event=event, version=version, detail=detail)

    def _tell(self, *records: Record) -> None:
        if records:
            self.recorder.record.remote(list(records))
