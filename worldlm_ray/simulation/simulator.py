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
something can fail, children send heartbeats and parents look at the clock, all of them at once every
`liveness.heartbeat_s`. Where nothing can fail, no child can be silent, and no parent looks.

Clients come and go as on Ray, too: by the fault script, and in federations that have fewer places than clients.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from worldlm_ray.client.client import Client
from worldlm_ray.config.schema import DataConfig
from worldlm_ray.data import prepare_shards
from worldlm_ray.plan.border_checks import check_one_cluster
from worldlm_ray.plan.plan import Plan
from worldlm_ray.records import Record
from worldlm_ray.reports.outcome import Outcome, combine, finish, sampled
from worldlm_ray.simulation.clients import Clients
from worldlm_ray.simulation.cost_model import CostClient, CostPlan, cost_plan
from worldlm_ray.simulation.inner import InnerNodes
from worldlm_ray.simulation.members import Members
from worldlm_ray.simulation.restarts import Checkpoints, Restarts
from worldlm_ray.simulation.world import MakeClient, World
from worldlm_ray.storage import checkpoint, open_files
from worldlm_ray.tracking import log_lines
from worldlm_ray.tracking.tracker import Tracker, open_tracker


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
        make_client: MakeClient = Client,
    ) -> None:
        self.plan, self.tracker = plan, tracker
        self.on_event, self.on_record, self.should_stop = on_event, on_record, should_stop
        open_files.raise_limit()
        _cut_texts(plan)
        self._world = world = World(plan, record=self._record, make_client=make_client)
        self._clock, self.nodes, self.clients, self.absent = world.clock, world.nodes, world.clients, world.absent
        checkpoints = Checkpoints(world)
        self._inner = InnerNodes(world, checkpoints)
        self._members = Members(world, self._inner)
        self._clients = Clients(world, self._inner.network, self._members, checkpoints)
        self._restarts = Restarts(world, checkpoints, self._inner, self._clients, self._members)
        self._members.restarts = self._restarts
        self.speeds = self._clients.speeds
        """Tokens per second of every client."""

    @property
    def now_s(self) -> float:
        """Virtual time, in seconds."""
        return self._clock.now_s

    @property
    def events(self) -> int:
        """Events handled so far."""
        return self._clock.events

    def run(self) -> str:
        """Run to the end of the budget.

        Returns:
            `finished`, or `stopped` if `should_stop` said so.
        """
        world, clock = self._world, self._clock
        for fault in world.faults.all:
            if fault.kind == "kill":
                clock.at(fault.at_s, lambda fault=fault: self._restarts.kill(fault))  # type: ignore[misc]
            elif fault.kind == "join":
                parent = world.parent(fault.node)
                clock.at(fault.at_s, lambda parent=parent: self._members.fill(parent))  # type: ignore[misc]
        self._members.keep_away()
        for path in world.specs:
            if path in world.clients and path not in world.absent:
                self._clients.begin(path)
            elif path in world.nodes and path != "world" and not world.has_never_joined(path):
                self._inner.network.start(path, world.uplinks[path].join())
        self._inner.network.has_begun = True
        if world.faults:
            clock.at(self.plan.config.liveness.heartbeat_s, self._look, background=True)
        while not clock.is_empty and not (world.faults and self._is_over()):
            if self.should_stop():
                return "stopped"
            clock.step()
            self.on_event()
        return "finished"

    def _look(self) -> None:
        """Children send heartbeats, and parents look which are silent, for as long as anything else happens."""
        self._inner.network.heartbeats()
        self._inner.look_at_the_clock()
        if not self._clock.is_idle:
            self._clock.after(self.plan.config.liveness.heartbeat_s, self._look, background=True)

    def _is_over(self) -> bool:
        """Whether all nodes are alive and have sent their final message: faults that come later find none."""
        world = self._world
        there = [path for path in world.specs if path not in world.absent]
        ended = all(node.ended for node in world.nodes.values()) and all(world.incarnations[path] for path in there)
        return ended and all(path in world.final for path in there if path != "world")

    def conclude(self, status: str, *, measured: Collection[str] | None = None) -> Outcome:
        """Measure the models, write checkpoints and summary.json.

        Args:
            status: of the run.
            measured: the inner nodes that are measured; all of them unless given.
        """
        self._inner.flush()
        common: dict[str, Any] = {"wall_s": self.now_s, "status": status, "backend": "simulate"}
        if isinstance(self.plan, CostPlan):
            return finish(self.plan, self.tracker, world=None, measures={}, samples={}, **common)
        tokens = self.plan.config.evaluation.final_tokens
        there = {path: client for path, client in self.clients.items() if path not in self.absent}
        found = {path: {path: client.report(tokens)} for path, client in there.items()}
        for path in self.nodes if measured is None else measured:
            below = [spec.path for spec in self._world.specs[path].clients if spec.path in there]
            found[path] = {client: there[client].report(tokens, parameters=self.nodes[path].theta) for client in below}
        texts = {path: {client: m for client, m in each.items() if m is not None} for path, each in found.items()}
        measures = {path: combine(each.values()) for path, each in texts.items()}
        for path, part in (self.nodes | self.clients).items():
            checkpoint.save(checkpoint.folder(self.plan.run_dir, path), *part.state())
        samples = {path: sampled(client.sample) for path, client in there.items()}
        theta = self.nodes["world"].theta
        outcome = finish(self.plan, self.tracker, world=theta, measures=measures, samples=samples, **common)
        return replace(outcome, texts=texts)

    def _record(self, record: Record) -> None:
        log_lines.note(record)
        self.tracker.record(record)
        self.on_record(record)


def simulate(
    plan: Plan,
    *,
    on_progress: Callable[[Simulation], None] = lambda _: None,
    on_record: Callable[[Record], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
    measured: Collection[str] | None = None,
) -> Outcome:
    """Simulate a run and write its run folder (which must be new: see worldlm_ray.plan.rundir).

    Args:
        plan: the run.
        on_progress: called after every event.
        on_record: called with whatever is recorded.
        should_stop: asked between events; True ends the run early and cleanly.
        measured: the inner nodes that are measured at the end; all of them unless given. The loss of another one is its
            last of the run.

    Raises:
        ConfigError: a node is in another cluster.
    """
    check_one_cluster(plan.root, "a simulation")
    tracker = open_tracker(plan)
    train = plan.root.settings.simulation.train
    try:
        simulation = Simulation(
            plan if train else cost_plan(plan),
            tracker,
            make_client=Client if train else CostClient,
            on_event=lambda: on_progress(simulation),
            on_record=on_record,
            should_stop=should_stop,
        )
        return simulation.conclude(simulation.run(), measured=measured)
    finally:
        tracker.close()


def _cut_texts(plan: Plan) -> None:
    """Read a text that many clients share out once, not once for each of them."""
    if isinstance(plan, CostPlan):
        return
    alike: dict[str, list[DataConfig]] = {}
    for spec in plan.root.clients:
        alike.setdefault(spec.key, []).append(spec.settings.data)
    for key, configs in alike.items():
        prepare_shards(configs, context=plan.shape.context, key=f"{key}.data")
