"""Run a plan on Ray: start the actors of the tree, watch them, gather the result.

The only module of the package that imports Ray. It makes actors of the plain classes in `actors/`, a parent
before its children, and hands each child its parent's handle; after that they talk without it. This process then
only watches: it draws the progress, passes on a wish to stop, and measures the models at the end.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError, RayTaskError

from actors.client import ClientActor
from actors.federation import FederationActor
from actors.recorder import RecorderActor
from actors.shared import RECORDER, Address, RunClock
from actors.world import WorldActor
from worldlm_ray.errors import RunError, WorldLMError
from worldlm_ray.outcome import Outcome, combine
from worldlm_ray.plan import Plan
from worldlm_ray.records import Measure
from worldlm_ray.tracking import STATUS
from worldlm_ray.training.deepspeed_config import is_zero
from worldlm_ray.tree import NodeSpec

Progress = Callable[[dict[str, Any]], None]
POLL_S = 0.5
"""How often progress is looked at."""
ACTORS = {"world": WorldActor, "federation": FederationActor, "client": ClientActor}
OBJECT_STORE_FLOOR_BYTES = 512 * 1024**2


@dataclass
class World:
    """The actors of a run, by path."""

    recorder: Any
    inner: dict[str, Any] = field(default_factory=dict)
    clients: dict[str, Any] = field(default_factory=dict)

    @property
    def actors(self) -> list[Any]:
        """All of them, parents first."""
        return [self.recorder, *self.inner.values(), *self.clients.values()]

    def __getitem__(self, path: str) -> Any:
        return self.inner[path] if path in self.inner else self.clients[path]


def train(
    plan: Plan,
    *,
    address: str | None = None,
    on_progress: Progress = lambda _: None,
    on_phase: Callable[[str], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Train a world on Ray. Nodes with a checkpoint in the run folder continue from it.

    Args:
        plan: the run; its folder exists (see worldlm_ray.rundir).
        address: of a running Ray cluster; None starts a local one for this run.
        on_progress: called about twice a second with a snapshot of the run.
        on_phase: told what is being waited for.
        should_stop: asked as often; True ends the run early, with checkpoints and a summary.

    Raises:
        RunError: the cluster cannot be reached or cannot hold the world, or an actor failed.
        WorldLMError: whatever an actor raised on purpose.
    """
    on_phase("starting Ray" if address is None else f"connecting to {address}")
    with _cluster(plan, address):
        try:
            return _train(plan, on_progress, on_phase, should_stop)
        except RayTaskError as error:
            raise _plain(error) from error
        except ActorDiedError as error:
            raise RunError(f"an actor died: {_first_line(error)}") from error
        except RayError as error:
            raise RunError(f"Ray failed: {_first_line(error)}") from error


def _train(
    plan: Plan, on_progress: Progress, on_phase: Callable[[str], None], should_stop: Callable[[], bool]
) -> Outcome:
    clock = RunClock(time.time(), _continued_from_s(plan))
    on_phase(f"starting {len(plan.kinds)} nodes")
    world = _create(plan, clock)
    try:
        return _conduct(plan, world, clock, on_progress, on_phase, should_stop)
    finally:
        for actor in world.actors:
            ray.kill(actor)


def _conduct(
    plan: Plan,
    world: World,
    clock: RunClock,
    on_progress: Progress,
    on_phase: Callable[[str], None],
    should_stop: Callable[[], bool],
) -> Outcome:
    """The life of a run whose actors exist: wait, watch, measure, conclude."""
    _ask(world.recorder, "ready")
    # The first that cannot start says why.
    reached = {path: _ask(actor, "ready") for path, actor in (world.inner | world.clients).items()}
    if any(reached.values()):
        on_phase("continuing " + ", ".join(_reached(path, number, world) for path, number in reached.items()))
    for actor in (world.inner | world.clients).values():
        _ask(actor, "start")
    on_phase("training")
    status = _watch(world, on_progress, should_stop)
    on_phase("measuring the models" if status == "finished" else "writing checkpoints")
    for actor in world.inner.values():
        _ask(actor, "save")
    measures = _measure(plan, world) if status == "finished" else {}
    samples = ray.get([actor.sample.remote() for actor in world.clients.values()]) if status == "finished" else []
    [parameters] = _ask(world["world"], "parameters")
    summary = ray.get(
        world.recorder.conclude.remote(
            parameters,
            measures=measures,
            samples=dict(zip(world.clients, samples, strict=False)),
            wall_s=clock.now_s(),
            status=status,
        )
    )
    return Outcome(summary=summary, samples=dict(zip(world.clients, samples, strict=False)))


