"""A leaf of the tree as an actor: pull, train, push, until the budget is spent."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import ray

from actors.shared import Address, carry
from worldlm_ray import checkpoint
from worldlm_ray.client import Client
from worldlm_ray.messages import Model, Packed, pack, unpack_model
from worldlm_ray.plan import plan_from_mapping
from worldlm_ray.privacy.account import Account
from worldlm_ray.records import LifeRecord, Measure, PullRecord, PushRecord, Record
from worldlm_ray.training.trainer import Trainer

POLL_S = 0.5
"""How often a client that waits for its parent looks whether it should stop."""


class ClientActor:
    """A client. `run` occupies one thread of the actor for the whole run; the other calls come beside it.

    Args:
        address: the run and the node's path.
    """

    def __init__(self, address: Address) -> None:
        self.plan = plan_from_mapping(address.mapping)
        self.spec = self.plan.node(address.path)
        self.clock, self.recorder, self.parent = address.clock, address.recorder, address.parent
        self._place = checkpoint.folder(self.plan.run_dir, self.spec.path)
        self._stop = threading.Event()
        self._model = threading.Lock()
        """Held by whoever uses the trainer: calls beside `run` come on other threads."""
        self._busy_s = 0.0
        self._began_s = self._saved_s = self.clock.now_s()
        self._is_set_up = False

    def _set_up(self) -> None:
        """Not in the constructor, where Ray would bury an error in a traceback and answer no call meanwhile."""
        self.client = Client(self.plan, self.spec, make_trainer=self._make_trainer)
        found = checkpoint.load(self._place, warn=lambda text: self._tell(self._life("warning", text)))
        if found is not None:
            self.client.restore(*found)
        self._tell(self._life("continued" if found else "started"))

    _make_trainer: Callable[[Account | None], Trainer] | None = None
    """Makes what trains the model; None for a trainer in this process."""

    # ---- called by the launcher ------------------------------------------------------------------------------

    def ready(self) -> int:
        """Read the text, make the model, continue from a checkpoint if there is one.

        Returns:
            Local rounds done so far.

        Raises:
            WorldLMError: what kept the client from starting.
        """
        with self._model:
            if not self._is_set_up:
                self._set_up()
                self._is_set_up = True
            return self.client.round

    def run(self) -> str:
        """Live until the budget is spent (`finished`) or `stop` is called (`stopped`)."""
        self.ready()  # after a restart nobody else calls it
        last_seq = self._call(self.parent.join.remote(self.spec.name))
        if last_seq is not None:
            self.client.catch_up(last_seq)
        if self.client.steps == 0:
            self._tell(self.client.start_record(now_s=self.clock.now_s()))
        self._began_s = self._saved_s = self.clock.now_s()
        self._tell(self._life("training"))
        while not self._stop.is_set():
            if not self.client.began:
                if self.client.is_done:
                    return self._finish()
                model = self._pull()
                if model is None:
                    break
                if model.finished:
                    return self._finish()
                self._begin(model)
                if not self.client.began:
                    return self._finish()
            if self._train():
                self._push()
                self._save_if_due()
        self.save()
        self._tell(self._life("stopped"))
        return "stopped"

    def stop(self) -> None:
        """End after the step that is under way; the rest of the round waits in the checkpoint."""
        self._stop.set()

    def save(self) -> None:
        """Write a checkpoint now."""
        checkpoint.save(self._place, *self.client.state(), keep=self.plan.config.checkpoint.keep)
        self._saved_s = self.clock.now_s()

    def measure(self, refs: list[Any] | None = None) -> Measure | None:
        """Held-out quality of the client's model, or of the model behind a reference (in a list), unless private."""
        parameters = ray.get(refs[0]) if refs else None
        with self._model:
            return self.client.report(self.plan.config.evaluation.final_tokens, parameters=parameters)

    def sample(self, prompt: str = "", tokens: int = 80) -> str:
        """Text from the client's model."""
        with self._model:
            return self.client.sample(prompt=prompt, tokens=tokens)

    # ---- the cycle -------------------------------------------------------------------------------------------

    def _pull(self) -> Model | None:
        """The parent's model; None when told to stop while waiting for it."""
        answer = self._call(self.parent.pull.remote(self.spec.name, self.client.started_tokens))
        if answer is None:
            return None
        header, refs = answer
        packed = Packed(header, ray.get(refs[0]))
        model = unpack_model(packed, self.plan.layout)
        self._tell(
            PullRecord(node=self.spec.path, now_s=self.clock.now_s(), version=model.version, bytes=packed.nbytes)
        )
        return model

    def _begin(self, model: Model) -> None:
        for record in self.client.begin(model, now_s=self.clock.now_s()):
            self._tell(record)

    def _train(self) -> bool:
        """Train; False if the round was left unfinished because of `stop`."""
        began_s = self.clock.now_s()
        measure = None
        with self._model:
            train_s = self.client.train(self._stop.is_set)
            whole = self.client.step == self.client.training.local_steps
            if whole and self.client.measure_is_due:
                measure = self.client.measure(self.plan.config.evaluation.tokens)
        now_s = self.clock.now_s()
        self._busy_s += now_s - began_s
        if whole:
            busy = self._busy_s / max(now_s - self._began_s, 1e-9)
            self._tell(
                self.client.round_record(now_s=now_s, train_s=train_s, busy_fraction=min(busy, 1.0), measure=measure)
            )
        return whole

    def _push(self) -> None:
        packed = pack(self.client.update(), self.plan.layout)
        header, refs = carry(packed)
        self._tell(PushRecord(node=self.spec.path, now_s=self.clock.now_s(), bytes=packed.nbytes))
        # Waited for without an eye on `stop`: the work is done and deserves to arrive.
        verdict = ray.get(self.parent.push.remote(self.spec.name, header, refs))
        if not verdict.accepted:
            self.client.refused(verdict.reason)

    def _finish(self) -> str:
        self.save()
        ray.get(self.parent.done.remote(self.spec.name))
        self._tell(self._life("finished", self.client.last_word))
        return "finished"

    def _call(self, ref: Any) -> Any:
        """The answer to a call, or None when told to stop while waiting."""
        while not self._stop.is_set():
            ready, _ = ray.wait([ref], timeout=POLL_S)
            if ready:
                return ray.get(ref)
        return None

    def _save_if_due(self) -> None:
        if self.clock.now_s() - self._saved_s >= self.plan.config.checkpoint.every_s:
            self.save()

    def _life(self, event: str, detail: str = "") -> LifeRecord:
        return LifeRecord(
            node=self.spec.path,
            now_s=self.clock.now_s(),
            event=event,
            version=self.client.base_version if self._is_set_up else 0,
            detail=detail,
        )

    def _tell(self, *records: Record) -> None:
        self.recorder.record.remote(list(records))
