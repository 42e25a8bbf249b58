"""The life of a run on Ray."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayError, RayTaskError

from worldlm_ray.errors import Interrupted, RunError
from worldlm_ray.launch import border, cluster, preflight
from worldlm_ray.launch.calls import POLL_S, Observer, ask, plain, with_living_owners
from worldlm_ray.launch.create import World, create_world, find
from worldlm_ray.launch.monitor import Monitor
from worldlm_ray.launch.pools import Member
from worldlm_ray.launch.private.reservations import give_back, prefix
from worldlm_ray.launch.watch import ABSENT_S, Watch, tell_records
from worldlm_ray.plan import living, rundir
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.tree import NodeSpec
from worldlm_ray.records import Measure, Record
from worldlm_ray.reports.outcome import Outcome, Sample, combine, sampled
from worldlm_ray.reports.progress import MEASURING, SAVING, TRAINING
from worldlm_ray.tracking.status import record_failure
from worldlm_ray.training.local import too_many_cores

Progress = Callable[[dict[str, Any]], None]
SAMPLES = 32
"""At the end so many clients write a text, the first ones."""
NOT_BEGUN = "stopped before the run had begun; nothing is lost"
GOES_ON = "stopped before the run had answered; it goes on without this process"


def train(
    plan: Plan,
    *,
    address: str | None = None,
    on_progress: Progress = lambda _: None,
    on_phase: Callable[[str], None] = lambda _: None,
    on_step: Callable[[str], None] = lambda _: None,
    on_warning: Callable[[str], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
    on_record: Callable[[Record], None] | None = None,
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
        on_record: called with what happened, as often. Records are lost while the recorder restarts.

    Raises:
        Interrupted: `should_stop` said so before the run had begun.
        RunError: the cluster cannot be reached or cannot hold the world, or an actor failed.
        WorldLMError: whatever an actor raised on purpose.
    """
    address = None if address == "local" else address
    observer = Observer(on_progress, on_phase, on_step, on_warning, should_stop, on_record)
    if should_stop():
        raise Interrupted(NOT_BEGUN)
    wanted = {spec.path: spec.settings.resources for spec in plan.root.clients}
    if address is None and (warning := too_many_cores(wanted)):
        on_warning(warning)
    on_phase("starting Ray" if address is None else f"connecting to {address}")
    with cluster.connected(plan, address, should_stop):
        try:
            return _train(plan, address is None, observer)
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
        return RunError(f"an actor died: {cluster.first_line(error)}; {cluster.CURE}")
    if isinstance(error, RayError):
        return RunError(f"Ray failed: {cluster.first_line(error)}; {cluster.CURE}")
    return error


def _train(plan: Plan, local: bool, observer: Observer) -> Outcome:
    if observer.should_stop():
        raise Interrupted(NOT_BEGUN)
    with Monitor(observer) as monitor:
        world = find(plan)
        found = world is not None
        if world is not None:
            observer.on_phase("the run lives: watching it")
        else:
            try:
                if not local:
                    observer.on_phase("looking at the machines")
                    preflight.check(plan, observer)
                observer.on_phase(f"starting {sum(not spec.remote for spec in plan.specs.values())} nodes")
                world = create_world(plan, observer, local=local)
            except Interrupted:
                raise Interrupted(NOT_BEGUN) from None
        is_left = False
        try:
            return _conduct(plan, world, observer, monitor)
        except Interrupted:
            is_left = found
            raise Interrupted(GOES_ON if found else NOT_BEGUN) from None
        finally:
            if not is_left:
                for actor in world.actors:
                    ray.kill(actor)
                give_back(prefix(world.namespace))
                living.forget(plan.run_dir)


def _conduct(plan: Plan, world: World, observer: Observer, monitor: Monitor) -> Outcome:
    """The life of a run whose actors exist: wait, watch, measure, conclude."""
    begun = _start(plan, world, observer, monitor)
    observer.on_phase(TRAINING)
    status = Watch(plan, world, begun, observer).until_over()
    if status == "finished":
        border.linger(plan, world.border, world.inner, observer)
    plan = rundir.reopen(str(plan.run_dir), check_data=False)  # nodes may have joined or left
    observer.on_phase(MEASURING if status == "finished" else SAVING)
    for path, actor in world.inner.items():
        if status == "finished" or _is_there(actor):
            ask(actor, "save")
        elif path == plan.top.path:
            raise RunError(f"{path}'s aggregator has no machine; its last checkpoint holds the run: resume it later")
    measures: dict[str, Measure | None] = {}
    samples = dict[str, Sample]()
    if status == "finished":
        try:
            measures = _measure(plan, world, observer)
            some = dict(list(world.clients.items())[:SAMPLES])
            asked_for = {path: client.sample.remote() for path, client in some.items()}
            samples = {path: sampled(partial(_text, ref, observer)) for path, ref in asked_for.items()}
        except Interrupted:  # a resumed run measures again
            status, measures, samples = "stopped", {}, {}
    with suppress(GetTimeoutError, ActorUnavailableError):
        tell_records(world, observer)
    named = {"measures": measures, "samples": samples, "wall_s": world.clock.now_s(), "status": status}

    def conclude() -> Any:
        has_model = plan.top.path in world.inner
        [parameters] = ask(world[plan.top.path], "parameters") if has_model else [None]
        return ask(world.recorder, "conclude", parameters, **named)

    texts = {path: sample.text for path, sample in samples.items()}
    return Outcome(summary=with_living_owners(conclude), samples=texts)


