"""Clients that come to a pool and leave it while it lives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.event_loop_ray import FakeRay, Handle, in_place_of_ray, until
from support.pools import UNHURRIED, Pool, two
from support.worlds import crowd, write_text

from actors.client_pool import ClientPoolActor
from actors.world import WorldActor
from worldlm_ray.config.loading import save
from worldlm_ray.errors import DataError
from worldlm_ray.plan import living, membership, rundir
from worldlm_ray.plan.plan import Plan
from worldlm_ray.records import LifeRecord
from worldlm_ray.tracking.audit import proofs


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    return in_place_of_ray(monkeypatch)


async def leave(pool: Pool, path: str) -> None:
    """Have a client of the pool leave after a round, and wait until it has."""
    await until(lambda: pool.pool.members[path].client.round >= 1)
    await pool.pool.leave(path)
    assert await asyncio.wait_for(pool.pool.outcome(path), 60.0) == "left"


def test_a_client_takes_the_place_of_one_that_has_left_a_pool(
    fake: FakeRay, tiny: Callable[..., Plan], tmp_path: Path
) -> None:
    world = {"max_clients": 2, "children": [crowd("phone", tmp_path, copies=3)]}
    settings: Any = {"resources": {"clients_per_process": 2}, "budget": {"rounds": 3}, "training": UNHURRIED}
    plan = rundir.create(tiny(world=world, **settings))
    first, second, third = (spec.path for spec in plan.root.clients)

    async def scene() -> Pool:
        pool = Pool(fake, plan, without=("phone-3",))
        await pool.begin()
        await leave(pool, first)
        comes = asyncio.create_task(pool.pool.live(third, plan))
        again = asyncio.create_task(pool.pool.live(third, plan))  # a call that Ray repeats
        ends = await asyncio.wait_for(asyncio.gather(pool.pool.outcome(second), comes, again), 60.0)
        assert ends == ["finished"] * 3
        assert await pool.pool.outcome(first) == "left", "each client that asks later hears it, too"
        await pool.pool.stop(first)
        return pool

    pool = asyncio.run(scene())
    assert set(pool.pool.members) == {second, third}, "a client that has left makes room"
    assert [pool.pool.members[path].client.round for path in (second, third)] == [3, 3]
    events = [(record.node, record.event) for record in pool.records(LifeRecord)]
    assert events.index((first, "left")) < events.index((third, "started"))
    found = {proof.sender: proof for proof in proofs(plan.run_dir)}
    assert all(proof.holds for proof in found.values())
    assert found["phone-2"].applied == found["phone-3"].applied == [1, 2, 3]


def test_a_client_comes_back_to_the_pool_that_it_has_left(
    fake: FakeRay, tiny: Callable[..., Plan], tmp_path: Path
) -> None:
    plan = two(tiny, tmp_path, training=UNHURRIED, budget={"rounds": 4})

    async def scene() -> tuple[Pool, int]:
        pool = Pool(fake, plan)
        await pool.begin()
        first, second = pool.paths
        await leave(pool, first)
        before = pool.pool.members[first].client
        ends = asyncio.gather(pool.pool.outcome(second), pool.pool.live(first, plan))
        assert await asyncio.wait_for(ends, 60.0) == ["finished"] * 2
        assert pool.client(0).incarnation > before.incarnation
        return pool, before.round

    pool, rounds = asyncio.run(scene())
    assert 1 <= rounds < 4
    assert pool.world.node.intake.accepted == 8
    assert {proof.sender: proof.applied for proof in proofs(plan.run_dir)} == {
        f"phone-{n}": [1, 2, 3, 4] for n in (1, 2)
    }


def test_a_client_that_is_new_to_the_run_enters_a_pool_or_is_dismissed(
    fake: FakeRay, tiny: Callable[..., Plan], tmp_path: Path
) -> None:
    plan = two(tiny, tmp_path, training=UNHURRIED, resources={"clients_per_process": 4})
    text, empty = write_text(tmp_path / "new.txt", seed=9), tmp_path / "empty.txt"
    empty.write_text("too short", encoding="utf-8")
    larger = membership.with_client(plan, "world", "new", files=[str(text)], overrides=[])
    broken = membership.with_client(plan, "world", "broken", files=[str(empty)], overrides=[])

    async def scene() -> Pool:
        pool = Pool(fake, plan)
        await pool.begin()
        await pool.pool.admit("world/broken", broken)
        with pytest.raises(DataError):
            await pool.pool.ready("world/broken")
        await pool.pool.dismiss("world/broken")
        assert "world/broken" not in pool.pool.members
        assert "world/broken" not in pool.pool.clients.specs, "its text is not cut again"
        await pool.pool.admit("world/new", larger)
        assert await pool.pool.ready("world/new") == 0
        save(larger.config, plan.run_dir / rundir.CONFIG)  # its parent looks there what it may claim
        await pool.pool.start("world/new")
        await pool.pool.dismiss("world/new")
        ends = await asyncio.wait_for(asyncio.gather(*map(pool.pool.outcome, [*pool.paths, "world/new"])), 60.0)
        assert ends == ["finished"] * 3
        return pool

    pool = asyncio.run(scene())
    assert pool.pool.members["world/new"].client.round == 3
    assert pool.world.node.intake.accepted == 9


def test_a_pool_that_is_started_again_has_the_clients_that_live_there_now(
    fake: FakeRay, tiny: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = {"min_clients": 1, "children": [crowd("phone", tmp_path, copies=4)]}
    plan = rundir.create(tiny(world=world, resources={"clients_per_process": 3}, budget={"rounds": 2}))
    one, _, three, _ = (spec.path for spec in plan.root.clients)
    place = {"address": "here", "namespace": "test", "local": True, "anchor": {}, "pools": {Pool.name: [one, three]}}
    living.remember(plan.run_dir, place)
    monkeypatch.setattr("actors.client_pool.was_restarted", lambda: True)

    async def scene() -> Pool:
        pool = Pool(fake, plan, without=("phone-4",))
        pool.world = WorldActor(pool.address("world"))
        await pool.world.start()
        fake.actors["world"] = Handle(pool.world)
        pool.pool = ClientPoolActor(pool.address(one), pool.paths, Pool.name)
        assert await pool.ends() == ["finished", "left", "finished"], "they go on without being told to"
        return pool

    assert set(asyncio.run(scene()).pool.members) == {one, three}


def test_a_pool_of_an_elastic_federation_begins_when_there_is_room_for_it(
    fake: FakeRay, tiny: Callable[..., Plan], tmp_path: Path
) -> None:
    plan = two(tiny, tmp_path, budget={"rounds": 1})

    async def scene() -> list[str]:
        pool = Pool(fake, plan)
        pool.world = WorldActor(pool.address("world"))
        await pool.world.start()
        fake.actors["world"] = Handle(pool.world)
        address = replace(pool.address(pool.paths[0]), begin=True)
        pool.pool = ClientPoolActor(address, pool.paths, Pool.name)
        return await pool.ends()

    assert asyncio.run(scene()) == ["finished"] * 2
