"""Many clients in one process, constructed directly: each lives as one with a process does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayActorError
from support.event_loop_ray import FakeRay, Handle, Method, an_update, in_place_of_ray, until
from support.pools import UNHURRIED, Pool, two
from support.worlds import client, crowd, write_text

import actors.drivers
import actors.inner
import actors.shared
from actors.client_pool import ClientPoolActor
from actors.shared import Address
from actors.world import WorldActor
from worldlm_ray.client import above
from worldlm_ray.plan import rundir
from worldlm_ray.plan.plan import Plan
from worldlm_ray.records import LifeRecord, MergeRecord, OwnModelRecord
from worldlm_ray.run_clock import RunClock
from worldlm_ray.storage import checkpoint
from worldlm_ray.tracking.audit import proofs


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    return in_place_of_ray(monkeypatch)


class Deaf(Handle):
    """A parent that never answers the first call of each method, though it has heard it."""

    def __init__(self, actor: Any) -> None:
        super().__init__(actor)
        self.unanswered: list[str] = []

    def __getattr__(self, name: str) -> Method:
        answer = getattr(self.actor, name)
        if name not in ("pull", "push") or name in self.unanswered:
            return Method(answer)
        self.unanswered.append(name)

        async def silent(*arguments: Any) -> None:
            await answer(*arguments)
            await asyncio.Event().wait()

        return Method(silent)


def test_clients_of_one_process_ask_again_for_answers_that_never_come(
    fake: FakeRay, tiny: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actors.drivers, "ANSWER_S", 0.3)
    phones = client("phone", tmp_path, 1) | {"copies": 3}
    write_text(tmp_path / "phone.txt", seed=1, size=40_000)
    plan = rundir.create(tiny([phones], resources={"clients_per_process": 3}, budget={"rounds": 2}))
    paths = [spec.path for spec in plan.root.clients]

    async def scene() -> tuple[WorldActor, list[str], Deaf]:
        world = WorldActor(Address(plan, "world", RunClock.starting(), "test"))
        fake.actors["world"] = parent = Deaf(world)
        await world.start()
        host = ClientPoolActor(Address(plan, paths[0], RunClock.starting(), "test"), paths)
        assert await asyncio.gather(*map(host.ready, paths)) == [0, 0, 0]
        for path in paths:
            await host.start(path)
        ends = await asyncio.wait_for(asyncio.gather(*map(host.outcome, paths)), 60.0)
        measure = await host.measure(paths[0])
        assert measure is not None
        assert measure.loss > 0.0
        return world, ends, parent

    world, ends, parent = asyncio.run(scene())
    assert sorted(parent.unanswered) == ["pull", "push"]
    assert ends == ["finished"] * 3
    assert world.node.intake.accepted == 6
    assert set(world.node.intake.refused) <= {"duplicate"}
    assert world.node.published.tokens == 6 * plan.round_tokens(plan.root.clients[0])
    found = proofs(plan.run_dir)
    assert {proof.sender: proof.applied for proof in found} == {f"phone-{n}": [1, 2] for n in (1, 2, 3)}


def test_clients_of_one_process_measure_the_published_model(
    fake: FakeRay, tiny: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(above, "SHARE", 1e9)
    phones = client("phone", tmp_path, 1) | {"copies": 2}
    write_text(tmp_path / "phone.txt", seed=1, size=40_000)
    plan = rundir.create(tiny([phones], resources={"clients_per_process": 2}, budget={"rounds": 2}))
    paths = [spec.path for spec in plan.root.clients]

    async def scene() -> WorldActor:
        world = WorldActor(Address(plan, "world", RunClock.starting(), "test"))
        fake.actors["world"] = Handle(world)
        await world.start()
        host = ClientPoolActor(Address(plan, paths[0], RunClock.starting(), "test"), paths)
        for path in paths:
            await host.ready(path)
            await host.start(path)
        await asyncio.wait_for(asyncio.gather(*map(host.outcome, paths)), 60.0)
        return world

    world = asyncio.run(scene())
    found = [record for record in fake.actors["recorder"].records if isinstance(record, OwnModelRecord)]
    assert {(record.node, record.by) for record in found} == {("world", path) for path in paths}
    assert {record.version for record in found} <= set(range(1, world.node.version + 1))


class Gate(Handle):
    """A parent that gives no model while the gate is shut."""

    def __init__(self, actor: Any) -> None:
        super().__init__(actor)
        self.open, self.held = asyncio.Event(), 0
        self.open.set()

    def __getattr__(self, name: str) -> Method:
        answer = getattr(self.actor, name)

        async def late(*arguments: Any) -> Any:
            self.held += 1
            await self.open.wait()
            self.held -= 1
            return await answer(*arguments)

        return Method(late if name == "pull" else answer)


async def held_in_mid_exchange(fake: FakeRay, plan: Plan) -> tuple[Pool, Gate]:
    """Two clients that have ended a round while their pulls are held back."""
    pool = Pool(fake, plan)
    pool.world = WorldActor(pool.address("world"))
    await pool.world.start()
    fake.actors["world"] = gate = Gate(pool.world)
    await pool.live()
    await until(lambda: all(pool.client(number).round >= 1 for number in range(2)))
    gate.open.clear()
    await until(lambda: gate.held == 2 and all(pool.client(number).is_whole for number in range(2)))
    return pool, gate


def test_clients_of_one_process_train_a_round_while_they_exchange(
    fake: FakeRay, tiny: Callable[..., Plan], tmp_path: Path
) -> None:
    plan = two(tiny, tmp_path, exchange={"overlap": True}, training=UNHURRIED, budget={"rounds": 5})

    async def scene() -> tuple[Pool, list[str]]:
        pool, gate = await held_in_mid_exchange(fake, plan)
        assert [pool.client(number).in_flight is not None for number in range(2)] == [True, True]
        gate.open.set()
        return pool, await pool.ends()

    pool, ends = asyncio.run(scene())
    assert ends == ["finished"] * 2
    assert [pool.client(number).steps for number in range(2)] == [20, 20]
    assert (pool.world.node.intake.accepted, pool.world.node.intake.refused) == (10, {})
    assert {proof.sender: proof.applied for proof in proofs(plan.run_dir)} == {
        f"phone-{n}": [1, 2, 3, 4, 5] for n in (1, 2)
    }


PRIVATE = {
    "unit": "record",
    "noise_multiplier": 1.0,
    "target_epsilon": 3.0,
    "on_exhausted": "pause",
    "grad_sample_mode": "hooks",
}


def test_private_clients_of_one_process_pause_and_follow_their_parent(
    fake: FakeRay, tiny: Callable[..., Plan], tmp_path: Path
) -> None:
    private = crowd("phone", tmp_path, copies=2) | {"privacy": PRIVATE, "training": {"batch_size": 40}}
    plan = rundir.create(
        tiny(
            [private, client("free", tmp_path, 2)],
            resources={"clients_per_process": 2},
            budget={"rounds": 30},
            liveness={"heartbeat_s": 0.05},
        )
    )

    async def scene() -> Pool:
        pool = Pool(fake, plan, without=("free",))
        world = await pool.begin()
        assert await pool.ends() == ["finished"] * 2
        versions = world.node.version
        assert 0 < pool.client(0).round < 30
        free = Handle(world)
        await world.join("free", 1, 0)
        await world.push("free", 1, 1, *an_update(plan, "free"))
        await free.pull.remote("free", 1, 1, 20)
        await until(lambda: all(pool.client(number).base_version > versions for number in range(2)))
        return pool

    pool = asyncio.run(scene())
    assert [record.event for record in pool.records(LifeRecord)].count("paused") == 2
    assert pool.records(MergeRecord)
    for number in range(2):
        account = pool.client(number).account
        assert account.epsilon() <= 3.0
        assert len(account.ledger.entries()) == pool.client(number).round


class Dying(Handle):
    """A parent that dies when it is told to."""

    dead = False

    def __getattr__(self, name: str) -> Method:
        answer = getattr(self.actor, name)

        async def call(*arguments: Any) -> Any:
            if self.dead:
                raise RayActorError
            return await answer(*arguments)

        return Method(call)


def test_clients_that_have_ended_tell_it_to_a_parent_that_has_forgotten(
    fake: FakeRay, tiny: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = two(tiny, tmp_path, liveness={"heartbeat_s": 0.05}, budget={"rounds": 1})

    async def scene() -> WorldActor:
        pool = Pool(fake, plan)
        first = WorldActor(pool.address("world"))
        monkeypatch.setattr(first._checkpoints, "check_newest", lambda: None)  # it would end this process
        await first.start()
        fake.actors["world"] = dying = Dying(first)
        await pool.live()
        assert await pool.ends() == ["finished"] * 2
        second = WorldActor(pool.address("world"))
        await second.start()
        assert second.node.incarnation > first.node.incarnation
        fake.actors["world"] = Handle(second)
        dying.dead = True
        await until(lambda: second.node.ended)
        return second

    assert asyncio.run(scene()).node.intake.accepted == 2


def test_a_client_of_a_pool_that_leaves_has_its_update_arrive(
    fake: FakeRay, tiny: Callable[..., Plan], tmp_path: Path
) -> None:
    plan = two(tiny, tmp_path, budget={"rounds": 1000}, exchange={"overlap": True}, checkpoint={"every_updates": 1})

    async def scene() -> Pool:
        pool = Pool(fake, plan)
        world = await pool.begin()
        await until(lambda: world.node.intake.accepted >= 4)
        for path in pool.paths:
            await pool.pool.leave(path)
        assert await pool.ends() == ["left"] * 2
        return pool

    pool = asyncio.run(scene())
    rounds = [pool.client(number).round for number in range(2)]
    assert sum(rounds) == pool.world.node.intake.accepted
    assert rounds == [pool.client(number).seq for number in range(2)]


def test_clients_of_a_pool_stop_while_their_parent_is_silent_and_go_on_later(
    fake: FakeRay, tiny: Callable[..., Plan], tmp_path: Path
) -> None:
    plan = two(tiny, tmp_path, exchange={"overlap": True}, training=UNHURRIED, budget={"rounds": 5})

    async def scene() -> tuple[Pool, list[str]]:
        pool, gate = await held_in_mid_exchange(fake, plan)
        for path in pool.paths:
            await pool.pool.stop(path)
        assert await pool.ends() == ["stopped"] * 2
        found = checkpoint.load(checkpoint.folder(plan.run_dir, pool.paths[0]))
        assert found is not None
        assert found[0]["whole"], "the round that waits for the exchange is kept"
        gate.open.set()
        await pool.live()
        return pool, await pool.ends()

    pool, ends = asyncio.run(scene())
    assert ends == ["finished"] * 2
    assert [pool.client(number).steps for number in range(2)] == [20, 20]
    assert pool.world.node.published.tokens == 10 * plan.round_tokens(plan.root.clients[0])