def _text(ref: Any, observer: Observer) -> str:
    try:
        return str(observer.answer(ref))
    except RayTaskError as error:
        raise plain(error) from error


def _start(plan: Plan, world: World, observer: Observer, monitor: Monitor) -> list[str]:
    """Wait until the nodes with which a run begins are ready, and have them begin; returns their paths."""
    at_once = [path for path in world.clients if not plan.node(path.rpartition("/")[0]).elastic]
    pools = world.pool_names
    names = {path: pools.get(path, path) for path in [*world.inner, *at_once]}
    monitor.begin(world.namespace, names, on_trouble=world.recorder.warn.remote)
    observer.ask(world.recorder, "ready")
    if observer.on_record is not None:  # from now on the recorder keeps records for this process
        observer.ask(world.recorder, "take_records")
    border.begin(plan, world.border, observer)
    begun = _begun(plan, world, observer)
    # Clients of one process get ready side by side, and those of several processes at once.
    asked = {path: world[path].ready.remote() for path in begun if isinstance(world[path], Member)}
    reached = {}
    for path in sorted(begun, key=lambda path: path not in asked):  # the first that cannot start says why
        reached[path] = (
            _answer(asked[path], world, path, observer) if path in asked else observer.ask(world[path], "ready")
        )
        monitor.is_ready(path)
        observer.on_step(f"{len(reached)} of {len(begun)} are ready")
    if any(reached.values()):
        observer.on_phase("continuing " + ", ".join(_reached(path, number, world) for path, number in reached.items()))
    for path in begun:
        observer.ask(world[path], "start")
    monitor.waiting.clear()
    rundir.forget_end(plan.run_dir)
    return begun


def _answer(ref: Any, world: World, path: str, observer: Observer) -> int:
    try:
        return int(observer.answer(ref))
    except ActorUnavailableError:  # it is being started again
        return int(observer.ask(world[path], "ready"))


def _begun(plan: Plan, world: World, observer: Observer) -> list[str]:
    """Nodes that a run waits for before it begins: of an elastic federation, as many clients as are there first."""
    paths = list(world.inner)
    for spec in plan.root.parents:
        clients = [child.path for child in spec.children if child.kind == "client" and child.path in world.clients]
        if spec.elastic:
            least = len(clients) if spec.min_clients is None else spec.min_clients
            ready = {world.clients[path].ready.remote(): path for path in clients}
            least = min(least, len(ready))  # others come later
            there: list[Any] = []
            while len(there) < least:
                there, _ = ray.wait(list(ready), num_returns=least, timeout=POLL_S)
                observer.check()
            clients = [ready[ref] for ref in there]
        paths += clients
    return paths


def _is_there(actor: Any) -> bool:
    """Whether an actor lives, or will in a moment."""
    return bool(ray.wait([actor.process.remote()], timeout=ABSENT_S)[0])


def _measure(plan: Plan, world: World, observer: Observer) -> dict[str, Measure | None]:
    """Every client's model on its own text, every inner node's model on the text of all clients below."""
    own = {path: actor.measure.remote() for path, actor in world.clients.items()}

    def by_clients(spec: NodeSpec) -> list[Any]:
        refs = observer.ask(world[spec.path], "parameters")
        clients = [world.clients[client.path] for client in spec.clients if client.path in world.clients]
        return [client.measure.remote(refs) for client in clients]

    asked = {spec.path: by_clients(spec) for spec in plan.root.inner}  # all at once
    measures: dict[str, Measure | None] = {}
    total = len(own) + len(asked)
    for path, ref in own.items():
        observer.on_step(f"{len(measures)} of {total} are measured")
        measures[path] = observer.answer(ref)
    for spec in plan.root.inner:

        def answers(spec: NodeSpec = spec) -> Any:
            return observer.answer(asked.pop(spec.path, None) or by_clients(spec))

        observer.on_step(f"{len(measures)} of {total} are measured")
        measures[spec.path] = combine(with_living_owners(answers))
    return measures


def _reached(path: str, number: int, world: World) -> str:
    return f"{path} at version {number}" if path in world.inner else f"{path} after {number} rounds"
