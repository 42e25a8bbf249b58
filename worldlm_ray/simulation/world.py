"""What the parts of a simulation share: who is there, who is alive, and where records go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from worldlm_ray.aggregation.node import Node
from worldlm_ray.client.client import Client
from worldlm_ray.exchange.messages import Model, Packed, Update, buffer_of, pack
from worldlm_ray.plan import build
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.tree import NodeSpec, parent_path
from worldlm_ray.protocol.child import Child, Steps, Uplink
from worldlm_ray.protocol.node_child import NodeAsChild
from worldlm_ray.records import LifeRecord, Record
from worldlm_ray.simulation import cost_model
from worldlm_ray.simulation.budget import Budget
from worldlm_ray.simulation.clock import Clock
from worldlm_ray.simulation.cost_model import CostClient, CostPlan
from worldlm_ray.tensors.buffers import Flat


class MakeClient(Protocol):
    """Makes the client of a node: `Client`, `CostClient`, or a class derived from one of them."""

    def __call__(self, plan: Plan, spec: NodeSpec, *, initial: Flat, dataset: Any = None) -> Client | CostClient:
        """A client.

        Args:
            plan: the run.
            spec: the client's node.
            initial: the run's initial parameters.
            dataset: its text; opened anew where None is given.
        """


class World:
    """The nodes of a simulated run.

    Args:
        plan: the run.
        record: takes records.
        make_client: makes the client of a node.
    """

    def __init__(self, plan: Plan, *, record: Callable[[Record], None], make_client: MakeClient) -> None:
        self.plan, self.faults, self.record = plan, plan.faults, record
        self.specs = {spec.path: spec for spec in plan.root.walk()}
        self.incarnations = dict.fromkeys(self.specs, 1)
        """By path; 0 while the node is dead."""
        self.clock = clock = Clock(self.incarnations)
        self.now_s: Callable[[], float] = lambda: clock.now_s
        """Gives the virtual time; one for all nodes."""
        self.initial = cost_model.initial(plan)
        self.contributions = {spec.path: build.contributions(plan, spec) for spec in plan.root.inner}
        self.nodes = {path: self._make_node(path) for path in self.contributions}
        self._make_client = make_client
        self.clients: dict[str, Any] = {spec.path: self.make_client(spec.path) for spec in plan.root.clients}
        # Synchronous children all hear the same.
        tokens = None if self.nodes["world"].synchronous else plan.config.budget.tokens
        self.budget = Budget(tokens, self.clients, self.incarnations)
        self.uplinks: dict[str, SimulatedUplink] = {}
        """Of every child, by path."""
        for path in self.specs:
            if path != "world":
                self.connect(path)
        self.absent: dict[str, int] = {}
        """Clients that are not there, since they come late, have no slot or have left, by their last incarnation."""
        self.final: set[str] = set()
        """Children that have said that they train no more, or are saying it."""
        self.catching_up: set[str] = set()
        """Federations that are joining their parent and sending it again what it has lost."""

    def _make_node(self, path: str) -> Node:
        paid, watch = self.contributions[path], bool(self.faults)
        return cost_model.inner_node(self.plan, self.specs[path], self.initial, paid, watch=watch)

    def start_node(self, path: str) -> Node:
        """A new inner node in place of one that died."""
        self.contributions[path] = build.contributions(self.plan, self.specs[path])
        self.nodes[path] = self._make_node(path)
        if path != "world":
            self.connect(path)
        return self.nodes[path]

    def make_client(self, path: str, **more: Any) -> Any:
        """A new client of a node."""
        return self._make_client(self.plan, self.specs[path], initial=self.initial, **more)

    def child(self, path: str) -> Any:
        """The client or federation of a path."""
        return self.clients.get(path) or self.nodes[path]

    def connect(self, path: str) -> None:
        """Give a child a link to its parent that has not joined yet."""
        child = self.clients.get(path) or NodeAsChild(self.nodes[path])
        self.uplinks[path] = SimulatedUplink(self, path, child)

    def parent(self, path: str) -> str:
        """Path of a child's parent."""
        above = parent_path(path)
        assert above is not None
        return above

    def clients_of(self, path: str) -> list[str]:
        """Clients directly below a node."""
        return [child.path for child in self.specs[path].children if child.kind == "client"]

    def has_never_joined(self, path: str) -> bool:
        """Whether a node is a federation that has no child yet: such a one does not join its parent."""
        return path in self.nodes and path != "world" and self.nodes[path].children.have_never_joined

    def tell(self, *records: Record) -> None:
        """Take records."""
        for record in records:
            self.record(record)

    def note(self, path: str, event: str, detail: str = "", **more: Any) -> None:
        """Record an event in a node's life."""
        self.record(LifeRecord(node=path, now_s=self.clock.now_s, event=event, detail=detail, **more))

    def warn(self, path: str, text: str) -> None:
        """Record a warning of a node."""
        self.note(path, "warning", text)

    def packed(self, child: str, header: bytes, update: Update) -> Packed:
        """A child's update on the wire."""
        counts_as = self.plan.up_bytes(self.specs[child]) if isinstance(self.plan, CostPlan) else None
        return Packed(header, buffer_of(update), counts_as)

    def bytes_down(self, model: Model) -> int:
        """Of a model on the wire."""
        found = pack(model, self.plan.layout).nbytes
        if isinstance(self.plan, CostPlan):
            found += self.plan.real.nbytes - self.plan.layout.nbytes
        return found


class SimulatedUplink(Uplink):
    """A child's link in a simulation: models arrive as they are, and bytes are those of the real model.

    Args:
        world: the nodes.
        path: of the child.
        child: the client or federation.
    """

    def __init__(self, world: World, path: str, child: Child) -> None:
        super().__init__(world.plan, path, child, tell=world.record, now_s=world.now_s)
        self._world, self._plan, self._spec = world, world.plan, world.specs[path]

    @property
    def knows_parent(self) -> bool:
        """Whether the parent is the one that was joined, or is dead."""
        return self._world.incarnations[self._world.parent(self._path)] in (0, self._to)

    def done(self) -> Steps[None]:
        """See Uplink."""
        self._world.final.add(self._path)
        yield from super().done()

    def _size(self, header: bytes, update: Update) -> int:
        if isinstance(self._plan, CostPlan):
            return len(header) + self._plan.up_bytes(self._spec)
        return super()._size(header, update)

    def _read(self, answer: tuple[Model, int]) -> tuple[Model, int]:
        model, size = answer
        return (self._world.budget.apply(model) if self._spec.kind == "client" else model), size
