"""The life of a run on Ray."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, ObjectLostError, RayError, RayTaskError

from actors.client import ClientActor
from actors.client_pool import ClientPoolActor
from actors.federation import FederationActor
from actors.plans import StoredPlan, to_send
from actors.recorder import RecorderActor
from actors.shared import RECORDER, Address, settle
from actors.world import WorldActor
from worldlm_ray.errors import Interrupted, RunError, WorldLMError
from worldlm_ray.launch import cluster, hosts, preflight
from worldlm_ray.launch.private.reservations import give_back, prefix
from worldlm_ray.launch.watch import Monitor, Watch, ask
from worldlm_ray.plan import rundir, tree
from worldlm_ray.plan.faults import Fault
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.tree import NodeSpec
from worldlm_ray.records import Measure
from worldlm_ray.reports.outcome import Outcome, Sample, combine, sampled
from worldlm_ray.reports.progress import MEASURING, SAVING, TRAINING
from worldlm_ray.reports.tables import MANY
from worldlm_ray.run_clock import Anchor, RunClock, this_machine
from worldlm_ray.storage.paths import pasted
from worldlm_ray.tracking.status import record_failure
from worldlm_ray.training.deepspeed_config import is_zero
from worldlm_ray.training.local import too_many_cores

T = TypeVar("T")

Progress = Callable[[dict[str, Any]], None]
POLL_S = 0.5
"""How often progress is looked at."""
ABSENT_S = 15.0
"""A node that has not answered within this time when the run is to stop has no machine."""
SAMPLES = MANY
"""At the end so many clients write a text: of more, the table shows none."""
SILENT_S = 60.0
"""Whoever watches is told once the recorder has not answered for so long."""
NOT_BEGUN = "stopped before the run had begun; nothing is lost"
GOES_ON = "stopped before the run had answered; it goes on without this process"
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
        """End a client's actor, with what it has reserved; a host stays for its other clients."""
        client = self.clients.pop(path)
        if not isinstance(client, hosts.Member):
            ray.kill(client)
            give_back(prefix(self.namespace, path))


