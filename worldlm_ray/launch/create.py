"""The actors of a run: make them, or find those of a run that lives."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray

from actors.client import ClientActor
from actors.client_pool import ClientPoolActor
from actors.federation import FederationActor
from actors.plans import StoredPlan, to_send
from actors.recorder import RecorderActor
from actors.shared import RECORDER, Address, settle
from actors.world import WorldActor
from worldlm_ray.launch import cluster, hosts
from worldlm_ray.launch.calls import Observer
from worldlm_ray.launch.private.reservations import give_back, prefix
from worldlm_ray.plan import rundir, tree
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.tree import NodeSpec
from worldlm_ray.run_clock import Anchor, RunClock, this_machine
from worldlm_ray.training.deepspeed_config import is_zero

ACTORS = {"world": WorldActor, "federation": FederationActor, "client": ClientActor}


@dataclass
class World:
    """The actors of a run, by path."""

    recorder: Any
    namespace: str
    clock: RunClock
    began_s: float
    """Run time at which this stretch of the run began."""
    local: bool
    """Whether the cluster ends with this process."""
    inner: dict[str, Any] = field(default_factory=dict)
    clients: dict[str, Any] = field(default_factory=dict)

    @property
    def actors(self) -> list[Any]:
        """All of them, parents first."""
        return [self.recorder, *self.inner.values(), *dict.fromkeys(map(hosts.actor_of, self.clients.values()))]

    @property
    def hosts(self) -> dict[str, list[str]]:
        """Paths of clients that share an actor, by its name."""
        found: dict[Any, list[str]] = {}
        for path, client in self.clients.items():
            if isinstance(client, hosts.Member):
                found.setdefault(client.host, []).append(path)
        return {hosts.name_of(paths[0]): paths for paths in found.values()}

    def __getitem__(self, path: str) -> Any:
        return self.inner[path] if path in self.inner else self.clients[path]

    def end(self, path: str) -> None:
        """End a client's actor, with what it has reserved; a client pool stays for its other clients."""
        client = self.clients.pop(path)
        if not isinstance(client, hosts.Member):
            ray.kill(client)
            give_back(prefix(self.namespace, path))


def create_world(plan: Plan, observer: Observer, *, local: bool) -> World:
    """Make an actor of every node: each finds its parent and the recorder by name."""
    namespace = f"worldlm-{plan.config.name}-{secrets.token_hex(4)}"
    # Calls during a restart are retried (at least once): duplicate records are acceptable, lost ones are not.
    options: dict[str, Any] = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
    options |= cluster.on_the_head() | lifetime(local)
    named = ray.remote(RecorderActor).options(name=RECORDER, namespace=namespace, **options)
    sent = to_send(plan)
    began_s = rundir.run_time_s(plan.run_dir)
    clock = RunClock.starting(began_s)
    recorder = named.remote(sent, clock, namespace)
    if not (local and this_machine()):  # it may have begun later, on another machine: it sets the time
        clock = _clock_of(recorder, namespace, plan, observer)
    world = World(recorder, namespace, clock, began_s, local)
    together = {group[0].path: group for group in tree.processes(plan.root) if len(group) > 1}
    shared = {spec.path for group in together.values() for spec in group}
    for spec in plan.root.inner:
        world.inner[spec.path] = create(sent, spec, world)
        clients = [child for child in spec.children if child.kind == "client"]
        there = [child for child in clients if plan.faults.is_member(child.path, began_s)]
        for child in there[: spec.max_clients]:
            if child.path in together:
                _create_pool(together[child.path], world, sent)
            elif child.path not in shared:
                world.clients[child.path] = create(sent, child, world, begin=spec.elastic)
    cluster.remember(
        plan,
        namespace=namespace,
        local=local,
        anchor=clock.anchor(),
        began_s=began_s,
        hosts=world.hosts,
    )
    return world


def _clock_of(recorder: Any, namespace: str, plan: Plan, observer: Observer) -> RunClock:
    """The run's clock as its recorder has it. A recorder that cannot start is ended."""
    try:
        return settle(RunClock(observer.ask(recorder, "anchor")), namespace, "", plan.run_dir)
    except BaseException:
        ray.kill(recorder)
        raise


