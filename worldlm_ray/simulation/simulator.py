"""The second backend: a whole world in one process, under a virtual clock.

Training is real; time is not. A queue of events, ordered by virtual time and then by the order in which they
were scheduled, stands for the machines and the network: a local round takes its tokens over the client's
`simulation.tokens_per_s`, a message takes its bytes over the link's bandwidth plus its latency, aggregation takes
nothing. Where a client trains while it exchanges (`exchange.overlap`), the virtual time at which the parent's model
arrives says after how many steps of the round it is merged. The same seed and configuration give the same bits,
whatever machine this runs on does meanwhile.

With `simulation.train: false` a cost model stands in place of training (worldlm_ray/simulation/cost_model.py): the same
events at the same times, a hundred thousand clients in minutes.

Faults on purpose (worldlm_ray/plan/faults.py) are simulated, too: a node that is killed comes back from its last
checkpoint, a call whose answer is lost fails after a while, and its caller joins its parent again, as on Ray. Where
something can fail, children send signs of life and parents look at the clock, all of them at once every
`liveness.heartbeat_s`; where nothing can, nobody could be silent, and nobody looks.

Clients come and go as on Ray, too: by the fault script, and in federations that have fewer places than clients.
"""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import numpy as np

from worldlm_ray.aggregation.events import (
    Answer,
    Charge,
    Clock,
    Command,
    Done,
    Event,
    Exchange,
    Finish,
    Heartbeat,
    Joined,
    Left,
    Note,
    ParentModel,
    Pull,
    Push,
    Refresh,
    Save,
    Serve,
    Wake,
)
from worldlm_ray.aggregation.node import Node
from worldlm_ray.client.above import FORWARD, Turns
from worldlm_ray.client.client import Client
from worldlm_ray.config.schema import DataConfig
from worldlm_ray.data import prepare_shards
from worldlm_ray.errors import MessageError
from worldlm_ray.exchange.messages import Model, Packed, Update, pack
from worldlm_ray.exchange.replies import Verdict, Welcome, believed
from worldlm_ray.plan import build
from worldlm_ray.plan.faults import Fault, damaged
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.tree import NodeSpec, parent_path
from worldlm_ray.records import LifeRecord, PullRecord, PushRecord, Record, VerdictRecord
from worldlm_ray.reports.outcome import Outcome, combine, finish, sampled
from worldlm_ray.seeds import derive
from worldlm_ray.simulation import cost_model
from worldlm_ray.storage import checkpoint, open_files
from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.tracking.audit import AuditLog
from worldlm_ray.tracking.tracker import Tracker, open_tracker

BITS_PER_GBIT = 1e9
NOTICED_S = 1.0
"""Virtual seconds until a caller learns that its call has failed, and until it tries again."""
AUDIT_EVERY_S = 2.0
"""Without training, wall seconds between two writes of the audit trail."""
STORAGE_AGAIN_S = 2.0
"""Virtual seconds until a federation asks its storage again that refuses."""
RESTART_S = 2.0
"""Virtual seconds until a killed node is back, unless its fault says otherwise."""

State = tuple[dict[str, Any], dict[str, Flat]]


@dataclass(eq=False)
class _Call:
    """A call from a child to its parent that waits for its answer."""

    child: str
    life: int
    answered: Callable[[Any], None]
    beside: bool = False
    """Whether the run may end without it."""
    waits: bool = False
    """Whether the answer is a model, which may come much later than the call."""
    open: bool = True


