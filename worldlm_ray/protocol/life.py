"""A client's life: join, pull, begin, train, push, save, until the budget is spent or the client stops or leaves.

It is written once, as a generator like those of worldlm_ray/protocol/child.py. It yields what is to be done, and a
driver does it where that belongs: the model may have a thread, storage another one, and time may be virtual
(worldlm_ray/simulation/clients.py).

    Send, Sleep     of the protocol: they end with `Stopped` once the client is told to stop
    Compute         work that touches the model; the answer is what it returns
    Train           steps of the round; the answer is the seconds that it took
    Beside          take other steps meanwhile; the answer is a handle of theirs
    Await           wait for such steps; the answer is their result
    Share           move an update to where the parent can read it; the answer is the update to keep instead
    Save            write a checkpoint; the answer is whether one was begun
    Look            get the model of a node above; the answer is the model, if any, and the seconds of waiting
    TakeTurn        wait until the client may hold a model; the answer ends the turn, where there are turns
    CheckParent     wait for the next heartbeat; the answer is whether the parent is the one that was joined

Where exchange and training overlap (`exchange.overlap`), a `Beside` pushes the update and pulls the parent's model
while the next round trains. The model is merged between two steps, and no second exchange begins before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from worldlm_ray.client.above import Turns
from worldlm_ray.client.client import Client
from worldlm_ray.exchange.messages import Model, Pulled, Update
from worldlm_ray.plan.plan import Plan
from worldlm_ray.protocol.child import Steps, Stopped, Uplink
from worldlm_ray.records import LifeRecord, Record
from worldlm_ray.tensors.buffers import Flat


@dataclass(frozen=True)
class Compute:
    """Do work that touches the model."""

    work: Callable[[], Any]


@dataclass(frozen=True)
class Train:
    """Train the round under way (`Life.train`) until its end, until an exchange is back, or until told to stop."""

    until: Any = None
    """Handle of the exchange; None without one."""


@dataclass(frozen=True)
class Beside:
    """Take these steps meanwhile."""

    steps: Steps[Any]


@dataclass(frozen=True)
class Await:
    """Wait for what goes on beside; its errors are raised here."""

    handle: Any


@dataclass(frozen=True)
class Share:
    """Move an update to where the parent can read it without a copy."""

    update: Update


@dataclass(frozen=True)
class Save:
    """Write a checkpoint of the state as it is now."""

    wait: bool
    """Whether to wait until it is on disk. Otherwise none is begun while another one is being written."""


@dataclass(frozen=True)
class Look:
    """Get the published model of a node above, soon or not at all."""

    path: str


@dataclass(frozen=True)
class TakeTurn:
    """Wait until the client may hold a model that it has not trained yet."""


@dataclass(frozen=True)
class CheckParent:
    """Wait for the time of a heartbeat, and hear whether the parent is the one that was joined."""


class Life:
    """The life of one client.

    Args:
        plan: the run.
        client: what trains.
        uplink: its link to the parent.
        tell: takes records.
        now_s: gives the run time.
        is_stopping: whether the client is told to stop: after the step under way, whose round a checkpoint keeps.
        is_leaving: whether the client is to leave the run for good, after the round under way.
        turns: when it measures a node above.
    """

    def __init__(
        self,
        plan: Plan,
        client: Client,
        uplink: Uplink,
        *,
        tell: Callable[..., None],
        now_s: Callable[[], float],
        is_stopping: Callable[[], bool],
        is_leaving: Callable[[], bool],
        turns: Turns,
    ) -> None:
        self._plan, self._client, self._uplink = plan, client, uplink
        self._tell, self._now_s, self._is_stopping, self._is_leaving = tell, now_s, is_stopping, is_leaving
        self._exchange: Any = None
        """Handle of the exchange under way beside the training; its result is the parent's model, if it was pulled."""
        self._is_last = False
        """Whether the parent has said that the round under way is the last."""
        self._end_turn: Callable[[], None] | None = None
        self.delivers_since_s: float | None = None
        """Since when an update is on its way. It is worth waiting for, even if the client is told to stop meanwhile."""
        self._turns = turns
        self._busy_s, self._pace_s = 0.0, 0.0
        self._began_s = self._saved_s = now_s()

    def run(self) -> Steps[str]:
        """Train until the budget is spent.

        Returns:
            `finished`, or `stopped` or `left` where the client was told so.

        Raises:
            SupersededError: the parent knows a newer life of the client.
            PrivacyError: the ledger is damaged or cannot be written.
        """
        try:
            return (yield from self._run())
        finally:
            self._give_turn_back()

    def _run(self) -> Steps[str]:
        client = self._client
        try:
            yield from self._uplink.join()
            yield from self._introduce()
            self._began_s = self._saved_s = self._now_s()
            self._tell(self._life("training"))
            if client.began and client.in_flight is not None:  # the life before has not lived to see it
                self._exchange = yield Beside(self._talk(None, pull=True))
            while not self._is_stopping():
                if not client.began and (end := (yield from self._begin_next())) is not None:
                    self._give_turn_back()
                    return (yield from end())
                if (yield from self._train()):
                    yield from self._push()
                    yield from self._look_above()
                    yield from self._save_if_due()
        except Stopped:
            self._give_turn_back()
        with suppress(Stopped):  # the model that it brings is for the next life to ask for again
            yield from self._await_exchange()
        yield Save(wait=True)
        self._tell(self._life("stopped"))
        return "stopped"

    def stay(self) -> Steps[None]:
        """After its end a client stays with its parent: one that dies must hear again what it has forgotten.

        A paused client takes its parent's model about as often as it did while it trained.

        Raises:
            Stopped: the client was told to stop.
        """
        followed_s = self._now_s()
        while True:
            if not (yield CheckParent()):
                yield from self._uplink.join()
                yield from self._uplink.done()
            if self._client.paused and self._now_s() - followed_s >= self._pace_s:
                yield from self._follow()
                followed_s = self._now_s()

    # ---- a round -------------------------------------------------------------------------------------------------

    def _introduce(self) -> Steps[None]:
        """Tell how far the client is, and before its first round what it begins from."""
        client = self._client
        self._tell(client.progress_record(now_s=self._now_s()))
        if client.steps == 0:
            for text in client.left_out:
                self._tell(self._life("warning", text))
            self._tell((yield Compute(lambda: client.start_record(now_s=self._now_s()))))

    def _begin_next(self) -> Steps[Callable[[], Steps[str]] | None]:
        """Begin a round; if none is to begin, the way to end."""
        client = self._client
        yield from self._await_exchange()  # one under way has brought no round: its update arrives before the end
        if self._is_leaving():
            return self._say_goodbye
        if client.is_done or self._is_last:
            return self._finish
        yield from self._take_turn()
        model = yield from self._uplink.pull()
        if isinstance(model, Model) and model.finished:
            return self._finish
        self._tell(*(yield Compute(lambda: client.begin(model, now_s=self._now_s()))))
        return None if client.began else self._finish

    def _train(self) -> Steps[bool]:
        """Train; False if the round was left unfinished because of a stop, or given up."""
        client, train_s, has_trained = self._client, 0.0, False
        while not client.is_whole:
            yield from self._take_turn()
            train_s += yield Train(self._exchange)
            has_trained = True
            if not client.is_whole:
                if self._is_stopping():
                    return False
                yield from self._merge()
                if not client.began:
                    return False
        if has_trained:
            self._pace_s = yield Compute(partial(self._end_round, train_s))
        if self._exchange is not None:
            self._give_turn_back()  # others may train meanwhile
            yield from self._merge()  # an update must not overtake the one before
        return client.began

    def train(self, should_stop: Callable[[], bool]) -> float:
        """Train the round under way, or the rest of it; returns seconds. For drivers, where the model is."""
        began_s = self._now_s()
        train_s = self._client.train(should_stop)
        self._busy_s += self._now_s() - began_s
        return train_s

    def _end_round(self, train_s: float) -> float:
        """All steps of the round are done: measure, tell. Returns the seconds of both, training and measuring."""
        client, began_s, measure = self._client, self._now_s(), None
        if client.measure_is_due:
            measure = client.measure(self._plan.config.evaluation.tokens)
        now_s = self._now_s()
        self._busy_s += now_s - began_s
        self._turns.expect(now_s - began_s)
        busy = min(self._busy_s / max(now_s - self._began_s, 1e-9), 1.0)
        self._tell(client.round_record(now_s=now_s, train_s=train_s, busy_fraction=busy, measure=measure))
        return train_s + now_s - began_s

    def _merge(self) -> Steps[None]:
        """Take what the exchange has brought, once it is back."""
        model = yield from self._await_exchange()
        assert model is not None, "an exchange that a round waits for has pulled"
        records = yield Compute(lambda: self._client.merge(model, now_s=self._now_s()))
        self._is_last = isinstance(model, Model) and model.finished
        self._tell(*records)

    def _push(self) -> Steps[None]:
        """Send the round's update; where exchange and training overlap, begin the next round and send beside."""
        client = self._client
        update = yield Compute(client.update)
        self._give_turn_back()
        if client.experts is not None:
            yield Save(wait=True)  # a client that forgets what it has pushed could not take it out of a sum
        if not client.overlaps:
            yield from self._deliver(update)
            return
        if self._may_begin_ahead():
            yield Compute(client.begin_ahead)
        self._exchange = yield Beside(self._talk(update, pull=client.began))

    def _may_begin_ahead(self) -> bool:
        return not (self._is_leaving() or self._is_last or self._client.is_done)

    def _talk(self, update: Update | None, *, pull: bool) -> Steps[Pulled | None]:
        """The exchange beside the training."""
        if update is not None:
            yield from self._deliver(update)
        return (yield from self._uplink.pull()) if pull else None

    def _await_exchange(self) -> Steps[Pulled | None]:
        exchange, self._exchange = self._exchange, None
        return None if exchange is None else (yield Await(exchange))

    def _deliver(self, update: Update) -> Steps[None]:
        with self._delivering():
            update = yield Share(update)  # the client's own buffer goes
            self._client.use_shared_copy(update)
            yield from self._uplink.push(update)

    @contextmanager
    def _delivering(self) -> Iterator[None]:
        self.delivers_since_s = self._now_s()
        try:
            yield
        finally:
            self.delivers_since_s = None

    # ---- between rounds ------------------------------------------------------------------------------------------

    def _look_above(self) -> Steps[None]:
        """Measure a node above, when that is due; without its model soon there is no measurement."""
        path = self._turns.due(self._busy_s) if self._client.measure_is_due else None
        if path is None or self._is_stopping():
            return
        found, waited_s = yield Look(path)
        if not self._is_stopping():
            yield Compute(partial(self._measure_above, path, found, waited_s=waited_s))

    def _measure_above(self, path: str, found: tuple[int, Flat] | None, *, waited_s: float) -> None:
        """Measure the model of a node above on this client's text, and tell.

        Args:
            path: of the node.
            found: version and values of its model; None if it could not be had.
            waited_s: how long the client has done nothing but wait for it.
        """
        began_s, record = self._now_s(), None
        if found is not None:
            version, values = found
            record = self._client.measure_above(path, values, version=version, now_s=began_s)
        spent_s = waited_s + self._now_s() - began_s
        self._busy_s += spent_s
        self._turns.done(spent_s, measured=record is not None)
        if record is not None:
            self._tell(record)

    def _save_if_due(self) -> Steps[None]:
        """Have a checkpoint written, unless one still is: then it is due again after the next round."""
        now_s = self._now_s()
        if now_s - self._saved_s >= self._plan.config.checkpoint.every_s and (yield Save(wait=False)):
            self._saved_s = now_s

    def _take_turn(self) -> Steps[None]:
        if self._end_turn is None:
            self._end_turn = yield TakeTurn()

    def _give_turn_back(self) -> None:
        end, self._end_turn = self._end_turn, None
        if end is not None:
            end()

    # ---- the end -------------------------------------------------------------------------------------------------

    def _finish(self) -> Steps[str]:
        client = self._client
        client.paused = client.may_pause
        if client.serves and not client.paused:
            model = yield from self._uplink.pull()
            yield Compute(lambda: client.serve(model, now_s=self._now_s()))
        yield Save(wait=True)
        yield from self._uplink.done()
        event = "paused" if client.paused else "finished"
        self._tell(client.progress_record(now_s=self._now_s()), self._life(event, client.last_word))
        return "finished"

    def _say_goodbye(self) -> Steps[str]:
        experts = self._client.experts
        update = None if experts is None else (yield Compute(experts.withdrawal))
        yield Save(wait=True)
        if update is not None:
            yield from self._deliver(update)
        yield from self._uplink.left()
        self._tell(self._life("left", "" if update is None else "its part in the sums above is taken out"))
        return "left"

    def _follow(self) -> Steps[None]:
        """A paused client takes its parent's model."""
        model = yield from self._uplink.pull()
        yield from self._uplink.done()  # the pull may have had to join anew
        self._tell(*(yield Compute(lambda: self._client.follow(model, now_s=self._now_s()))))
        yield from self._save_if_due()

    def _life(self, event: str, detail: str = "") -> Record:
        client = self._client
        version = client.base_version
        return LifeRecord(node=client.spec.path, now_s=self._now_s(), event=event, version=version, detail=detail)