def _create_pool(group: Sequence[NodeSpec], world: World, sent: Plan | StoredPlan) -> None:
    """Make one actor for several clients."""
    paths = [spec.path for spec in group]
    options = options_of(group[0]) | {"max_concurrency": 10_000} | lifetime(world.local)
    actor = ray.remote(ClientPoolActor).options(name=hosts.name_of(paths[0]), namespace=world.namespace, **options)
    pool = actor.remote(Address(sent, paths[0], world.clock, world.namespace), paths)
    world.clients |= {path: hosts.Member(pool, path) for path in paths}


def create(
    sent: Plan | StoredPlan,
    spec: NodeSpec,
    world: World,
    *,
    begin: bool = False,
    detached: bool = False,
) -> Any:
    """Make the actor of one node.

    Args:
        sent: the run's plan, as its actors are given it.
        spec: the node.
        world: the run's other actors.
        begin: whether it begins without a call of `start`, as soon as there is room for it.
        detached: whether it outlives this process even on a cluster that ends with another one.
    """
    options = options_of(spec) | lifetime(world.local and not detached)
    actor = ray.remote(_actor_class(spec)).options(name=spec.path, namespace=world.namespace, **options)
    return actor.remote(Address(sent, spec.path, world.clock, world.namespace, begin))


def lifetime(local: bool) -> dict[str, Any]:
    """On a cluster that another process started, actors outlive the process that made them."""
    return {} if local else {"lifetime": "detached"}


def find(plan: Plan) -> World | None:
    """The actors of a run that lives on this cluster, started by any process; None if it does not."""
    place = cluster.recall(plan.run_dir)
    if place is None or place["address"] != ray.get_runtime_context().gcs_address:
        return None
    try:
        recorder, namespace = _named(RECORDER, place), place["namespace"]
        clock = settle(RunClock(Anchor.from_mapping(place["anchor"])), namespace, "", plan.run_dir)
        world = World(recorder, namespace, clock, place["began_s"], place["local"])
        world.inner = {spec.path: _named(spec.path, place) for spec in plan.root.inner}
    except (ValueError, KeyError, TypeError):
        return None
    shared = {path: name for name, paths in place.get("hosts", {}).items() for path in paths}
    found = {name: _named(name, place) for name in dict.fromkeys(shared.values())}
    for spec in plan.root.clients:
        if spec.path in shared:
            world.clients[spec.path] = hosts.Member(found[shared[spec.path]], spec.path)
            continue
        with suppress(ValueError):  # of an elastic federation, not all are there
            world.clients[spec.path] = _named(spec.path, place)
    return world


def _named(name: str, place: dict[str, Any]) -> Any:
    return ray.get_actor(name, namespace=place["namespace"])


def _actor_class(spec: NodeSpec) -> type:
    if spec.kind == "client" and is_zero(spec.settings):
        # Ray Train takes two seconds to import, which worlds without such a client need not wait for.
        from actors.zero.client import ZeroClientActor

        return ZeroClientActor
    return ACTORS[spec.kind]


def options_of(spec: NodeSpec) -> dict[str, Any]:
    """Ray's options of a node's actor: what it reserves, how many calls run in it, where it is placed."""
    settings = spec.settings
    # An actor that dies is started again and goes on from its checkpoint, without being told to.
    # An inner node is asynchronous: as many children as there are may wait in it.
    options: dict[str, Any] = {"num_cpus": 0, "max_concurrency": 10_000, "max_restarts": -1}
    if spec.kind == "client":
        # The client's life takes one thread; `outcome` takes another for as long.
        options = {
            "num_cpus": settings.resources.cpus,
            "num_gpus": settings.resources.gpus,
            "max_concurrency": 4,
            "max_restarts": -1,
            "max_task_retries": -1,
        }
        if is_zero(settings):
            # Its workers reserve what they use, all together or not at all, and call the actor from their side, too,
            # while at the end every node above has its own model measured.
            threads = 6 + cluster.workers(spec) + spec.path.count("/")
            options |= {"num_cpus": 0, "num_gpus": 0, "max_concurrency": threads}
    if settings.placement.labels:
        options["label_selector"] = dict(settings.placement.labels)
    elif spec.kind == "world":
        # Anywhere else, the loss of one more machine would cut the federations off.
        options |= cluster.on_the_head()
    return options
