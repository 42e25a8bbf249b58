"""A leaf of the tree as an actor: pull, train, push, until the budget is spent.

Threads of one client, and what they share:

    life        takes the steps of worldlm_ray/protocol/life.py: trains, merges, decides what comes next
    exchange    where `exchange.overlap` is set: pushes an update and pulls the parent's model while life trains; life
                takes the model between two steps, and begins no second exchange before
    disk        writes a checkpoint of a state that life has copied
    calls       Ray's: stop, leave, measure, sample

`_lock` is held while the exchange changes what the client knows of it, and while a state is copied: a checkpoint has an
update in its outbox or the parent's word about it, never half of both.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import ray

from actors.above import PATIENCE_S, published
from actors.drivers import carried, send_heartbeat, wait_for
from actors.graceful_shutdown import GracefulShutdown
from actors.leaf import GetReady, Leaf
from actors.shared import (
    ARRIVAL_S,
    SHUTDOWN_S,
    Address,
    begin,
    beside,
    end_process,
    schedule_kills,
    was_restarted,
)
from worldlm_ray.client.client import Client
from worldlm_ray.errors import SupersededError
from worldlm_ray.privacy.account import Account
from worldlm_ray.protocol.child import Sleep, Steps, Stopped
from worldlm_ray.protocol.life import Await, Beside, CheckParent, Compute, Look, Save, TakeTurn, Train
from worldlm_ray.records import Measure
from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.training.trainer import Trainer

T = TypeVar("T")


class ClientActor(GracefulShutdown, Leaf):
    """A client. Its life takes a separate thread; calls come beside it, and checkpoints are written beside it.

    Args:
        address: the run and the node's path.
    """

    def __init__(self, address: Address) -> None:
        plan = address.plan_and_kept_files()
        begin(plan, address.path, address.clock, address.namespace)
        super().__init__(plan, address, address.recorder)
        self._stopped_s = 0.0
        self._ended = threading.Event()
        self._outcome: str | Exception = ""
        self._model = threading.Lock()  # calls come on other threads
        self._begin_once = threading.Lock()
        self._thread: threading.Thread | None = None
        self._saving: Future[None] = Future()
        """The checkpoint that is being written, or the last one."""
        self._saving.set_result(None)
        schedule_kills(self.plan.faults, self.spec.path, self.clock)
        if was_restarted() or address.begin:
            self.start()

    def _make_client(self) -> Client:
        return Client(self.plan, self.spec, make_trainer=self._make_trainer)

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
            if not self._is_set_up:  # not in the constructor, where Ray would bury an error and answer no call
                self._set_up()
            return self.client.round

    def process(self) -> int:
        """Id of this process."""
        return os.getpid()

    def start(self) -> None:
        """Begin to live, unless the client lives already."""
        with self._begin_once:
            if self._thread is None:
                self._thread = threading.Thread(target=self._guard, daemon=True)
                self._thread.start()

    def outcome(self) -> str:
        """Wait for the end: `finished` once the budget is spent, `stopped` after `stop`, `left` after `leave`.

        Raises:
            Exception: whatever broke the client.
        """
        self._ended.wait()
        if self.reclaimed:
            threading.Event().wait()  # the process ends in a moment, and the client goes on elsewhere
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome

    def stop(self) -> None:
        """End after the step that is under way; the rest of the round waits in the checkpoint."""
        if not self._is_stopping:
            self._is_stopping, self._stopped_s = True, self.clock.now_s()

    def leave(self, forget: bool = False) -> None:
        """Leave the run for good after the round that is under way.

        Args:
            forget: take what it has pushed out of the sums above.

        Raises:
            ConfigError: it does not know all that it has pushed.
        """
        if forget and self.client.experts is not None:
            self.client.experts.forget()
        self._is_leaving = True

    def measure(self, refs: list[Any] | None = None) -> Measure | None:
        """Held-out quality of the client's model, or of the model behind a reference (in a list), unless private."""
        self.ready()  # it may have been started again a moment ago
        parameters = ray.get(refs[0]) if refs else None
        with self._model:
            return self.client.report(self.plan.config.evaluation.final_tokens, parameters=parameters)

    def sample(self, prompt: str = "", tokens: int = 80) -> str:
        """Text from the client's model."""
        self.ready()
        with self._model:
            return self.client.sample(prompt=prompt, tokens=tokens)

    # ---- life --------------------------------------------------------------------------------------------------

    def _guard(self) -> None:
        """The thread of the client's life."""
        try:
            wait_for(self._get_ready(), lambda: self._is_stopping, others={GetReady: lambda _: self.ready()})
            beside(self._beat)
            self._outcome = self._take(self.life.run())
            self._ended.set()
            if self._outcome == "finished":
                with suppress(Stopped):
                    self._take(self.life.stay())
        except SupersededError as error:
            end_process(str(error))
        except Exception as error:  # noqa: BLE001 - a boundary: the launcher raises it from `outcome`
            self._outcome = error
            self._ended.set()

    def _take(self, steps: Steps[T]) -> T:
        """Take steps of the client's life."""
        return wait_for(carried(steps, self.link), self._is_hurried, lock=self._lock, others=self._others)

    @property
    def _others(self) -> dict[type, Callable[[Any], Any]]:
        return {
            Compute: lambda step: self._with_model(step.work),
            Train: self._train,
            Beside: lambda step: beside(partial(self._take, step.steps)),
            Await: lambda step: step.handle.result(),
            Save: self._save,
            Look: self._look,
            TakeTurn: lambda _: None,
            CheckParent: self._check_parent,
        }

    def _is_hurried(self) -> bool:
        """Whether the client waits no more: it is told to stop, and an update on its way has had its time."""
        since_s = self.life.delivers_since_s
        if since_s is None or not self._is_stopping:
            return self._is_stopping
        return self.clock.now_s() - max(since_s, self._stopped_s) > ARRIVAL_S

    def _with_model(self, work: Callable[[], T]) -> T:
        with self._model:
            return work()

    def _train(self, step: Train) -> float:
        def should_stop() -> bool:
            return self._is_stopping or (step.until is not None and step.until.done())

        return self._with_model(partial(self.life.train, should_stop))

    def _look(self, step: Look) -> tuple[tuple[int, Flat] | None, float]:
        began_s, found = time.monotonic(), None

        def is_late() -> bool:
            return self._is_stopping or time.monotonic() - began_s > PATIENCE_S

        with suppress(Stopped):
            found = wait_for(published(self._address, step.path), is_late)
        return found, time.monotonic() - began_s

    def _check_parent(self, _: CheckParent) -> bool:
        def steps() -> Steps[bool]:
            yield Sleep(self.plan.config.liveness.heartbeat_s)
            return (yield from self.uplink.check())

        return self._take(steps())

    def _beat(self) -> None:
        """Heartbeats to the parent, beside the training."""
        while not self._ended.wait(self.plan.config.liveness.heartbeat_s):
            send_heartbeat(self.uplink, self.link)

    # ---- checkpoints -------------------------------------------------------------------------------------------

    def _save(self, step: Save) -> bool:
        """Take the state as it is now, and have it written beside: training goes on, unless it is to wait."""
        if not step.wait and not self._saving.done():
            return False
        self._saving.result()  # whatever was begun before, and what the storage did not say
        with self._lock:
            state = self.client.state()
        self._saving = beside(partial(self._write_beside, *state))
        if step.wait:
            self._saving.result()
        return True

    def _write_beside(self, meta: dict[str, Any], arrays: dict[str, Flat]) -> None:
        try:
            self._write(meta, arrays)
        except SupersededError as error:
            end_process(str(error))

    def shut_down(self) -> None:
        """See GracefulShutdown: end as after `stop`."""
        if self._thread is not None:
            self.stop()
            self._ended.wait(SHUTDOWN_S)