def train(
    plan: Plan,
    *,
    address: str | None = None,
    on_progress: Progress = lambda _: None,
    on_phase: Callable[[str], None] = lambda _: None,
    on_step: Callable[[str], None] = lambda _: None,
    on_warning: Callable[[str], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Train a world on Ray. Nodes with a checkpoint in the run folder continue from it.

    Args:
        plan: the run; its folder exists (see worldlm_ray.plan.rundir).
        address: of a running Ray cluster; None starts a local one for this run.
        on_progress: called about twice a second with a snapshot of the run.
        on_phase: told what is being waited for.
        on_step: told how far that has come.
        on_warning: told what the user should know of.
        should_stop: asked as often; True ends the run early, with checkpoints and a summary.

    Raises:
        Interrupted: `should_stop` said so before the run had begun.
        RunError: the cluster cannot be reached or cannot hold the world, or an actor failed.
        WorldLMError: whatever an actor raised on purpose.
    """
    address = None if address == "local" else address
    watch = Watch(on_progress, on_phase, on_step, on_warning, should_stop)
    if should_stop():
        raise Interrupted(NOT_BEGUN)
    wanted = {spec.path: spec.settings.resources for spec in plan.root.clients}
    if address is None and (warning := too_many_cores(wanted)):
        on_warning(warning)
    on_phase("starting Ray" if address is None else f"connecting to {address}")
    with cluster.connected(plan, address, should_stop):
        try:
            return _train(plan, address is None, watch)
        except Interrupted:
            raise
        except Exception as error:  # noqa: BLE001 - a boundary: raised below
            failure = error
    # By now no actor of a local run writes to the folder any more.
    told = _told(failure)
    record_failure(plan.run_dir, str(told) or type(told).__name__)
    if told is failure:
        raise failure
    raise told from failure


def _told(error: Exception) -> Exception:
    """The error that the user is told, without Ray's wrapping."""
    if isinstance(error, RayTaskError):
        return plain(error)
    if isinstance(error, ActorDiedError):
        return RunError(f"an actor died: {cluster.first_line(error)}")
    if isinstance(error, RayError):
        return RunError(f"Ray failed: {cluster.first_line(error)}")
    return error


def _train(plan: Plan, local: bool, watch: Watch) -> Outcome:
    if watch.should_stop():
        raise Interrupted(NOT_BEGUN)
    with Monitor(watch) as monitor:
        world = find(plan)
        found = world is not None
        if world is not None:
            watch.on_phase("the run lives: watching it")
        else:
            try:
                if not local:
                    watch.on_phase("looking at the machines")
                    preflight.check(plan, watch)
                watch.on_phase(f"starting {len(plan.kinds)} nodes")
                world = _create(plan, watch, local=local)
            except Interrupted:
                raise Interrupted(NOT_BEGUN) from None
        is_left = False
        try:
            return _conduct(plan, world, watch, monitor)
        except Interrupted:
            is_left = found
            raise Interrupted(GOES_ON if found else NOT_BEGUN) from None
        finally:
            if not is_left:
                for actor in world.actors:
                    ray.kill(actor)
                give_back(prefix(world.namespace))
                cluster.forget(plan.run_dir)


def _conduct(plan: Plan, world: World, watch: Watch, monitor: Monitor) -> Outcome:
    """The life of a run whose actors exist: wait, watch, measure, conclude."""
    begun = _start(plan, world, watch, monitor)
    watch.on_phase(TRAINING)
    status = _watch(plan, world, begun, watch)
    plan = rundir.reopen(str(plan.run_dir), check_data=False)  # nodes may have joined or left
    watch.on_phase(MEASURING if status == "finished" else SAVING)
    for path, actor in world.inner.items():
        if status == "finished" or _is_there(actor):
            ask(actor, "save")
        elif path == "world":
            raise RunError("the world's aggregator has no machine; its last checkpoint holds the run: resume it later")
    measures: dict[str, Measure | None] = {}
    samples = dict[str, Sample]()
    if status == "finished":
        try:
            measures = _measure(plan, world, watch)
            some = dict(list(world.clients.items())[:SAMPLES])
            asked_for = {path: client.sample.remote() for path, client in some.items()}
            samples = {path: sampled(partial(_text, ref, watch)) for path, ref in asked_for.items()}
        except Interrupted:  # a resumed run measures again
            status, measures, samples = "stopped", {}, {}
    named = {"measures": measures, "samples": samples, "wall_s": world.clock.now_s(), "status": status}

    def conclude() -> Any:
        [parameters] = ask(world["world"], "parameters")
        return ask(world.recorder, "conclude", parameters, **named)

    texts = {path: sample.text for path, sample in samples.items()}
    return Outcome(summary=with_living_owners(conclude), samples=texts)


def _text(ref: Any, watch: Watch) -> str:
    try:
        return str(watch.answer(ref))
    except RayTaskError as error:
        raise plain(error) from error


def _start(plan: Plan, world: World, watch: Watch, monitor: Monitor) -> list[str]:
    """Wait until the nodes with which a run begins are ready, and have them begin; returns their paths."""
    at_once = [path for path in world.clients if not plan.node(path.rpartition("/")[0]).elastic]
    shared = {path: name for name, paths in world.hosts.items() for path in paths}
    names = {path: shared.get(path, path) for path in [*world.inner, *at_once]}
    monitor.begin(world.namespace, names, on_trouble=world.recorder.warn.remote)
    watch.ask(world.recorder, "ready")
    begun = _begun(plan, world, watch)
    # Clients of one process get ready side by side, and those of several processes at once.
    asked = {path: world[path].ready.remote() for path in begun if isinstance(world[path], hosts.Member)}
    reached = {}
    for path in sorted(begun, key=lambda path: path not in asked):  # the first that cannot start says why
        reached[path] = _answer(asked[path], world, path, watch) if path in asked else watch.ask(world[path], "ready")
        monitor.is_ready(path)
        watch.on_step(f"{len(reached)} of {len(begun)} are ready")
    if any(reached.values()):
        watch.on_phase("continuing " + ", ".join(_reached(path, number, world) for path, number in reached.items()))
    for path in begun:
        watch.ask(world[path], "start")
    monitor.waiting.clear()
    rundir.forget_end(plan.run_dir)
    return begun


def _answer(ref: Any, world: World, path: str, watch: Watch) -> int:
    try:
        return int(watch.answer(ref))
    except ActorUnavailableError:  # it is being started again
        return int(watch.ask(world[path], "ready"))


def _begun(plan: Plan, world: World, watch: Watch) -> list[str]:
    """Nodes that a run waits for before it begins: of an elastic federation, as many clients as are there first."""
    paths = list(world.inner)
    for spec in plan.root.inner:
        clients = [child.path for child in spec.children if child.kind == "client" and child.path in world.clients]
        if spec.elastic:
            least = len(clients) if spec.min_clients is None else spec.min_clients
            ready = {world.clients[path].ready.remote(): path for path in clients}
            least = min(least, len(ready))  # others come later
            there: list[Any] = []
            while len(there) < least:
                there, _ = ray.wait(list(ready), num_returns=least, timeout=POLL_S)
                watch.check()
            clients = [ready[ref] for ref in there]
        paths += clients
    return paths


# ---- the actors ----------------------------------------------------------------------------------------------


def _create(plan: Plan, watch: Watch, *, local: bool) -> World:
    """Make an actor of every node: each finds its parent and the recorder by name."""
    namespace = f"worldlm-{plan.config.name}-{secrets.token_hex(4)}"
    # What is sent while it is dead waits for its next life: a record counted twice is better than one that is lost.
    options: dict[str, Any] = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
    options |= cluster.on_the_head() | lifetime(local)
    named = ray.remote(RecorderActor).options(name=RECORDER, namespace=namespace, **options)
    sent = to_send(plan)
    began_s = rundir.run_time_s(plan.run_dir)
    clock = RunClock.starting(began_s)
    recorder = named.remote(sent, clock, namespace)
    if not (local and this_machine()):  # it may have begun later, on another machine: it sets the time
        clock = _clock_of(recorder, namespace, plan, watch)
    world = World(recorder, namespace, clock, began_s, local)
    together = {group[0].path: group for group in tree.processes(plan.root) if len(group) > 1}
    shared = {spec.path for group in together.values() for spec in group}
    for spec in plan.root.inner:
        world.inner[spec.path] = create(sent, spec, world)
        clients = [child for child in spec.children if child.kind == "client"]
        there = [child for child in clients if plan.faults.is_member(child.path, began_s)]
        for child in there[: spec.max_clients]:
            if child.path in together:
                _create_host(together[child.path], world, sent)
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


def _clock_of(recorder: Any, namespace: str, plan: Plan, watch: Watch) -> RunClock:
    """The run's clock as its recorder has it; whatever keeps that from starting, nothing is left of it."""
    try:
        return settle(RunClock(watch.ask(recorder, "anchor")), namespace, "", plan.run_dir)
    except BaseException:
        ray.kill(recorder)
        raise


def _create_host(group: Sequence[NodeSpec], world: World, sent: Plan | StoredPlan) -> None:
    """Make one actor for several clients."""
    paths = [spec.path for spec in group]
    options = _options(group[0]) | {"max_concurrency": 10_000} | lifetime(world.local)
    actor = ray.remote(ClientPoolActor).options(name=hosts.name_of(paths[0]), namespace=world.namespace, **options)
    host = actor.remote(Address(sent, paths[0], world.clock, world.namespace), paths)
    world.clients |= {path: hosts.Member(host, path) for path in paths}


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
        begin: whether it begins by itself as soon as there is room for it.
        detached: whether it outlives this process even on a cluster that ends with another one.
    """
    options = _options(spec) | lifetime(world.local and not detached)
    actor = ray.remote(_actor_class(spec)).options(name=spec.path, namespace=world.namespace, **options)
    return actor.remote(Address(sent, spec.path, world.clock, world.namespace, begin))


def lifetime(local: bool) -> dict[str, Any]:
    """On a cluster of somebody else's, actors outlive the process that made them."""
    return {} if local else {"lifetime": "detached"}


def find(plan: Plan) -> World | None:
    """The actors of a run that lives on this cluster, whoever has started it; None if it does not."""
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


def _options(spec: NodeSpec) -> dict[str, Any]:
    settings = spec.settings
    # Whoever dies is started again and goes on from its checkpoint, without being told to.
    # An inner node is asynchronous: as many children as there are may wait in it.
    options: dict[str, Any] = {"num_cpus": 0, "max_concurrency": 10_000, "max_restarts": -1}
    if spec.kind == "client":
        # Its life takes a thread of its own; `outcome` takes another for as long.
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


def _watch(
    plan: Plan,
    world: World,
    begun: list[str],
    watch: Watch,
) -> str:
    """Wait for the clients and then for the world; returns `finished` or `stopped`."""
    waiting = {actor.outcome.remote(): path for path, actor in world.clients.items()}
    ends = {actor.ended.remote(): path for path, actor in world.inner.items()}
    there, results = set(begun), dict[str, str]()
    # Who was to come before this process looked is there, or has come and gone.
    joined = {fault for fault in plan.faults.all if fault.kind == "join" and fault.at_s <= world.began_s}
    given_up: set[str] = set()
    answers, asked_at = dict[str, Any](), 0.0
    heard_at, missed = time.monotonic(), False
    while True:
        ready, _ = ray.wait([*waiting, *ends], num_returns=len(waiting) + len(ends), timeout=POLL_S)
        for ref in ready:
            if ref in waiting:
                path = waiting.pop(ref)
                results[path] = ray.get(ref)
                if results[path] == "left":
                    waiting |= _replace(plan, world, path, results)
                continue
            path = ends.pop(ref)
            try:
                ray.get(ref)  # raises what broke an inner node
            except ActorUnavailableError:  # Ray starts it again, and it goes on by itself
                ends[world.inner[path].ended.remote()] = path
        with suppress(ray.exceptions.GetTimeoutError, ActorUnavailableError):
            snapshot = ray.get(world.recorder.snapshot.remote(), timeout=5.0)
            heard_at, missed = time.monotonic(), False
            watch.on_progress(snapshot)
            there |= {path for path, node in snapshot["nodes"].items() if node["state"] != "waiting" or node["steps"]}
            waiting |= _newcomers(world, snapshot, results)
        if not given_up:
            waiting |= _latecomers(plan, world, joined, results)
        if time.monotonic() - heard_at > SILENT_S and not missed:
            missed = True
            watch.on_phase(f"nothing was heard of the run for {SILENT_S:.0f} s: {_advice(plan, world)}")
        if watch.should_stop():
            if not answers:
                asked_at = time.monotonic()
                answers = {path: world.clients[path].process.remote() for path in waiting.values()}
            # At every look: a client that has been restarted since would not know.
            for path in there & set(world.clients):
                world.clients[path].stop.remote()
            if time.monotonic() - asked_at > ABSENT_S:
                # Without a machine, it cannot stop any more than it is: its checkpoint is on disk.
                lost = {path for path, answer in answers.items() if not ray.wait([answer], timeout=0.0)[0]}
                waiting = {ref: path for ref, path in waiting.items() if path not in lost}
                if not waiting:
                    return "stopped"
        absent = {ref: path for ref, path in waiting.items() if path not in there}
        late = {spec.path for spec in plan.root.clients} - set(world.clients) - set(results) - given_up
        if len(absent) == len(waiting) and (results or not (absent or late)):
            # Everybody else has ended, and there never was room for these, or it was not their time yet.
            waiting = {ref: path for ref, path in waiting.items() if ref not in absent}
            for path in [*absent.values(), *late]:
                given_up.add(path)
                _give_up(world, path)
            if "stopped" in results.values():
                return "stopped"
            if "world" not in ends.values():
                # Whoever had been given up as silent may have come back since they said that all had ended.
                ends = {actor.ended.remote(): path for path, actor in world.inner.items()}
                ray.wait(list(ends), num_returns=len(ends), timeout=ABSENT_S)
                return "finished"


def _advice(plan: Plan, world: World) -> str:
    if world.local:
        return "still waiting"
    return f"if its cluster lives, it goes on; leave (Ctrl-C twice), and come back with --resume {pasted(plan.run_dir)}"


def _newcomers(world: World, snapshot: dict[str, Any], ended: Collection[str]) -> dict[Any, str]:
    """Clients that have joined since the last look, by the reference of their outcome."""
    found = {}
    for path, node in snapshot["nodes"].items():
        known = path in world.clients or path in ended
        if node["kind"] == "client" and not known and node["state"] != "waiting":
            with suppress(ValueError):
                world.clients[path] = ray.get_actor(path, namespace=world.namespace)
                found[world.clients[path].outcome.remote()] = path
    return found


def _replace(plan: Plan, world: World, path: str, ended: Collection[str]) -> dict[Any, str]:
    """A client has left: its actor goes, and where a federation has more clients than places the next one comes."""
    world.end(path)
    parent = plan.node(path.rsplit("/", 1)[0])
    for spec in parent.children if parent.max_clients is not None else ():
        absent = spec.kind == "client" and spec.path not in world.clients and spec.path not in ended
        if absent and plan.faults.is_member(spec.path, world.clock.now_s()):
            return _come(plan, world, spec)
    return {}


def _latecomers(plan: Plan, world: World, joined: set[Fault], results: dict[str, str]) -> dict[Any, str]:
    """Clients that the fault script lets come by now, as far as there are places; `joined` remembers whom it let."""
    found: dict[Any, str] = {}
    now_s = world.clock.now_s() if plan.faults else 0.0
    for fault in plan.faults.all:
        due = fault.kind == "join" and fault.at_s <= now_s and fault not in joined
        if not due or fault.node in world.clients or not plan.faults.is_member(fault.node, now_s):
            continue  # who has not gone yet, goes first; or stays, since it may
        parent = plan.node(fault.node.rsplit("/", 1)[0])
        there = sum(spec.kind == "client" and spec.path in world.clients for spec in parent.children)
        if parent.max_clients is None or there < parent.max_clients:
            with suppress(ValueError):  # its last actor still has the name: at the next look, then
                found |= _come(plan, world, plan.node(fault.node))
                joined.update(f for f in plan.faults.of(fault.node, kind="join") if f.at_s <= now_s)
                results.pop(fault.node, None)
    return found


def _come(plan: Plan, world: World, spec: NodeSpec) -> dict[Any, str]:
    world.clients[spec.path] = create(plan, spec, world, begin=True)
    return {world.clients[spec.path].outcome.remote(): spec.path}


def _give_up(world: World, path: str) -> None:
    """A client that has never come: its parent need not wait for it any more."""
    if path in world.clients:
        world.end(path)
    parent, _, name = path.rpartition("/")
    ask(world.inner[parent], "give_up", name)


def _is_there(actor: Any) -> bool:
    """Whether an actor lives, or will in a moment."""
    return bool(ray.wait([actor.process.remote()], timeout=ABSENT_S)[0])


def _measure(plan: Plan, world: World, watch: Watch) -> dict[str, Measure | None]:
    """Every client's model on its own text, every inner node's model on the text of all clients below."""
    own = {path: actor.measure.remote() for path, actor in world.clients.items()}

    def by_clients(spec: NodeSpec) -> list[Any]:
        refs = watch.ask(world[spec.path], "parameters")
        clients = [world.clients[client.path] for client in spec.clients if client.path in world.clients]
        return [client.measure.remote(refs) for client in clients]

    asked = {spec.path: by_clients(spec) for spec in plan.root.inner}  # all at once
    measures: dict[str, Measure | None] = {}
    total = len(own) + len(asked)
    for path, ref in own.items():
        watch.on_step(f"{len(measures)} of {total} are measured")
        measures[path] = watch.answer(ref)
    for spec in plan.root.inner:

        def answers(spec: NodeSpec = spec) -> Any:
            return watch.answer(asked.pop(spec.path, None) or by_clients(spec))

        watch.on_step(f"{len(measures)} of {total} are measured")
        measures[spec.path] = combine(with_living_owners(answers))
    return measures


def with_living_owners(read: Callable[[], T]) -> T:
    """What `read` gives; read again where an actor has died between handing out its model and somebody's reading it."""
    while True:
        try:
            return read()
        except RayError as error:
            cause = error.cause if isinstance(error, RayTaskError) else error
            if not isinstance(cause, ObjectLostError):
                raise


def _reached(path: str, number: int, world: World) -> str:
    return f"{path} at version {number}" if path in world.inner else f"{path} after {number} rounds"


def plain(error: RayTaskError) -> WorldLMError:
    """The error that an actor raised, without Ray's wrapping."""
    cause = error.cause
    if isinstance(cause, WorldLMError):
        return cause
    return RunError(f"an actor failed: {type(cause).__name__}: {cluster.first_line(cause)}")