class Simulation:
    """One simulated run.

    Args:
        plan: the run.
        tracker: where to record what happens.
        on_event: called after every event, for a progress display.
        on_record: called with whatever is recorded.
        should_stop: asked between events; True ends the run early.
        make_client: makes a client of a node; one that trains, unless given.
    """

    def __init__(
        self,
        plan: Plan,
        tracker: Tracker,
        *,
        on_event: Callable[[], None] = lambda: None,
        on_record: Callable[[Record], None] = lambda _: None,
        should_stop: Callable[[], bool] = lambda: False,
        make_client: Callable[..., Any] = Client,
    ) -> None:
        self.plan, self.tracker = plan, tracker
        self.on_event, self.on_record, self.should_stop = on_event, on_record, should_stop
        self.now_s = 0.0
        self._queue: list[tuple[float, int, bool, Callable[[], None]]] = []
        self._beside = 0
        """Entries of the queue that go on for ever: signs of life and looks at the clock."""
        self._order, self.faults, self.initial = count(), plan.faults, cost_model.initial(plan)
        self._make_client: Callable[..., Any] = lambda s, **more: make_client(plan, s, initial=self.initial, **more)
        self.specs = {spec.path: spec for spec in plan.root.walk()}
        self.contributions = {s.path: build.contributions(plan, s) for s in plan.root.inner}
        self.nodes: dict[str, Node] = {
            s.path: cost_model.inner_node(plan, s, self.initial, self.contributions[s.path]) for s in plan.root.inner
        }
        open_files.raise_limit()
        _cut_texts(plan)
        self.clients = {spec.path: self._make_client(spec) for spec in plan.root.clients}
        self.speeds = {spec.path: self._speed(spec) for spec in plan.root.clients}
        """Tokens per second of every client."""
        every_s = AUDIT_EVERY_S if isinstance(plan, cost_model.CostPlan) else 0.0
        self.audit = {path: AuditLog(plan.run_dir, path, every_s=every_s) for path in self.nodes}
        self._busy_s = dict.fromkeys(self.clients, 0.0)
        self._turns: dict[str, Turns] = {}
        """Of clients that have measured a node above them."""
        self._training: set[str] = set()
        self._begun_s: dict[str, float] = {}
        """When a client's round under way began."""
        self._whole: set[str] = set()
        """Clients that have ended a round before the exchange of the one before has come back."""
        self._merging: set[str] = set()
        """Clients that have the parent's model and merge it after the step that is under way."""
        self._last: set[str] = set()
        """Clients that know that the round under way is the last."""
        self._rounds = dict.fromkeys(self.clients, 0)
        """Rounds begun by a client, those that were given up included."""
        self._lives = dict.fromkeys(self.specs, 1)
        """Incarnation by path; 0 while the node is dead."""
        self._joined = dict.fromkeys(self.specs, 1)
        """Incarnation of its parent that a child has joined; 0 while it has to join again."""
        self._verdict: Verdict | None = None
        """What the event that is being handled has been answered."""
        self._catching_up: set[str] = set()
        """Children that are joining their parent and sending it again what it has lost."""
        self._words: dict[str, type[Done | Left]] = {}
        """Last words that children have said."""
        self.gone: dict[str, int] = {}
        """Clients that are not there, since they come late, have no place or have left, by their last incarnation."""
        self._too_late = False
        """Whether everybody who was there has ended, so that nobody comes any more."""
        self._pauses: dict[str, int] = {}
        """How often a client has paused."""
        self._calls: dict[str, list[_Call]] = {}
        """Calls that wait for their answer, by child."""
        self.events = 0
        """Handled so far."""
        self._begun_tokens = dict.fromkeys(self.clients, 0)
        """Tokens of all rounds that each client has begun; together ..."""
        self._begun = 0
        self._under_way = 0
        """Tokens of the rounds that are being trained."""
        self._saved: dict[str, State] = {}
        self._saved_s = dict.fromkeys(self.specs, 0.0)
        self._refused_s: dict[str, float] = {}
        """Since when a node's storage refuses."""

    def run(self) -> str:
        """Run to the end of the budget.

        Returns:
            `finished`, or `stopped` if `should_stop` said so.
        """
        for fault in self.faults.all:
            if fault.kind == "kill":
                self._at(fault.at_s, lambda fault=fault: self._kill(fault))  # type: ignore[misc]
            elif fault.kind == "join":
                parent, _ = self._parent(fault.node)
                self._at(fault.at_s, lambda parent=parent: self._fill(parent))  # type: ignore[misc]
        self._keep_away()
        for path in self.specs:
            if self._is_deserted(path):
                self._joined[path] = 0
            elif path != "world" and path not in self.gone:
                parent, name = self._parent(path)
                self._take(parent, Joined(child=name, now_s=0.0))
        for path in self.clients:
            if path not in self.gone:
                self._introduce(path)
                self._pull(path)
        if self.faults:
            self._at(self.plan.config.liveness.heartbeat_s, self._look, beside=True)
        else:
            for node in self.nodes.values():
                node.liveness = None
        while self._queue and not (self.faults and self._is_over()):
            if self.should_stop():
                return "stopped"
            self.now_s, _, beside, action = heapq.heappop(self._queue)
            self._beside -= beside
            action()
            self.events += 1
            self.on_event()
        return "finished"

    def _is_over(self) -> bool:
        """Whether everybody is alive and has said the last word: faults that come later find nobody."""
        there = [path for path in self.specs if path not in self.gone]
        ended = all(node.ended for node in self.nodes.values()) and all(self._lives[path] for path in there)
        return ended and all(self._words.get(path) is Done for path in there if path != "world")

    def conclude(self, status: str) -> Outcome:
        """Measure every model, write checkpoints and summary.json."""
        for trail in self.audit.values():
            trail.flush()
        if isinstance(self.plan, cost_model.CostPlan):
            return finish(
                self.plan,
                self.tracker,
                world=None,
                measures={},
                samples={},
                wall_s=self.now_s,
                status=status,
                backend="simulate",
            )
        there = {path: client for path, client in self.clients.items() if path not in self.gone}
        measures = {path: client.report(self._final_tokens) for path, client in there.items()}
        for path, node in self.nodes.items():
            below = [there[spec.path] for spec in self.specs[path].clients if spec.path in there]
            measures[path] = combine(c.report(self._final_tokens, parameters=node.theta) for c in below)
        for path, part in (self.nodes | self.clients).items():
            checkpoint.save(checkpoint.folder(self.plan.run_dir, path), *part.state())
        return finish(
            self.plan,
            self.tracker,
            world=self.nodes["world"].theta,
            measures=measures,
            samples={path: sampled(client.sample) for path, client in there.items()},
            wall_s=self.now_s,
            status=status,
            backend="simulate",
        )

    # ---- clients ---------------------------------------------------------------------------------------------

    def _pull(self, path: str) -> None:
        client = self.clients[path]
        if not client.began and not self.faults.is_member(path, self.now_s):
            self._go(path)
            return
        if not client.began and (client.is_done or path in self._last):
            self._leave(path)
            return
        self._call(path, 0, self._asking(path), self._receiver(path))

    def _asking(self, path: str) -> Callable[[dict[str, Any]], Pull]:
        """A pull, as it is when it is sent."""
        node, name = self.clients.get(path) or self.nodes[path], self.specs[path].name
        started = node.started_tokens
        return lambda lives: Pull(child=name, started_tokens=started, **lives)

    def _receiver(self, path: str) -> Callable[[Model], None]:
        return lambda model: self._receive(path, model)

    def _receive(self, path: str, model: Model) -> None:
        if self.clients[path].began:
            self._merge_after_step(path, self._budgeted(model))
        else:
            self._begin(path, self._budgeted(model))

    def _begin(self, path: str, model: Model) -> None:
        client = self.clients[path]
        records = [] if model.finished else client.begin(model, now_s=self.now_s)
        if not client.began:
            self._leave(path)
            return
        for record in records:
            self._record(record)
        self._train(path)

    def _train(self, path: str) -> None:
        """Let a round that has begun take its time. Nobody can tell when within it the training was done."""
        client = self.clients[path]
        if not client.overlaps:
            client.train()
        self._count(path)
        self._rounds[path] += 1
        self._training.add(path)
        self._under_way += client.round_tokens
        self._begun_s[path], number = self.now_s, self._rounds[path]
        train_s = self._round_s(path)
        self._busy_s[path] += train_s
        self._at(self.now_s + train_s, lambda: self._end_round(path, train_s, number), of=path)

    def _begin_ahead(self, path: str) -> None:
        """Begin the next round before the exchange of the last one has come back, unless that was the last."""
        client = self.clients[path]
        stays = not client.is_done and path not in self._last and self.faults.is_member(path, self.now_s)
        if client.overlaps and stays and not self._is_spent():
            client.begin_ahead()
            if client.began:
                self._train(path)

    def _merge_after_step(self, path: str, model: Model) -> None:
        """An exchange has come back in the middle of a round: the model is merged when the step under way is done."""
        client = self.clients[path]
        if client.in_flight is None or path in self._merging:
            return  # it has come back twice
        if client.is_whole:
            self._merge(path, model)
            return
        steps, since_s = client.training.local_steps, self.now_s - self._begun_s[path]
        step_s = self._round_s(path) / steps
        done = min(math.ceil(since_s / step_s - 1e-9), steps)
        end_s = self._begun_s[path] + (self._round_s(path) if done == steps else done * step_s)
        self._merging.add(path)
        self._at(end_s, lambda: self._merge(path, model, steps=done), of=path)

    def _merge(self, path: str, model: Model, *, steps: int = 0) -> None:
        client = self.clients[path]
        self._merging.discard(path)
        ahead = count(client.step)
        if client.step < steps:
            client.train(lambda: next(ahead) >= steps)
        for record in client.merge(model, now_s=self.now_s):
            self._record(record)
        if model.finished:
            self._last.add(path)
        whole = path in self._whole
        self._whole.discard(path)
        if not client.began:
            self._give_up(path)
        elif whole:
            self._push_round(path)

    def _give_up(self, path: str) -> None:
        """A client has dropped the round under way with its diverged model: it asks for another one."""
        if path in self._training:
            self._end_training(path)
            self._busy_s[path] -= self._begun_s[path] + self._round_s(path) - self.now_s
        self._count(path)
        self._rounds[path] += 1  # whatever waits for its end waits in vain
        self._pull(path)

    def _leave(self, path: str) -> None:
        """A child's last word."""
        name = self.specs[path].name
        self._words[path] = Done
        self._call(path, 0, lambda lives: Done(child=name, **lives), lambda _: None)
        if path in self.clients:
            client = self.clients[path]
            client.paused = client.may_pause
            event = "paused" if client.paused else "finished"
            self._record(LifeRecord(node=path, now_s=self.now_s, event=event, detail=client.last_word))
            self._give_up_late()
            if client.paused:
                number = self._pauses[path] = self._pauses.get(path, 0) + 1
                self._at(self.now_s + self._round_s(path), lambda: self._follow(path, number), of=path, beside=True)

    def _follow(self, path: str, number: int) -> None:
        """A paused client takes its parent's model, about as often as it did while it trained, until the run ends."""
        if self._pauses[path] != number:
            return  # it has said its last word again since, and goes on from there
        client, name, last = self.clients[path], self.specs[path].name, len(self._queue) <= self._beside

        def received(model: Model) -> None:
            for record in client.follow(model, now_s=self.now_s):
                self._record(record)
            if not last:
                again_s = self.now_s + self._round_s(path)
                self._at(again_s, lambda: self._follow(path, number), of=path, beside=True)

        started = client.started_tokens
        self._call(path, 0, lambda lives: Pull(child=name, started_tokens=started, **lives), received, beside=True)

    def _round_s(self, path: str) -> float:
        tokens: int = self.clients[path].round_tokens
        return tokens / self.speeds[path]

    def _speed(self, spec: NodeSpec) -> float:
        pace = spec.settings.simulation
        if not pace.speed_spread:
            return pace.tokens_per_s
        z = np.random.Generator(np.random.PCG64(derive(self.plan.config.seed, spec.path, "speed"))).standard_normal()
        return pace.tokens_per_s * math.exp(pace.speed_spread * z)

    def _count(self, path: str) -> None:
        """A client's rounds have changed."""
        client = self.clients[path]
        tokens = client.begun * client.round_tokens
        self._begun += tokens - self._begun_tokens[path]
        self._begun_tokens[path] = tokens

    def _end_training(self, path: str) -> None:
        if path in self._training:
            self._training.discard(path)
            self._under_way -= self.clients[path].round_tokens

    def _budgeted(self, model: Model) -> Model:
        """Spend a budget in tokens to the round, however late the world would hear of it.

        Here all tokens are known at once. On Ray the world counts them, from what its children tell in their exchanges,
        and overshoots by what is begun meanwhile: asynchronous methods that exchange seldom would train most.
        """
        budget = self.plan.config.budget.tokens
        if budget is None or self.nodes["world"].synchronous:  # synchronous children all hear the same
            return model
        trained = self._begun - self._under_way
        progress = max(model.progress, min(trained / budget, 1.0))
        return replace(model, progress=progress, finished=model.finished or self._is_spent())

    def _is_spent(self) -> bool:
        """Whether a budget in tokens holds no more rounds, as far as that is settled here."""
        budget = self.plan.config.budget.tokens
        return budget is not None and not self.nodes["world"].synchronous and self._begun >= budget

    def _end_round(self, path: str, train_s: float, number: int) -> None:
        client = self.clients[path]
        if number != self._rounds[path]:
            return
        if client.overlaps and not client.is_whole:
            client.train()
        self._end_training(path)
        measure = client.measure(self.plan.config.evaluation.tokens) if client.measure_is_due else None
        busy = self._busy_s[path] / self.now_s
        self._record(client.round_record(now_s=self.now_s, train_s=train_s, busy_fraction=busy, measure=measure))
        self._measure_above(path)
        if client.in_flight is not None:
            self._whole.add(path)  # the exchange under way has to come back first
        else:
            self._push_round(path)

    def _measure_above(self, path: str) -> None:
        """Have a client measure a node above it when that is due. Like every measurement it takes no virtual time."""
        client = self.clients[path]
        if not client.measure_is_due:
            return
        cost_s = self.plan.config.evaluation.tokens / (FORWARD * self.speeds[path])
        turns = self._turns.setdefault(path, Turns(path, cost_s=cost_s))
        above = turns.due(self._busy_s[path])
        if above is None:
            return
        node = self.nodes[above]
        measured = bool(self._lives[above] and node.version)
        if measured:
            self._record(client.measure_above(above, node.theta, version=node.version, now_s=self.now_s))
        turns.done(cost_s if measured else 0.0, measured=measured)

    def _push_round(self, path: str) -> None:
        update = self.clients[path].update()
        self._save_if_due(path)
        self._begin_ahead(path)
        self._push(path, update, lambda: self._pull(path))

    # ---- up and down the tree --------------------------------------------------------------------------------

    def _push(self, child: str, update: Update, then: Callable[[], None]) -> None:
        """Send an update, hear the verdict, go on."""
        packed = self._pack_update(child, update)
        self._record(PushRecord(node=child, now_s=self.now_s, bytes=packed.nbytes))
        name = self.specs[child].name

        def event(lives: dict[str, Any]) -> Push:
            header = damaged(packed.header) if self._faulty(child, "corrupt") else packed.header
            return Push(sender=name, packed=replace(packed, header=header), **lives)

        def answered(verdict: Verdict) -> None:
            node = self.clients.get(child) or self.nodes[child]
            node.answered(verdict)
            if node.outbox.retry(update, verdict):
                self._at(self.now_s + NOTICED_S, lambda: self._lost(child), of=child)
            elif verdict.reason == "out_of_turn":
                # Sent again after a restart, while its forerunner waits for its siblings': not before that is through.
                self._wait_for_turn(child, lambda: self._push(child, update, then))
            else:
                then()

        self._call(child, packed.nbytes, event, answered)

    def _pack_update(self, child: str, update: Update) -> Packed:
        packed = pack(update, self.plan.layout)
        if not isinstance(self.plan, cost_model.CostPlan):
            return packed
        return replace(packed, counts_as=self.plan.up_bytes(self.specs[child]))

    def _pull_bytes(self, model: Model) -> int:
        packed = pack(model, self.plan.layout)
        if isinstance(self.plan, cost_model.CostPlan):
            packed = replace(packed, counts_as=self.plan.real.nbytes)
        return packed.nbytes

    def _wait_for_turn(self, child: str, then: Callable[[], None]) -> None:
        """Wait until the parent would serve the child; the model itself is not wanted."""
        self._call(child, 0, self._asking(child), lambda _: then())

    def _join(self, child: str) -> None:
        """Find the parent (again), and send what it does not have."""
        node, name = self.clients.get(child) or self.nodes[child], self.specs[child].name

        def welcomed(welcome: Welcome) -> None:
            welcome, doubt = believed(welcome, seq=node.seq)
            if doubt:
                self._warn(child, f"its parent's welcome is not believed: {doubt}")
            self._joined[child] = welcome.incarnation
            node.welcomed(welcome)
            if child in self.clients:
                self._count(child)
            self._send_again(child, welcome.last_seq)

        def event(lives: dict[str, Any]) -> Joined:
            return Joined(child=name, seq=node.seq, now_s=self.now_s, incarnation=self._lives[child])

        self._catching_up.add(child)
        self._call(child, 0, event, welcomed)

    def _send_again(self, child: str, after: int) -> None:
        """Send what the parent has not got, one by one, and go on from there."""
        node = self.clients.get(child) or self.nodes[child]
        updates = node.outbox.after(after)
        if updates:
            self._push(child, updates[0], lambda: self._send_again(child, updates[0].seq))
            return
        self._catching_up.discard(child)
        if child in self._words:
            self._go(child) if self._words[child] is Left else self._leave(child)
        elif child in self.clients:
            client = self.clients[child]
            if not client.began or (client.in_flight is not None and child not in self._merging):
                self._pull(child)
        elif self.nodes[child].wants_news or (self.nodes[child].in_flight is not None and self.nodes[child].is_sent):
            self._pull_up(child)

    def _pull_up(self, path: str) -> None:
        def received(model: Model) -> None:
            self._take(path, ParentModel(model=model, now_s=self.now_s))

        self._call(path, 0, self._asking(path), received)

    # ---- inner nodes -----------------------------------------------------------------------------------------

    def _take(self, path: str, event: Event) -> None:
        """Let a node handle an event; answers go to the calls that wait for them."""
        for command in self.nodes[path].handle(event):
            self._perform(path, command)
        if path in self._words and not self.nodes[path].ended and self._lives[path]:
            del self._words[path]  # somebody below has come back: so does the federation
            self._lost(path)

    def _perform(self, path: str, command: Command) -> None:
        node = self.nodes[path]
        if isinstance(command, Note):
            if isinstance(command.record, VerdictRecord):
                self.audit[path].verdict(command.record)
            self._record(command.record)
        elif isinstance(command, Charge):
            ledgers = self.contributions[path]
            assert ledgers is not None
            ledgers.charge(command.child)
        elif isinstance(command, Answer):
            self._verdict = command.verdict
        elif isinstance(command, Serve):
            child = f"{path}/{command.child}"
            size = self._pull_bytes(command.model)
            self._record(PullRecord(node=child, now_s=self.now_s, version=command.model.version, bytes=size))
            for call in [call for call in self._calls.get(child, ()) if call.waits]:
                self._answer(call, command.model, size)
        elif isinstance(command, Save):
            self._save(path)
        elif isinstance(command, Exchange):
            node.begin_exchange()
            self._send_once_known(path)
        elif isinstance(command, Refresh):
            if path not in self._catching_up:  # which asks for them, too
                self._join(path)
        elif isinstance(command, Wake):
            self._at(command.at_s, lambda: self._take(path, Clock(now_s=self.now_s)), of=path)
        elif isinstance(command, Finish):
            self._finish(path)

    def _send_once_known(self, path: str) -> None:
        """Send a federation's update once a checkpoint knows it, or once the storage has refused for too long."""
        node, patience_s = self.nodes[path], self.plan.config.checkpoint.patience_s
        if self.faults and not node.may_send:
            self._save(path)
        refused_s = self.now_s - self._refused_s.get(path, self.now_s)
        known = node.may_send or not self.faults  # where nothing can fail, nobody will ask a checkpoint
        if known or (patience_s is not None and refused_s >= patience_s):
            update = node.send()
            if path not in self._catching_up:  # which sends it, too
                self._push(path, update, lambda: self._pull_up(path))
            return
        self._at(self.now_s + STORAGE_AGAIN_S, lambda: self._send_once_known(path), of=path)

    def _finish(self, path: str) -> None:
        self._record(LifeRecord(node=path, now_s=self.now_s, event="finished", version=self.nodes[path].version))
        if path != "world":
            self._leave(path)

    def _introduce(self, path: str) -> None:
        """Tell what there is to say of a client before its first round."""
        client = self.clients[path]
        self._say_left_out(path)
        self._record(client.start_record(now_s=self.now_s))
        if client.warning:
            self._warn(path, client.warning)

    def _say_left_out(self, path: str) -> None:
        for text in self.clients[path].left_out:
            self._warn(path, text)
        if self.clients[path].left_out:
            self._record(LifeRecord(node=path, now_s=self.now_s, event="training"))

    def _warn(self, path: str, text: str) -> None:
        self._record(LifeRecord(node=path, now_s=self.now_s, event="warning", detail=text))

    def _record(self, record: Record) -> None:
        self.tracker.record(record)
        self.on_record(record)

    # ---- calls, which may fail -------------------------------------------------------------------------------

    def _call(
        self,
        child: str,
        nbytes: int,
        event: Callable[[dict[str, Any]], Event],
        answered: Callable[[Any], None],
        *,
        beside: bool = False,
    ) -> None:
        """Call the parent: `event` reaches it, `answered` gets what it answers. A call that fails ends in `_lost`."""
        call = _Call(child, self._lives[child], answered, beside)
        self._calls.setdefault(child, []).append(call)
        times = 2 if self._faulty(child, "repeat") else 1
        for again in range(times):
            arrives_s = self._arrival(child, nbytes)
            self._at(arrives_s, lambda again=again: self._deliver(call, event, again), beside=beside)  # type: ignore[misc]

    def _deliver(self, call: _Call, event: Callable[[dict[str, Any]], Event], again: int) -> None:
        parent, name = self._parent(call.child)
        if not call.open and not again:
            return  # its caller is dead: so is the message
        if self._faulty(call.child, "cut") or not self._lives[parent]:
            self._fail(call)
            return
        lives = {"incarnation": call.life, "to": self._joined[call.child], "now_s": self.now_s}
        try:
            made = event(lives)
            if isinstance(made, Joined):
                made = replace(made, incarnation=call.life)
            call.waits = isinstance(made, Pull)
            self._take(parent, made)
        except MessageError as error:
            if error.reason == "superseded":
                call.open = False
            else:
                self._fail(call)
            return
        if isinstance(made, Joined):
            self._answer(call, self.nodes[parent].welcome(name), 0)
        elif isinstance(made, Push):
            self._answer(call, self._verdict, 0)
        elif isinstance(made, Done):
            self._answer(call, None, 0)
        elif isinstance(made, Left):
            self._answer(call, self.nodes[parent].children[name].gone, 0)

    def _answer(self, call: _Call, value: Any, nbytes: int) -> None:
        """Send a call's answer on its way; the second of two is not heard."""
        if not self._forget(call):
            return
        if self._faulty(call.child, "drop") or self._faulty(call.child, "cut"):
            self._fail(call)
        else:
            self._at(self._arrival(call.child, nbytes), lambda: self._arrive(call, value), beside=call.beside)

    def _arrive(self, call: _Call, value: Any) -> None:
        if call.open and call.life == self._lives[call.child]:
            call.open = False
            call.answered(value)

    def _fail(self, call: _Call) -> None:
        """The caller learns after a while that there will be no answer."""
        self._forget(call)
        if call.open:
            call.open = False
            self._at(self.now_s + NOTICED_S, lambda: self._lost(call.child), of=call.child)

    def _lost(self, child: str) -> None:
        """A child has lost its parent: it looks for it."""
        self._joined[child] = 0
        for call in self._calls.pop(child, []):
            call.open = False
        self._join(child)

    def _forget(self, call: _Call) -> bool:
        """Wait for a call's answer no more; returns whether anybody did."""
        calls = self._calls.get(call.child, [])
        if call not in calls:
            return False
        calls.remove(call)
        return True

    def _is_deserted(self, path: str) -> bool:
        """Whether a node is a federation that has no child yet: such a one does not join its parent."""
        return path in self.nodes and self.nodes[path].has_parent and self.nodes[path].is_deserted

    # ---- who is there --------------------------------------------------------------------------------------------

    def _keep_away(self) -> None:
        """Clients that come late, and those for whom a federation has no place yet."""
        for path in self.nodes:
            clients = self._clients_of(path)
            there = [client for client in clients if not self.faults.comes_late(client)]
            for client in set(clients) - set(there[: self.specs[path].max_clients]):
                self.gone[client] = self._lives[client] = 0

    def _fill(self, parent: str) -> None:
        """Let those come whose time it is, as long as there are places."""
        clients, most = self._clients_of(parent), self.specs[parent].max_clients
        for client in clients:
            free = (math.inf if most is None else most) - sum(path not in self.gone for path in clients)
            if client in self.gone and free > 0 and not self._too_late and self.faults.is_member(client, self.now_s):
                self._revive(client, self.gone.pop(client) + 1)

    def _go(self, path: str) -> None:
        """A client leaves, once its parent cannot lose any more what it has pushed."""
        name = self.specs[path].name

        def heard(may_end: bool) -> None:
            if not may_end:
                self._at(self.now_s + NOTICED_S, lambda: self._go(path), of=path)
                return
            del self._words[path]
            self.gone[path], self._lives[path] = self._lives[path], 0
            self._record(LifeRecord(node=path, now_s=self.now_s, event="left"))
            self._fill(parent_path(path) or "world")
            self._give_up_late()

        if path not in self._words:
            self._save(path)
        self._words[path] = Left
        self._call(path, 0, lambda lives: Left(child=name, **lives), heard)

    def _give_up_late(self) -> None:
        """Once everybody who is there has ended, nobody waits for those who have never come."""
        if not self.gone:
            return
        there = [path for path in self.clients if path not in self.gone]
        if all(path in self._words for path in there) and (there or any(self.gone.values())):
            self._too_late = True
            for path, node in self.nodes.items():
                awaited = [name for name, child in node.children.items() if child.awaited]
                for name in awaited if self._lives[path] else ():
                    self._take(path, Done(child=name, to=node.incarnation, now_s=self.now_s))

    def _clients_of(self, path: str) -> list[str]:
        return [child.path for child in self.specs[path].children if child.kind == "client"]

    # ---- faults ------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Children tell that they live, and parents look who does not, for as long as anything else happens."""
        for child, life in self._lives.items():
            to = self._joined[child]
            if child != "world" and life and to:
                beat = Heartbeat(child=self.specs[child].name, now_s=self._arrival(child, 0), incarnation=life, to=to)
                self._at(beat.now_s, lambda child=child, beat=beat: self._hear(child, beat), beside=True)  # type: ignore[misc]
        for path in self.nodes:
            if self._lives[path]:
                self._take(path, Clock(now_s=self.now_s))
        if len(self._queue) > self._beside:
            self._at(self.now_s + self.plan.config.liveness.heartbeat_s, self._look, beside=True)

    def _hear(self, child: str, beat: Heartbeat) -> None:
        """A sign of life arrives; nobody waits for an answer."""
        parent, _ = self._parent(child)
        if self._lives[parent] and not self._faulty(child, "cut"):
            with suppress(MessageError):
                self._take(parent, beat)

    def _faulty(self, path: str, kind: str) -> bool:
        return bool(self.faults) and self.faults.now(path, kind, self.now_s)

    def _save_if_due(self, path: str) -> None:
        if self.faults and self.now_s - self._saved_s[path] >= self.plan.config.checkpoint.every_s:
            self._save(path)

    def _save(self, path: str) -> None:
        """A checkpoint. Where nothing can fail, nobody will read it."""
        if self._faulty(path, "disk"):
            self._refused_s.setdefault(path, self.now_s)
            return
        self._refused_s.pop(path, None)
        node = self.nodes.get(path)
        if self.faults:
            meta, arrays = (node or self.clients[path]).state()
            self._saved[path] = (
                json.loads(json.dumps(meta)),
                {name: np.array(values) for name, values in arrays.items()},
            )
        self._saved_s[path] = self.now_s
        if node is not None:
            node.saved(node.covers())

    def _kill(self, fault: Fault) -> None:
        path = fault.node
        if not self._lives[path]:
            return
        life, self._lives[path] = self._lives[path], 0
        self._end_training(path)
        for of_clients in (self._whole, self._merging, self._last):
            of_clients.discard(path)
        for call in self._calls.pop(path, []):
            call.open = False
        below = [calls for child, calls in self._calls.items() if parent_path(child) == path]
        for call in [call for calls in below for call in calls]:
            self._fail(call)
        self._record(LifeRecord(node=path, now_s=self.now_s, event="killed"))
        self._at(self.now_s + (fault.for_s or RESTART_S), lambda: self._revive(path, life + 1))

    def _revive(self, path: str, life: int) -> None:
        spec, found = self.specs[path], deepcopy(self._saved.get(path))
        self._lives[path] = life
        self._joined[path] = 0
        self._words.pop(path, None)
        self._catching_up.add(path)
        if path in self.clients:
            client = self.clients[path] = self._make_client(spec, dataset=self.clients[path].dataset)
            client.incarnation = life
            if found is not None:
                client.restore(*found)
            self._count(path)
        else:
            self._revive_node(path, life, found)
        self._record(LifeRecord(node=path, now_s=self.now_s, event="continued" if life > 1 else "started"))
        if path in self.clients and life == 1:
            self._introduce(path)
        if self._is_deserted(path):
            self._catching_up.discard(path)
        elif path != "world":
            self._join(path)

    def _revive_node(self, path: str, life: int, found: State | None) -> None:
        spec = self.specs[path]
        self.contributions[path] = build.contributions(self.plan, spec)
        node = self.nodes[path] = cost_model.inner_node(self.plan, spec, self.initial, self.contributions[path])
        if found is not None:
            node.restore(*found)
        node.incarnation = life
        self.audit[path].restored(now_s=self.now_s, incarnation=life, last_seq=node.covers().seqs)
        for command in node.resume():
            self._perform(path, command)
        for child in self.specs:
            # Those who wait for nothing find out by their heartbeat.
            if parent_path(child) == path and self._lives[child] and child in self._words:
                self._at(self.now_s + NOTICED_S, lambda child=child: self._lost(child), of=child)  # type: ignore[misc]
        self._give_up_late()

    # ---- the network and the clock -----------------------------------------------------------------------------

    def _arrival(self, edge: str, nbytes: int) -> float:
        """When a message over the link between a node (`edge`) and its parent arrives, either way."""
        link = self.specs[edge].settings.simulation
        late_s = self.faults.delay_s(edge, self.now_s) if self.faults else 0.0
        return self.now_s + link.latency_s + 8 * nbytes / (link.bandwidth_gbps * BITS_PER_GBIT) + late_s

    def _at(self, time_s: float, action: Callable[[], None], *, of: str | None = None, beside: bool = False) -> None:
        """Do something at a time, unless the node `of` whom it is has died by then.

        What is done `beside` does not keep the run going.
        """
        life = self._lives[of] if of is not None else 0

        def act() -> None:
            if of is None or self._lives[of] == life:
                action()

        self._beside += beside
        heapq.heappush(self._queue, (max(time_s, self.now_s), next(self._order), beside, act))

    def _parent(self, path: str) -> tuple[str, str]:
        parent = parent_path(path)
        assert parent is not None
        return parent, self.specs[path].name

    @property
    def _final_tokens(self) -> int:
        return self.plan.config.evaluation.final_tokens


def simulate(
    plan: Plan,
    *,
    on_progress: Callable[[Simulation], None] = lambda _: None,
    on_record: Callable[[Record], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Simulate a run and write its run folder (which must be new: see worldlm_ray.plan.rundir).

    Args:
        plan: the run.
        on_progress: called after every event.
        on_record: called with whatever is recorded.
        should_stop: asked between events; True ends the run early and cleanly.
    """
    tracker = open_tracker(plan)
    train = plan.root.settings.simulation.train
    try:
        simulation = Simulation(
            plan if train else cost_model.cost_plan(plan),
            tracker,
            make_client=Client if train else cost_model.CostClient,
            on_event=lambda: on_progress(simulation),
            on_record=on_record,
            should_stop=should_stop,
        )
        return simulation.conclude(simulation.run())
    finally:
        tracker.close()


def _cut_texts(plan: Plan) -> None:
    """Read a text that many clients share out once, not once for each of them."""
    if isinstance(plan, cost_model.CostPlan):
        return
    alike: dict[str, list[DataConfig]] = {}
    for spec in plan.root.clients:
        alike.setdefault(spec.key, []).append(spec.settings.data)
    for key, configs in alike.items():
        prepare_shards(configs, context=plan.shape.context, key=f"{key}.data")
