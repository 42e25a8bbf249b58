"""The second shell: a whole world in one process, under a virtual clock.

Training is real; time is not. A queue of events, ordered by virtual time and then by the order in which they
were scheduled, stands for the machines and the network: a local round takes its tokens over the client's
`simulation.tokens_per_s`, a message takes its bytes over the link's bandwidth plus its latency, aggregation takes
nothing. The same seed and configuration give the same bits, whatever machine this runs on does meanwhile.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import replace
from itertools import count

from worldlm_ray import checkpoint
from worldlm_ray.aggregation.events import (
    Answer,
    Charge,
    Clock,
    Command,
    Done,
    Event,
    Exchange,
    Finish,
    Note,
    ParentModel,
    Pull,
    Push,
    Serve,
    Wake,
)
from worldlm_ray.aggregation.node import Node
from worldlm_ray.client import Client
from worldlm_ray.messages import Model, pack
from worldlm_ray.outcome import Outcome, combine, finish
from worldlm_ray.plan import Plan
from worldlm_ray.records import LifeRecord, PullRecord, PushRecord, Record
from worldlm_ray.tracking import Tracker
from worldlm_ray.tree import parent_path

BITS_PER_GBIT = 1e9


class Simulation:
    """One simulated run.

    Args:
        plan: the run.
        tracker: where to record what happens.
        on_event: called after every event, for a progress display.
        on_record: called with whatever is recorded.
        should_stop: asked between events; True ends the run early.
    """

    def __init__(
        self,
        plan: Plan,
        tracker: Tracker,
        *,
        on_event: Callable[[], None] = lambda: None,
        on_record: Callable[[Record], None] = lambda _: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.plan, self.tracker = plan, tracker
        self.on_event, self.on_record, self.should_stop = on_event, on_record, should_stop
        self.now_s = 0.0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self.initial = plan.initial()
        self.specs = {spec.path: spec for spec in plan.root.walk()}
        self.contributions = {s.path: plan.contributions(s) for s in plan.root.inner}
        self.nodes: dict[str, Node] = {
            s.path: plan.inner_node(s, self.initial, self.contributions[s.path]) for s in plan.root.inner
        }
        self.clients = {spec.path: Client(plan, spec) for spec in plan.root.clients}
        self._busy_s = dict.fromkeys(self.clients, 0.0)
        self._begun_tokens = self._trained_tokens = 0

    def run(self) -> str:
        """Run to the end of the budget.

        Returns:
            `finished`, or `stopped` if `should_stop` said so.
        """
        for path, client in self.clients.items():
            self._record(client.start_record(now_s=self.now_s))
            self._pull(path)
        while self._queue:
            if self.should_stop():
                return "stopped"
            self.now_s, _, action = heapq.heappop(self._queue)
            action()
            self.on_event()
        return "finished"

    def conclude(self, status: str) -> Outcome:
        """Measure every model, write checkpoints and summary.json."""
        measures = {path: client.report(self._final_tokens) for path, client in self.clients.items()}
        for path, node in self.nodes.items():
            below = [self.clients[spec.path] for spec in self.specs[path].clients]
            measures[path] = combine(c.report(self._final_tokens, parameters=node.theta) for c in below)
        for path, part in (self.nodes | self.clients).items():
            checkpoint.save(checkpoint.folder(self.plan.run_dir, path), *part.state())
        return finish(
            self.plan,
            self.tracker,
            world=self.nodes["world"].theta,
            measures=measures,
            samples={path: client.sample() for path, client in self.clients.items()},
            wall_s=self.now_s,
            status=status,
            shell="simulate",
        )

    # ---- clients ---------------------------------------------------------------------------------------------

    def _pull(self, path: str) -> None:
        client = self.clients[path]
        parent, name = self._parent(path)
        if client.is_done:
            self._leave(path)
            return
        started = client.started_tokens
        self._send(path, 0, lambda: self._deliver(parent, Pull(child=name, started_tokens=started, now_s=self.now_s)))

    def _receive(self, path: str, model: Model) -> None:
        client = self.clients[path]
        model = self._budgeted(model)
        records = [] if model.finished else client.begin(model, now_s=self.now_s)
        if not client.began:
            self._leave(path)
            return
        for record in records:
            self._record(record)
        self._begun_tokens += client.round_tokens
        client.train()
        train_s = client.round_tokens / self.specs[path].settings.simulation.tokens_per_s
        self._busy_s[path] += train_s
        self._at(self.now_s + train_s, lambda: self._end_round(path, train_s))

    def _leave(self, path: str) -> None:
        """A client's last word."""
        parent, name = self._parent(path)
        self._send(path, 0, lambda: self._deliver(parent, Done(child=name, now_s=self.now_s)))
        detail = self.clients[path].last_word
        self._record(LifeRecord(node=path, now_s=self.now_s, event="finished", detail=detail))

    def _budgeted(self, model: Model) -> Model:
        """Spend a budget in tokens to the round, however late the world would hear of it.

        Here all tokens are known at once. On Ray the world counts them, from what its children tell in their exchanges,
        and overshoots by what is begun meanwhile: asynchronous methods that exchange seldom would train most.
        """
        budget = self.plan.config.budget.tokens
        if budget is None or self.nodes["world"].synchronous:  # synchronous children all hear the same
            return model
        progress = max(model.progress, min(self._trained_tokens / budget, 1.0))
        return replace(model, progress=progress, finished=model.finished or self._begun_tokens >= budget)

    def _end_round(self, path: str, train_s: float) -> None:
        client = self.clients[path]
        self._trained_tokens += client.round_tokens
        measure = client.measure(self.plan.config.evaluation.tokens) if client.measure_is_due else None
        busy = self._busy_s[path] / self.now_s
        self._record(client.round_record(now_s=self.now_s, train_s=train_s, busy_fraction=busy, measure=measure))
        packed = pack(client.update(), self.plan.layout)
        self._record(PushRecord(node=path, now_s=self.now_s, bytes=packed.nbytes))
        parent, name = self._parent(path)
        self._send(
            path,
            packed.nbytes,
            lambda: self._deliver(parent, Push(sender=name, packed=packed, now_s=self.now_s)),
        )

    # ---- inner nodes -----------------------------------------------------------------------------------------

    def _deliver(self, path: str, event: Event) -> None:
        node = self.nodes[path]
        for command in node.handle(event):
            self._perform(path, command)

    def _perform(self, path: str, command: Command) -> None:
        if isinstance(command, Note):
            self._record(command.record)
        elif isinstance(command, Charge):
            ledgers = self.contributions[path]
            assert ledgers is not None
            ledgers.charge(command.child)
        elif isinstance(command, Answer):
            child = f"{path}/{command.child}"
            if child in self.clients and not command.verdict.accepted:
                self.clients[child].refused(command.verdict.reason)
            self._send(child, 0, lambda: self._pull(child) if child in self.clients else self._pull_up(child))
        elif isinstance(command, Serve):
            self._serve(f"{path}/{command.child}", command.model)
        elif isinstance(command, Exchange):
            packed = pack(self.nodes[path].begin_exchange(), self.plan.layout)
            parent, name = self._parent(path)
            self._record(PushRecord(node=path, now_s=self.now_s, bytes=packed.nbytes))
            self._send(
                path,
                packed.nbytes,
                lambda: self._deliver(parent, Push(sender=name, packed=packed, now_s=self.now_s)),
            )
        elif isinstance(command, Wake):
            self._at(command.at_s, lambda: self._deliver(path, Clock(now_s=self.now_s)))
        elif isinstance(command, Finish):
            self._finish(path)

    def _pull_up(self, path: str) -> None:
        parent, name = self._parent(path)
        started = self.nodes[path].started_tokens
        self._send(path, 0, lambda: self._deliver(parent, Pull(child=name, started_tokens=started, now_s=self.now_s)))

    def _serve(self, child: str, model: Model) -> None:
        size = pack(model, self.plan.layout).nbytes
        self._record(PullRecord(node=child, now_s=self.now_s, version=model.version, bytes=size))
        if child in self.clients:
            self._send(child, size, lambda: self._receive(child, model))
        else:
            self._send(child, size, lambda: self._deliver(child, ParentModel(model=model, now_s=self.now_s)))

    def _finish(self, path: str) -> None:
        self._record(LifeRecord(node=path, now_s=self.now_s, event="finished", version=self.nodes[path].version))
        if path != "world":
            parent, name = self._parent(path)
            self._send(path, 0, lambda: self._deliver(parent, Done(child=name, now_s=self.now_s)))

    def _record(self, record: Record) -> None:
        self.tracker.record(record)
        self.on_record(record)

    # ---- the network and the clock -----------------------------------------------------------------------------

    def _send(self, edge: str, nbytes: int, action: Callable[[], None]) -> None:
        """Carry a message over the link between a node (`edge`) and its parent, either way."""
        link = self.specs[edge].settings.simulation
        self._at(self.now_s + link.latency_s + 8 * nbytes / (link.bandwidth_gbps * BITS_PER_GBIT), action)

    def _at(self, time_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (max(time_s, self.now_s), next(self._order), action))

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
    """Simulate a run and write its run folder (which must be new: see worldlm_ray.rundir).

    Args:
        plan: the run.
        on_progress: called after every event.
        on_record: called with whatever is recorded.
        should_stop: asked between events; True ends the run early and cleanly.
    """
    tracker = Tracker(plan.run_dir, kinds=plan.kinds, hparams=plan.hparams(), budget=plan.config.budget)
    try:
        simulation = Simulation(
            plan,
            tracker,
            on_event=lambda: on_progress(simulation),
            on_record=on_record,
            should_stop=should_stop,
        )
        return simulation.conclude(simulation.run())
    finally:
        tracker.close()
