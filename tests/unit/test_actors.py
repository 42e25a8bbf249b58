"""The actor classes, constructed directly: an object store of dictionaries stands in for Ray."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.exceptions import OwnerDiedError, RayTaskError
from support.event_loop_ray import FakeRay, Handle, Ref, an_update, in_place_of_ray, until

import actors.drivers
import actors.federation
import actors.inner
import actors.shared
from actors.federation import FederationActor
from actors.shared import Address
from actors.world import WorldActor
from worldlm_ray.errors import CheckpointError
from worldlm_ray.exchange.messages import Packed, unpack_model
from worldlm_ray.launch.calls import with_living_owners
from worldlm_ray.plan import build
from worldlm_ray.plan.plan import Plan
from worldlm_ray.records import VerdictRecord
from worldlm_ray.run_clock import RunClock
from worldlm_ray.storage import checkpoint


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    return in_place_of_ray(monkeypatch)


def address(plan: Plan, path: str) -> Address:
    return Address(plan, path, RunClock.starting(), "test")


def called(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, *, seen: Callable[[], Any] = lambda: None
) -> list[Any]:
    """What `seen` says at the beginning of each call of a method."""
    found, method = list[Any](), getattr(owner, name)

    def noted(*arguments: Any) -> Any:
        found.append(seen())
        return method(*arguments)

    monkeypatch.setattr(owner, name, noted)
    return found


class SlowStorage:
    """Storage that takes each step of a checkpoint when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = self.ended = 0
        self.steady, self.rest = threading.Event(), threading.Event()
        write = checkpoint.save

        def save(*arguments: Any, on_steady: Callable[[], None], **options: Any) -> Path:
            self.begun += 1
            assert self.steady.wait(20.0)
            on_steady()
            assert self.rest.wait(20.0)
            try:
                return write(*arguments, on_steady=on_steady, **options)
            finally:
                self.ended += 1

        monkeypatch.setattr(checkpoint, "save", save)


