"""How the process that drives a run learns that it is over, and what it does about clients that come and go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError
from support.worlds import client, crowd

from worldlm_ray.launch import calls, create, watch
from worldlm_ray.launch.calls import Observer
from worldlm_ray.launch.create import World
from worldlm_ray.launch.pools import Pool
from worldlm_ray.launch.watch import Watch
from worldlm_ray.plan import living, rundir
from worldlm_ray.plan.plan import Plan
from worldlm_ray.run_clock import RunClock

PENDING = object()


class Ref:
    """A reference; its value may come later."""

    def __init__(self, value: Any = PENDING) -> None:
        self.value = value


class Actor:
    """An actor: its calls are kept, and answered by what was given for the method."""

    def __init__(self, **answers: Any) -> None:
        self.answers = {name: Ref(value) for name, value in answers.items()}
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: self._call(name, *arguments))

    def _call(self, name: str, *arguments: Any) -> Ref:
        self.calls.append((name, *arguments))
        return self.answers.setdefault(name, Ref(PENDING if name in ("outcome", "ended") else None))


class Ray:
    """References and actors without a cluster."""

    def __init__(self) -> None:
        self.killed: list[Any] = []

    def wait(self, refs: list[Ref], **_: Any) -> tuple[list[Ref], list[Ref]]:
        return [ref for ref in refs if ref.value is not PENDING], [ref for ref in refs if ref.value is PENDING]

    def get(self, ref: Any, timeout: float = 0.0) -> Any:
        if isinstance(ref.value, Exception):
            raise ref.value
        return ref.value

    def kill(self, actor: Any) -> None:
        self.killed.append(actor)


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Ray:
    fake = Ray()
    for module in (watch, calls, create):
        monkeypatch.setattr(module, "ray", fake)
    monkeypatch.setattr(create, "give_back", lambda _: None)
    return fake


class Run:
    """A run with an actor for every node. At every look the next of the given steps is taken."""

    def __init__(self, plan: Plan, clients: list[str], **states: str) -> None:
        self.plan = plan
        self.states = {path: states.get(path.rsplit("/", 1)[1], "training") for path in clients}
        self.recorder = Actor()
        self.recorder.answers["snapshot"] = Ref(
            {"nodes": {path: {"kind": "client", "state": s, "steps": 0} for path, s in self.states.items()}}
        )
        self.world = World(self.recorder, "namespace", RunClock.starting(0.0), 0.0, True, run_dir=plan.run_dir)
        self.world.inner = {spec.path: Actor() for spec in plan.root.inner}
        self.world.clients = {path: Actor() for path in clients}
        self.actors = dict(self.world.clients)

    def trains(self, path: str) -> None:
        self.recorder.answers["snapshot"].value["nodes"][path] = {"kind": "client", "state": "training", "steps": 1}

    def end(self, path: str, outcome: str) -> None:
        self.actors[path].answers["outcome"].value = outcome

    def end_nodes(self) -> None:
        for actor in self.world.inner.values():
            actor._call("ended").value = None

    def watched(self, *steps: Callable[[], None], should_stop: Callable[[], bool] = lambda: False) -> str:
        left = iter(steps)

        def take_a_step(_: Any) -> None:
            step = next(left, None)
            assert step is not None, "the run should be over"
            step()

        begun = [path for path, state in self.states.items() if state != "waiting"]
        observer = Observer(on_progress=take_a_step, should_stop=should_stop)
        return Watch(self.plan, self.world, begun, observer).until_over()


def nothing() -> None:
    pass


def test_a_run_is_finished_when_its_clients_and_its_world_are(ray: Ray, tiny: Callable[..., Plan]) -> None:
    plan = tiny()
    run = Run(plan, [spec.path for spec in plan.root.clients])
    first, *others = run.world.clients
    status = run.watched(
        lambda: run.end(first, "finished"),
        lambda: [run.end(path, "finished") for path in others],
        run.end_nodes,
        nothing,
    )
    assert status == "finished"


def test_records_are_handed_on_at_every_look(ray: Ray, tiny: Callable[..., Plan]) -> None:
    run = Run(tiny(), [])
    told = list[str]()
    observer = Observer(
        on_progress=lambda _: told.append("snapshot"), on_record=lambda record: told.append(str(record))
    )
    run.recorder.answers["take_records"] = Ref(["first", "second"])
    looking = Watch(run.plan, run.world, [], observer)
    looking._look()
    run.recorder.answers["take_records"] = Ref(ActorUnavailableError("", None))  # it is being started again
    looking._look()
    run.recorder.answers["take_records"] = Ref(["third"])
    looking._look()
    assert told == ["first", "second", "snapshot", "third", "snapshot"]


def test_a_run_is_stopped_when_its_clients_are_and_each_is_told(ray: Ray, tiny: Callable[..., Plan]) -> None:
    plan = tiny()
    run = Run(plan, [spec.path for spec in plan.root.clients])
    stopping = lambda: [run.end(path, "stopped") for path in run.actors]  # noqa: E731
    assert run.watched(nothing, stopping, nothing, should_stop=lambda: True) == "stopped"
    assert all(("stop",) in actor.calls for actor in run.actors.values())


def test_an_inner_node_that_restarts_is_waited_for_again(ray: Ray, tiny: Callable[..., Plan]) -> None:
    plan = tiny()
    run = Run(plan, [spec.path for spec in plan.root.clients])
    world = run.world.inner["world"]

    def restart() -> None:
        world.answers.pop("ended").value = ActorUnavailableError("", None)

    done = lambda: [run.end(path, "finished") for path in run.actors]  # noqa: E731
    assert run.watched(restart, done, nothing, run.end_nodes, nothing) == "finished"
    assert world.calls.count(("ended",)) > 1


def test_a_client_that_never_came_is_given_up_when_the_others_have_ended(ray: Ray, tiny: Callable[..., Plan]) -> None:
    plan = tiny()
    *others, late = [spec.path for spec in plan.root.clients]
    run = Run(plan, [*others, late], **{late.rsplit("/", 1)[1]: "waiting"})
    done = lambda: [run.end(path, "finished") for path in others]  # noqa: E731
    assert run.watched(done, nothing, run.end_nodes, nothing) == "finished"
    parent, _, name = late.rpartition("/")
    assert ("give_up", name) in run.world.inner[parent].calls
    assert ray.killed == [run.actors[late]]


def test_the_place_of_a_client_that_left_goes_to_the_next(
    ray: Ray, tiny: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = {
        "federation": "two",
        "min_clients": 1,
        "max_clients": 1,
        "children": [client("a", tmp_path, 1), client("b", tmp_path, 2)],
    }
    plan = tiny([two])
    run = Run(plan, ["world/two/a"])
    made = Actor()
    started: list[tuple[str, bool]] = []

    def start(_: Plan, spec: Any, world: World, *, begin: bool, detached: bool) -> Actor:
        started.append((spec.path, begin))
        return made

    monkeypatch.setattr(create, "create", start)
    left = lambda: run.end("world/two/a", "left")  # noqa: E731

    finish = lambda: setattr(made.answers["outcome"], "value", "finished")  # noqa: E731
    begin = lambda: run.trains("world/two/b")  # noqa: E731
    assert run.watched(left, begin, finish, run.end_nodes, nothing) == "finished"
    assert started == [("world/two/b", True)]
    assert ray.killed == [run.actors["world/two/a"]]


class PoolActor(Actor):
    """An actor in which several clients live; answers are given for a method and a path."""

    def _call(self, name: str, *arguments: Any) -> Ref:
        key = f"{name} {arguments[0]}"
        if name in ("live", "outcome"):
            self.answers.setdefault(key, Ref())
        return super()._call(key, *arguments[1:])

    def end(self, method: str, path: str, outcome: str) -> None:
        self.answers[f"{method} {path}"].value = outcome


def pooled(tiny: Callable[..., Plan], folder: Path) -> tuple[Run, PoolActor]:
    """A federation with three clients and two places, which have a pool."""
    two = {"federation": "two", "max_clients": 2, "children": [crowd("a", folder, copies=3)]}
    plan = rundir.create(tiny([two], resources={"clients_per_process": 2}))
    run, actor, there = Run(plan, []), PoolActor(), plan.root.clients[:2]
    pool = run.world.pools[POOL] = Pool(POOL, actor, there[0])
    for spec in there:
        run.world.enter(spec.path, pool)
        run.trains(spec.path)
    place = {"address": "", "namespace": "", "local": True, "anchor": {}, "pools": {POOL: list(pool.paths)}}
    living.remember(plan.run_dir, place)
    return run, actor


POOL = "world/two/@a-1"


def test_the_place_in_a_pool_of_a_client_that_left_goes_to_the_next(
    ray: Ray, tiny: Callable[..., Plan], tmp_path: Path
) -> None:
    run, actor = pooled(tiny, tmp_path)
    first, second, third = (spec.path for spec in run.plan.root.clients)

    def finish() -> None:
        assert (living.recall(run.plan.run_dir) or {})["pools"] == {POOL: [second, third]}
        assert run.world.pool_names == {second: POOL, third: POOL}
        actor.end("outcome", second, "finished")
        actor.end("live", third, "finished")

    left = lambda: actor.end("outcome", first, "left")  # noqa: E731
    begin = lambda: run.trains(third)  # noqa: E731
    assert run.watched(left, begin, finish, run.end_nodes, nothing) == "finished"
    assert ray.killed == []


def test_a_pool_ends_when_its_last_client_has_left(ray: Ray, tiny: Callable[..., Plan], tmp_path: Path) -> None:
    run, actor = pooled(tiny, tmp_path)
    first, second, third = (spec.path for spec in run.plan.root.clients)

    def both_left() -> None:
        actor.end("outcome", first, "left")
        actor.end("outcome", second, "left")

    def third_left() -> None:
        assert ray.killed == []
        actor.end("live", third, "left")

    begin = lambda: run.trains(third)  # noqa: E731
    assert run.watched(both_left, begin, third_left, run.end_nodes, nothing) == "finished"
    assert ray.killed == [actor]
    assert (living.recall(run.plan.run_dir) or {})["pools"] == {}


def test_a_client_that_another_process_has_let_into_a_pool_is_waited_for(
    ray: Ray, tiny: Callable[..., Plan], tmp_path: Path
) -> None:
    run, actor = pooled(tiny, tmp_path)
    first, second, third = (spec.path for spec in run.plan.root.clients)

    def joins() -> None:
        living.enter_pool(run.plan.run_dir, third, POOL)
        run.trains(third)

    def others_finish() -> None:
        actor.end("outcome", first, "finished")
        actor.end("outcome", second, "finished")
        run.end_nodes()

    finishes = lambda: actor.end("outcome", third, "finished")  # noqa: E731
    assert run.watched(joins, others_finish, nothing, finishes, run.end_nodes, nothing) == "finished"
    assert run.world.pools[POOL].paths == [first, second, third]


def test_a_pool_has_room_for_siblings_that_train_alike(tiny: Callable[..., Plan], tmp_path: Path) -> None:
    names = {"a": {}, "b": {}, "fast": {"training": {"lr": 1e-2}}, "alone": {"resources": {"clients_per_process": 1}}}
    children = [client(name, tmp_path, number, **settings) for number, (name, settings) in enumerate(names.items())]
    north = {"federation": "north", "children": [client("c", tmp_path, 9)]}
    specs = {spec.name: spec for spec in tiny([*children, north], resources={"clients_per_process": 2}).root.clients}
    pool = Pool("world/@a", Actor(), specs["a"], ["world/a"])
    assert [name for name, spec in specs.items() if pool.has_room_for(spec)] == ["a", "b"]
    pool.paths.append("world/b")
    assert not any(pool.has_room_for(spec) for spec in specs.values()), "it is full"
