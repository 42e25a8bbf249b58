"""The actors of a run: make them, or find those of a run that lives."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ray

from actors.client import ClientActor
from actors.client_pool import ClientPoolActor
from actors.federation import FederationActor
from actors.plans import StoredPlan, to_send
from actors.recorder import RecorderActor
from actors.shared import RECORDER, Address, settle
from actors.world import WorldActor
from worldlm_ray.launch import border, cluster
from worldlm_ray.launch.calls import Observer
from worldlm_ray.launch.pools import POOL, Member, Pool, name_of
from worldlm_ray.launch.private.reservations import give_back, prefix
from worldlm_ray.plan import living, rundir, tree
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
    pools: dict[str, Pool] = field(default_factory=dict)
    """Actors in which several clients live, by name."""
    border: list[Any] = field(default_factory=list)
    """Actors of the border to other clusters (worldlm_ray/launch/border.py)."""
    run_dir: Path = field(kw_only=True)

    @property
    def actors(self) -> list[Any]:
        """All of them, parents first."""
        pools = [pool.actor for pool in self.pools.values()]
        alone = [client for client in self.clients.values() if not isinstance(client, Member)]
        return [self.recorder, *self.border, *self.inner.values(), *pools, *alone]

    @property
    def pool_names(self) -> dict[str, str]:
        """Names of their pools by the paths of the clients that live in one."""
        return {path: client.pool.name for path, client in self.clients.items() if isinstance(client, Member)}

    def __getitem__(self, path: str) -> Any:
        return self.inner[path] if path in self.inner else self.clients[path]

    def enter(self, path: str, pool: Pool) -> Member:
        """A client lives in a pool from now on."""
        if path not in pool.paths:
            pool.paths.append(path)
        self.clients[path] = member = Member(pool, path)
        return member

    def take_out(self, path: str) -> None:
        """A client has left, or never came. An actor that is without clients by this is ended by `end_unused`."""
        client = self.clients.pop(path)
        if not isinstance(client, Member):
            ray.kill(client)
            give_back(prefix(self.namespace, path))
            return
        client.pool.paths.remove(path)
        living.leave_pools(self.run_dir, [path])

    def note(self, path: str) -> None:
        """Write down in which pool a client lives that has come while the run goes on."""
        if isinstance(client := self.clients[path], Member):
            living.enter_pool(self.run_dir, path, client.pool.name)

    def end_unused(self) -> None:
        """End pools in which no client lives any more: others may need their cores."""
        for pool in [pool for pool in self.pools.values() if not pool.paths]:
            ray.kill(pool.actor)
            del self.pools[pool.name]
            living.end_pool(self.run_dir, pool.name)


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
    world = World(recorder, namespace, clock, began_s, local, run_dir=plan.run_dir)
    world.border = border.create(plan, sent, clock, namespace, lifetime(local))
    for spec in plan.root.parents:
        if not spec.remote:
            world.inner[spec.path] = create(sent, spec, world)
        clients = [child for child in spec.children if child.kind == "client"]
        there = [child for child in clients if plan.faults.is_member(child.path, began_s)]
        for group in tree.in_processes(there[: spec.max_clients]):
            if group[0].settings.resources.clients_per_process > 1:
                _create_pool(sent, group, world, name_of(group[0].path), begin=spec.elastic)
            else:
                world.clients[group[0].path] = create(sent, group[0], world, begin=spec.elastic)
    place = {
        "address": ray.get_runtime_context().gcs_address,
        "namespace": namespace,
        "local": local,
        "anchor": asdict(clock.anchor()),
        "began_s": began_s,
        "pools": {pool.name: pool.paths for pool in world.pools.values()},
    }
    living.remember(plan.run_dir, place)
    return world


def _clock_of(recorder: Any, namespace: str, plan: Plan, observer: Observer) -> RunClock:
    """The run's clock as its recorder has it. A recorder that cannot start is ended."""
    try:
        return settle(RunClock(observer.ask(recorder, "anchor")), namespace, "", plan.run_dir)
    except BaseException:
        ray.kill(recorder)
        raise


def take_in(sent: Plan | StoredPlan, spec: NodeSpec, world: World, *, begin: bool, detached: bool = False) -> Any:
    """Give a client a place while the run goes on: in a pool that has room for it, or with a new actor.

    Args:
        sent: the run's plan, as its actors are given it.
        spec: the client.
        world: the run's other actors; the client is added.
        begin: whether a new actor begins without a call of `start`. A pool that is there is to be told (`live`).
        detached: whether a new actor outlives this process even on a cluster that ends with another one.
    """
    if spec.settings.resources.clients_per_process == 1:
        world.clients[spec.path] = create(sent, spec, world, begin=begin, detached=detached)
        return world.clients[spec.path]
    pool = next((pool for pool in world.pools.values() if pool.has_room_for(spec)), None)
    if pool is not None:
        return world.enter(spec.path, pool)
    # A pool that was ended a moment ago may have its first client's name still, and one that lives may have it, too.
    name = f"{name_of(spec.path)}{POOL}{secrets.token_hex(4)}"
    _create_pool(sent, [spec], world, name, begin=begin, detached=detached)
    return world.clients[spec.path]


def _create_pool(
    sent: Plan | StoredPlan,
    group: Sequence[NodeSpec],
    world: World,
    name: str,
    *,
    begin: bool,
    detached: bool = False,
) -> None:
    """Make one actor for several clients."""
    paths = [spec.path for spec in group]
    options = options_of(group[0]) | {"max_concurrency": 10_000} | lifetime(world.local and not detached)
    actor = ray.remote(ClientPoolActor).options(name=name, namespace=world.namespace, **options)
    address = Address(sent, paths[0], world.clock, world.namespace, begin)
    pool = world.pools[name] = Pool(name, actor.remote(address, paths, name), group[0])
    for path in paths:
        world.enter(path, pool)


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
    place = living.recall(plan.run_dir)
    if place is None or place["address"] != ray.get_runtime_context().gcs_address:
        return None
    try:
        recorder, namespace = _named(RECORDER, place), place["namespace"]
        clock = settle(RunClock(Anchor.from_mapping(place["anchor"])), namespace, "", plan.run_dir)
        world = World(recorder, namespace, clock, place["began_s"], place["local"], run_dir=plan.run_dir)
        world.border = [_named(name, place) for name in border.name_of(plan)]
        world.inner = {spec.path: _named(spec.path, place) for spec in plan.root.inner}
    except (ValueError, KeyError, TypeError):
        return None
    pool_of = {path: name for name, paths in place.get("pools", {}).items() for path in paths}
    for name in place.get("pools", {}):
        with suppress(ValueError):  # it may have ended since
            world.pools[name] = Pool(name, _named(name, place), None)
    for spec in plan.root.clients:
        pool = world.pools.get(pool_of.get(spec.path, ""))
        if pool is not None:
            pool.like = pool.like or spec
            world.enter(spec.path, pool)
            continue
        with suppress(ValueError):  # of an elastic federation, not all are there
            world.clients[spec.path] = _named(spec.path, place)
    return world


def find_newcomer(path: str, world: World) -> Any:
    """The actor of a client that another process has let in.

    Raises:
        ValueError: it is not there yet, or no more.
    """
    name = next((name for name, paths in living.pools(world.run_dir).items() if path in paths), None)
    if name is None:
        world.clients[path] = ray.get_actor(path, namespace=world.namespace)
        return world.clients[path]
    if name not in world.pools:
        world.pools[name] = Pool(name, ray.get_actor(name, namespace=world.namespace), None)
    return world.enter(path, world.pools[name])


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