def test_a_node_answers_while_its_checkpoint_is_written(
    fake: FakeRay, tiny: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tiny(checkpoint={"every_s": 0.0})
    first, second = (child.name for child in plan.root.children)
    storage = SlowStorage(monkeypatch)

    async def scene() -> WorldActor:
        world = WorldActor(address(plan, "world"))
        await world.start()
        assert (await world.push(first, 1, 1, *an_update(plan, first))).accepted
        await until(lambda: storage.begun == 1)
        # Not a byte is written yet, and nothing that changes is in it: the world goes on.
        for seq in (2, 3):
            assert (await world.push(first, 1, 1, *an_update(plan, first, seq, 10 * seq))).accepted
        assert (await world.push(second, 1, 1, *an_update(plan, second))).accepted
        await world.pull(second, 1, 1, 20)
        assert world.node.version == 4
        assert world.node.children[first].durable_seq == 0
        storage.steady.set()
        storage.rest.set()
        await until(lambda: world.node.children[first].durable_seq == 1)
        await world.save()
        assert world.node.children[first].durable_seq == 3
        return world

    world = asyncio.run(scene())
    found = checkpoint.load(checkpoint.folder(plan.run_dir, "world"))
    assert found is not None
    assert found[0]["published"]["version"] == 4
    np.testing.assert_array_equal(found[1]["theta"], world.node.theta)


def test_events_wait_only_until_what_they_change_is_written(
    fake: FakeRay, tiny: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tiny(checkpoint={"every_s": 0.0}, aggregation={"buffer_size": 3})
    first, second = (child.name for child in plan.root.children)
    storage = SlowStorage(monkeypatch)

    async def scene() -> WorldActor:
        world = WorldActor(address(plan, "world"))
        await world.start()
        await world.push(first, 1, 1, *an_update(plan, first))  # waits in the fold
        await until(lambda: storage.begun == 1)
        asked = called(monkeypatch, world._checkpoints, "steady")
        push = asyncio.create_task(world.push(second, 1, 1, *an_update(plan, second)))
        await until(lambda: bool(asked))
        assert world.node.intake.pending == [first], "it would change the fold that is being written"
        storage.steady.set()
        assert (await push).accepted
        assert storage.ended == 0
        storage.rest.set()
        await until(lambda: storage.ended >= 1)
        return world

    asyncio.run(scene())
    found = checkpoint.load(checkpoint.folder(plan.run_dir, "world"))
    assert found is not None
    assert found[0]["intake"]["fold"]["contributors"] in ([first], [first, second])


def test_an_exchange_goes_out_when_it_is_on_disk(
    fake: FakeRay, tiny: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tiny()
    path = plan.root.children[0].path
    storage = SlowStorage(monkeypatch)
    storage.steady.set()

    async def scene() -> None:
        world = WorldActor(address(plan, "world"))
        fake.actors["world"] = Handle(world)
        await world.start()
        actor = FederationActor(address(plan, path))
        await actor.start()
        await actor.join("a", 1, 0)
        assert (await actor.push("a", 1, 1, *an_update(plan, "a"))).accepted
        await until(lambda: storage.begun == 1)
        pushed = called(monkeypatch, world, "push", seen=lambda: storage.ended)
        await actor.pull("a", 1, 1, 20)
        storage.rest.set()
        await until(lambda: world.node.intake.accepted == 1)
        assert [ended >= 1 for ended in pushed] == [True], (
            "before, a crash would send another update under the same seq"
        )

    asyncio.run(scene())


def test_children_that_pull_a_version_share_one_copy(fake: FakeRay, tiny: Callable[..., Plan]) -> None:
    plan = tiny()
    federation_path = plan.root.children[0].path

    async def scene() -> list[Any]:
        world = WorldActor(address(plan, "world"))
        fake.actors["world"] = Handle(world)
        await world.start()
        actor = FederationActor(address(plan, federation_path))
        await actor.start()
        return [await actor.pull(name, 1, 1, 0) for name in ("a", "b", "a")]

    answers = asyncio.run(scene())
    assert len({id(refs[0]) for _, refs in answers}) == 1
    assert fake.puts == 2, "one of the world, one of the federation"
    header, refs = answers[0]
    model = unpack_model(Packed(header, refs[0].value), plan.layout)
    assert model.version == 0
    np.testing.assert_array_equal(model.values, build.initial(plan))


def test_a_federation_serves_its_children_while_it_exchanges(fake: FakeRay, tiny: Callable[..., Plan]) -> None:
    plan = tiny()
    federation_path = plan.root.children[0].path

    async def scene() -> tuple[FederationActor, WorldActor, bool]:
        world = WorldActor(address(plan, "world"))
        fake.actors["world"] = Handle(world)
        await world.start()
        actor = FederationActor(address(plan, federation_path))
        await actor.start()
        await actor.join("a", 1, 0)
        verdict = await actor.push("a", 1, 1, *an_update(plan, "a"))
        assert verdict.accepted
        # The exchange has begun and is not back: the child is answered all the same.
        assert actor.node.parent.is_open
        await actor.pull("a", 1, 1, 20)
        still = actor.node.parent.is_open
        await until(lambda: not actor.node.parent.is_open)
        return actor, world, still

    actor, world, still_exchanging = asyncio.run(scene())
    assert still_exchanging
    assert not actor.node.parent.is_open
    assert actor.node.parent.base_version == world.node.version == 1


@pytest.mark.parametrize("patience_s", [None, 0.3])
def test_a_federation_whose_storage_refuses_sends_nothing_until_its_patience_ends(
    fake: FakeRay, tiny: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch, patience_s: float | None
) -> None:
    plan = tiny(checkpoint={"patience_s": patience_s})
    federation_path, refuses, refused = plan.root.children[0].path, [True], []
    write = checkpoint.save

    def save(place: Path, *arguments: Any, **options: Any) -> Path:
        if refuses[0] and place == checkpoint.folder(plan.run_dir, federation_path):
            refused.append(place)
            raise CheckpointError(f"{place}: no space left")
        return write(place, *arguments, **options)

    monkeypatch.setattr(checkpoint, "save", save)
    monkeypatch.setattr(actors.federation, "STORAGE_AGAIN_S", 0.02)

    async def scene() -> WorldActor:
        world = WorldActor(address(plan, "world"))
        fake.actors["world"] = Handle(world)
        await world.start()
        actor = FederationActor(address(plan, federation_path))
        await actor.start()
        await actor.join("a", 1, 0)
        assert (await actor.push("a", 1, 1, *an_update(plan, "a"))).accepted
        await until(lambda: len(refused) >= 4)
        assert world.node.intake.accepted == 0
        await actor.pull("a", 1, 1, 20)  # the children are served all the while
        refuses[0] = patience_s is not None
        await until(lambda: not actor.node.parent.is_open)
        return world

    world = asyncio.run(scene())
    assert world.node.intake.accepted == 1
    warned = any("no checkpoint knows" in getattr(r, "detail", "") for r in fake.actors["recorder"].records)
    assert warned == (patience_s is not None)


def test_a_push_that_does_not_fit_is_answered_with_its_reason(fake: FakeRay, tiny: Callable[..., Plan]) -> None:
    plan = tiny()
    sender = plan.root.children[0].name

    async def scene() -> Any:
        actor = WorldActor(address(plan, "world"))
        await actor.start()
        header, _ = an_update(plan, sender)
        return await actor.push(sender, 1, 1, header, [Ref(np.zeros(3, np.float32))])

    verdict = asyncio.run(scene())
    assert (verdict.accepted, verdict.reason) == (False, "wrong_shape")
    recorded = [record for record in fake.actors["recorder"].records if isinstance(record, VerdictRecord)]
    assert [record.verdict for record in recorded] == ["wrong_shape"]


def test_what_a_dead_actor_handed_out_is_asked_for_again() -> None:
    lost = OwnerDiedError("00", b"", "")
    tries: list[BaseException | None] = [lost, RayTaskError("measure", "", lost), None]

    def read() -> str:
        error = tries.pop(0)
        if error is not None:
            raise error
        return "read"

    assert with_living_owners(read) == "read"
    tries[:] = [RayTaskError("measure", "", ValueError("another"))]
    with pytest.raises(RayTaskError):
        with_living_owners(read)