# ---- the cluster ---------------------------------------------------------------------------------------------


@contextmanager
def _cluster(plan: Plan, address: str | None) -> Iterator[None]:
    """Connect to Ray, or start a local one and stop it afterwards.

    A process that is connected already keeps its connection, whatever `address` says.
    """
    if ray.is_initialized():
        _check_fits(plan)
        yield
        return
    quiet: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "configure_logging": True,
    }
    with warnings.catch_warnings():
        # Ray announces changes of its own defaults at every start; they concern nobody who runs a world.
        warnings.simplefilter("ignore", FutureWarning)
        try:
            if address is None:
                # Clients may outnumber the cores: on one machine they share them, as threads of one would.
                cpus = max(os.cpu_count() or 1, sum(_workers(spec) * _each(spec)["CPU"] for spec in plan.root.clients))
                processes = len(plan.kinds) + sum(_workers(spec) for spec in plan.root.clients)
                store = max(OBJECT_STORE_FLOOR_BYTES, 3 * processes * plan.layout.nbytes)
                # Ray prints a warning when it starts more processes than the machine has cores. Here they are wanted.
                tuned = {"worker_maximum_startup_concurrency": max(os.cpu_count() or 1, processes)}
                ray.init(
                    "local",
                    num_cpus=cpus,
                    object_store_memory=store,
                    include_dashboard=False,
                    _system_config=tuned,
                    **quiet,
                )
            else:
                ray.init(address, **quiet)
        except Exception as error:
            where = "start Ray on this machine" if address is None else f"reach a Ray cluster at {address}"
            raise RunError(f"cannot {where}: {_first_line(error)}") from error
    try:
        _check_fits(plan)
        yield
    finally:
        ray.shutdown()


def _workers(spec: NodeSpec) -> int:
    """Processes that train a client's model, at most."""
    return spec.settings.resources.worker_range[1]


def _each(spec: NodeSpec) -> dict[str, float]:
    """What each of them reserves, by Ray's names."""
    resources = spec.settings.resources
    return {"CPU": resources.cpus, "GPU": resources.gpus}


