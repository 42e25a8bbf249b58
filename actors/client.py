"""A leaf of the tree as an actor: pull, train, push, until the budget is spent.

Threads of one client, and what they share:

    life        trains, merges, decides what comes next
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
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import ray

from actors.above import PATIENCE_S, published
from actors.drivers import carried, send_heartbeat, wait_for
from actors.graceful_shutdown import GracefulShutdown
from actors.leaf import Leaf
from actors.shared import (
    ARRIVAL_S,
    SHUTDOWN_S,
    STORAGE_AGAIN_S,
    Address,
    beside,
    end_process,
    schedule_kills,
    settle,
    was_restarted,
)
from worldlm_ray.client.client import Client
from worldlm_ray.errors import CheckpointError, SupersededError
from worldlm_ray.exchange.messages import Model, Update
from worldlm_ray.privacy.account import Account
from worldlm_ray.protocol.child import Steps, Stopped
from worldlm_ray.records import Measure
from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.training.trainer import Trainer

T = TypeVar("T")


class ClientActor(GracefulShutdown, Leaf):
    """A client. Its life takes a thread of its own; calls come beside it, and checkpoints are written beside it.

    Args:
        address: the run and the node's path.
    """

    def __init__(self, address: Address) -> None:
        plan = address.plan_and_kept_files()
        settle(address.clock, address.namespace, address.path, plan.run_dir)
        super().__init__(plan, address, address.recorder)
        self.faults = self.plan.faults
        self._stop, self._leave = threading.Event(), threading.Event()
        self._ended = threading.Event()
        self._outcome: str | Exception = ""
        self._model = threading.Lock()  # calls come on other threads
        self._lock = threading.Lock()
        """Held by whoever changes or copies what the client knows of its exchange."""
        self._exchange: Future[Model | None] | None = None
        """The exchange under way beside the training; gives the parent's model if that was asked for."""
        self._last = False
        """Whether the parent has said that the round under way is the last."""
        self._begin_once = threading.Lock()
        self._thread: threading.Thread | None = None
        self._saving: Future[None] = Future()
        """The checkpoint that is being written, or the last one."""
        self._saving.set_result(None)
        self._pace_s = 0.0
        schedule_kills(self.faults, self.spec.path, self.clock)
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
        self._stop.set()

    def leave(self) -> None:
        """Leave the run for good after the round that is under way."""
        self._leave.set()

    def save(self) -> None:
        """Write a checkpoint now, or go on without; returns when it is on disk, and whatever was begun before it."""
        self._saving.result()
        self._begin_save()
        self._saving.result()

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
            self._begin_again()
            self._outcome = self._live()
            self._ended.set()
            if self._outcome == "finished":
                self._stay()
        except SupersededError as error:
            end_process(str(error))
        except Exception as error:  # noqa: BLE001 - a boundary: the launcher raises it from `outcome`
            self._outcome = error
            self._ended.set()

    def _begin_again(self) -> None:
        """Get ready; after a death, wait for the storage if need be."""
        while True:
            try:
                self.ready()
                return
            except CheckpointError as error:
                if not was_restarted():
                    raise
                self._warn(f"cannot go on yet: {error}")
                if self._stop.wait(STORAGE_AGAIN_S):
                    raise

    def _live(self) -> str:
        """Train until the budget is spent (`finished`), or `stop` or `leave` is called."""
        try:
            self._wait(self.uplink.join())
            self._tell(self.client.progress_record(now_s=self.clock.now_s()))
            if self.client.steps == 0:
                self._say_left_out()
                self._tell(self.client.start_record(now_s=self.clock.now_s()))
            self._began_s = self._saved_s = self.clock.now_s()
            self._tell(self._life("training"))
            threading.Thread(target=self._beat, daemon=True).start()
            if self.client.began and self.client.in_flight is not None:
                self._exchange = beside(lambda: self._talk(None, pull=True))  # the life before did not live to see it
            while not self._stop.is_set():
                if not self.client.began and (end := self._begin_next()) is not None:
                    return end()
                if self._train():
                    self._push()
                    self._look_above()
                    self._save_if_due()
        except Stopped:
            pass
        with suppress(Stopped):
            self._await_exchange()  # the model that it brings is for the next life to ask for again
        self.save()
        self._tell(self._life("stopped"))
        return "stopped"

    def _begin_next(self) -> Callable[[], str] | None:
        """Begin a round; if none is to begin, the way to end."""
        self._await_exchange()  # one that is under way has brought no round: its update shall arrive before the end
        if self._leaves:
            return self._say_goodbye
        if self.client.is_done or self._last:
            return self._finish
        model = self._wait(self.uplink.pull())
        if model is not None and model.finished:
            return self._finish
        self._tell(*self.client.begin(model, now_s=self.clock.now_s()))
        return None if self.client.began else self._finish

    @property
    def _leaves(self) -> bool:
        """Whether no round is to begin any more, since the client leaves the run."""
        return self._leave.is_set() or not self.faults.is_member(self.spec.path, self.clock.now_s())

    def _train(self) -> bool:
        """Train; False if the round was left unfinished because of `stop`, or given up."""
        train_s, trained = 0.0, False
        while not self.client.is_whole:
            train_s += self._train_stretch(self._pauses)
            trained = True
            if not self.client.is_whole:
                if self._stop.is_set():
                    return False
                self._merge()
                if not self.client.began:
                    return False
        if trained:
            self._pace_s = self._end_round(train_s)
        if self._exchange is not None:
            self._merge()  # an update must not overtake the one before
        return self.client.began

    def _pauses(self) -> bool:
        return self._stop.is_set() or (self._exchange is not None and self._exchange.done())

    def _merge(self) -> None:
        """Take what the exchange has brought; waits for it if need be."""
        model = self._await_exchange()
        with self._model:
            records = self.client.merge(model, now_s=self.clock.now_s())
        self._last = model is not None and model.finished
        self._tell(*records)

    def _push(self) -> None:
        """Send the round's update; where exchange and training overlap, begin the next one and have it sent beside."""
        update = self.client.update()
        if not self.client.overlaps:
            self._deliver(update)
            return
        if not (self._leaves or self._last or self.client.is_done):
            self.client.begin_ahead()
        self._exchange = beside(partial(self._talk, update, pull=self.client.began))

    def _talk(self, update: Update | None, *, pull: bool) -> Model | None:
        """The exchange beside the training."""
        if update is not None:
            self._deliver(update)
        return self._wait(self.uplink.pull()) if pull else None

    def _await_exchange(self) -> Model | None:
        exchange, self._exchange = self._exchange, None
        return None if exchange is None else exchange.result()

    def _deliver(self, update: Update) -> None:
        with self._lock:
            shared = self.link.share(update)
            self.client.use_shared_copy(update.values, shared)
        update = replace(update, values=shared)  # the client's own buffer goes
        # The work is done and deserves to arrive, even if the client is told to stop meanwhile.
        stopped_at: list[float] = []

        def enough() -> bool:
            if self._stop.is_set() and not stopped_at:
                stopped_at.append(self.clock.now_s())
            return bool(stopped_at) and self.clock.now_s() - stopped_at[0] > ARRIVAL_S

        wait_for(carried(self.uplink.push(update), self.link), enough, lock=self._lock)

    def _look_above(self) -> None:
        """Measure a node above, when that is due; without its model soon there is no measurement."""
        path, began_s = self._due_above(), time.monotonic()
        if path is None:
            return
        try:
            found = wait_for(
                published(self._address, path), lambda: self._stop.is_set() or _since(began_s) > PATIENCE_S
            )
        except Stopped:
            found = None
        if not self._stop.is_set():
            self._measure_above(path, found, waited_s=_since(began_s))

    def _finish(self) -> str:
        self.client.paused = self.client.may_pause
        self.save()
        self._wait(self.uplink.done())
        event = "paused" if self.client.paused else "finished"
        self._tell(self.client.progress_record(now_s=self.clock.now_s()), self._life(event, self.client.last_word))
        return "finished"

    def _say_goodbye(self) -> str:
        self.save()
        self._wait(self.uplink.left())
        self._tell(self._life("left"))
        return "left"

    def _stay(self) -> None:
        """At its end a client stays with its parent: if that dies, it must hear again what it has forgotten.

        A paused one takes its parent's model about as often as it did while it trained.
        """
        followed_s = self.clock.now_s()
        while not self._stop.wait(self.plan.config.liveness.heartbeat_s):
            try:
                if not self._wait(self.uplink.check()):
                    self._wait(self.uplink.join())
                    self._wait(self.uplink.done())
                if self.client.paused and self.clock.now_s() - followed_s >= self._pace_s:
                    self._follow()
                    followed_s = self.clock.now_s()
            except Stopped:
                return

    def _follow(self) -> None:
        model = self._wait(self.uplink.pull())
        self._wait(self.uplink.done())  # the pull may have had to join anew
        if model is None:
            return
        with self._model:
            records = self.client.follow(model, now_s=self.clock.now_s())
        self._tell(*records)
        self._save_if_due()

    def _beat(self) -> None:
        """Signs of life to the parent, beside the training."""
        while not self._ended.wait(self.plan.config.liveness.heartbeat_s):
            send_heartbeat(self.uplink, self.link)

    def _wait(self, steps: Steps[T]) -> T:
        return wait_for(carried(steps, self.link), self._stop.is_set, lock=self._lock)

    def _save_if_due(self) -> None:
        """Have a checkpoint written, unless one still is: then it is due again after the next round."""
        if self._saving.done() and self.clock.now_s() - self._saved_s >= self.plan.config.checkpoint.every_s:
            self._saving.result()  # whatever the storage did not say before
            self._begin_save()

    def _begin_save(self) -> None:
        """Take the state as it is now, and have it written beside: training goes on."""
        self._saved_s = self.clock.now_s()
        with self._lock:
            state = self.client.state()
        self._saving = beside(partial(self._write_beside, *state))

    def _write_beside(self, meta: dict[str, Any], arrays: dict[str, Flat]) -> None:
        try:
            self._write(meta, arrays)
        except SupersededError as error:
            end_process(str(error))

    def shut_down(self) -> None:
        """See GracefulShutdown: end as after `stop`."""
        if self._thread is not None:
            self._stop.set()
            self._ended.wait(SHUTDOWN_S)


def _since(began_s: float) -> float:
    return time.monotonic() - began_s