def _check_fits(plan: Plan) -> None:
    """A label that no node carries, or more than the cluster has, would make Ray wait for ever without a word.

    Raises:
        RunError: a client does not fit even if it were alone, or all of them do not fit together.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    for spec in plan.root.walk():
        labels = spec.settings.placement.labels
        labelled = [node for node in nodes if labels.items() <= node.get("Labels", {}).items()]
        if not labelled:
            wanted = ", ".join(f"{key}={value}" for key, value in labels.items())
            raise RunError(f"{spec.key}.placement.labels: no node of the cluster carries {wanted}")
        if spec.kind != "client":
            continue
        least, each = spec.settings.resources.worker_range[0], {k: v for k, v in _each(spec).items() if v}
        room = sum(
            min(int(node["Resources"].get(name, 0.0) / amount) for name, amount in each.items()) for node in labelled
        )
        if room < least:
            raise RunError(
                f"{spec.key}.resources: wants {least} workers with {_text(each)} each, the cluster can hold {room}; "
                "add nodes, or lower resources.workers, cpus or gpus"
            )
    for name in ("CPU", "GPU"):
        has = sum(node["Resources"].get(name, 0.0) for node in nodes)
        wanted_of_all = sum(s.settings.resources.worker_range[0] * _each(s)[name] for s in plan.root.clients)
        if has < wanted_of_all:
            all_of_them = _text({name: wanted_of_all})
            raise RunError(
                f"the clients want {all_of_them} together, the cluster has {has:g}; "
                f"add nodes or lower resources.{name.lower()}s"
            )


def _text(amounts: dict[str, float]) -> str:
    names = {"CPU": "core", "GPU": "GPU"}
    return " and ".join(f"{amount:g} {names[name]}{'' if amount == 1 else 's'}" for name, amount in amounts.items())


def _continued_from_s(plan: Plan) -> float:
    """Run time at which an earlier part of this run ended; 0 for a new run."""
    try:
        return float(json.loads((plan.run_dir / STATUS).read_text(encoding="utf-8"))["now_s"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


# ---- the actors ----------------------------------------------------------------------------------------------


def _create(plan: Plan, clock: RunClock) -> World:
    """Make an actor of every node, parents first: each finds its parent and the recorder by name."""
    mapping, namespace = plan.to_mapping(), f"worldlm-{plan.config.name}-{secrets.token_hex(4)}"
    options: dict[str, Any] = {"num_cpus": 0, "max_restarts": -1, "name": RECORDER, "namespace": namespace}
    recorder = ray.remote(RecorderActor).options(**options).remote(mapping)
    world = World(recorder)
    for spec in plan.root.walk():
        actors = world.clients if spec.kind == "client" else world.inner
        actor = ray.remote(_actor_class(spec)).options(name=spec.path, namespace=namespace, **_options(spec))
        actors[spec.path] = actor.remote(Address(mapping, spec.path, clock, namespace))
    return world


def _actor_class(spec: NodeSpec) -> type:
    if spec.kind == "client" and is_zero(spec.settings):
        # Ray Train takes two seconds to import, which worlds without such a client need not wait for.
        from actors.zero_client import ZeroClientActor

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
            # Its workers reserve what they use, all together or not at all, and call the actor from their side, too.
            options |= {"num_cpus": 0, "num_gpus": 0, "max_concurrency": 6 + _workers(spec)}
    if settings.placement.labels:
        options["label_selector"] = dict(settings.placement.labels)
    return options


def _watch(world: World, on_progress: Progress, should_stop: Callable[[], bool]) -> str:
    """Wait for the clients and then for the world; returns `finished` or `stopped`."""
    waiting = {actor.outcome.remote(): path for path, actor in world.clients.items()}
    ends = {actor.ended.remote(): path for path, actor in world.inner.items()}
    results: dict[str, str] = {}
    while waiting or ("stopped" not in results.values() and "world" in ends.values()):
        ready, _ = ray.wait([*waiting, *ends], num_returns=len(waiting) + len(ends), timeout=POLL_S)
        for ref in ready:
            if ref in waiting:
                results[waiting.pop(ref)] = ray.get(ref)
                continue
            path = ends.pop(ref)
            try:
                ray.get(ref)  # raises what broke an inner node
            except ActorUnavailableError:  # Ray starts it again, and it goes on by itself
                ends[world.inner[path].ended.remote()] = path
        with suppress(ray.exceptions.GetTimeoutError, ActorUnavailableError):
            on_progress(ray.get(world.recorder.snapshot.remote(), timeout=5.0))
        if should_stop():
            # At every look: a client that has been restarted since would not know.
            for actor in world.clients.values():
                actor.stop.remote()
    return "stopped" if "stopped" in results.values() else "finished"


def _ask(actor: Any, method: str, *arguments: Any) -> Any:
    """The answer of an actor, once it is alive (again)."""
    while True:
        try:
            return ray.get(getattr(actor, method).remote(*arguments))
        except ActorUnavailableError:
            time.sleep(POLL_S)


def _measure(plan: Plan, world: World) -> dict[str, Measure | None]:
    """Every client's model on its own text, every inner node's model on the text of all clients below."""
    own = {path: actor.measure.remote() for path, actor in world.clients.items()}
    below = {}
    for spec in plan.root.inner:
        refs = _ask(world[spec.path], "parameters")
        below[spec.path] = [world[client.path].measure.remote(refs) for client in spec.clients]
    measures = {path: ray.get(ref) for path, ref in own.items()}
    return measures | {path: combine(ray.get(refs)) for path, refs in below.items()}


def _reached(path: str, number: int, world: World) -> str:
    return f"{path} at version {number}" if path in world.inner else f"{path} after {number} rounds"


def _plain(error: RayTaskError) -> WorldLMError:
    """The error that an actor raised, without Ray's wrapping."""
    cause = error.cause
    if isinstance(cause, WorldLMError):
        return cause
    return RunError(f"an actor failed: {type(cause).__name__}: {_first_line(cause)}")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
