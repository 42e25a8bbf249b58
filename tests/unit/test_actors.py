"""The actor classes, constructed directly: an object store of dictionaries stands in for Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import actors.federation
import actors.inner
import actors.shared
import actors.uplink
from actors.federation import FederationActor
from actors.shared import Address, RunClock
from actors.world import WorldActor
from worldlm_ray.messages import Packed, Update, pack, unpack_model
from worldlm_ray.params import Flat
from worldlm_ray.plan import Plan
from worldlm_ray.records import Record, VerdictRecord


class Ref:
    """An object reference that can be awaited, as Ray's can."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __await__(self) -> Any:
        yield from asyncio.sleep(0).__await__()
        return self.value


class Method:
    """`actor.method.remote(...)`: runs when awaited."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.remote = call


class Recorder:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.record = Method(self.records.extend)


class FakeRay:
    """The few calls of Ray that actors make."""

    def __init__(self) -> None:
        self.actors: dict[str, Any] = {"recorder": Recorder()}
        self.puts = 0

    def put(self, values: Flat) -> Ref:
        self.puts += 1
        shared = values.copy()
        shared.flags.writeable = False
        return Ref(shared)

    def get(self, ref: Ref) -> Any:
        return ref.value

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(was_current_actor_reconstructed=False)

    def get_actor(self, name: str, *, namespace: str) -> Any:
        assert namespace == "test"
        return self.actors[name]


class Handle:
    """What `ray.get_actor` gives for an actor of ours."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def __getattr__(self, name: str) -> Method:
        return Method(getattr(self.actor, name))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    ray = FakeRay()
    for module in (actors.shared, actors.inner, actors.uplink):
        monkeypatch.setattr(module, "ray", ray)
    monkeypatch.setattr("atexit.register", lambda *_: None)
    return ray


def address(plan: Plan, path: str) -> Address:
    return Address(plan.to_mapping(), path, RunClock(0.0), "test")


def an_update(plan: Plan, sender: str, seq: int = 1, tokens: int = 10) -> tuple[bytes, list[Ref]]:
    values = np.full(plan.layout.size, 0.5, np.float32)
    update = Update(sender=sender, seq=seq, base_version=0, tokens=tokens, started_tokens=tokens, values=values)
    packed = pack(update, plan.layout)
    return packed.header, [Ref(packed.values)]


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
    np.testing.assert_array_equal(model.values, plan.initial())


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
        assert actor.node.exchanging
        await actor.pull("a", 1, 1, 20)
        still = actor.node.exchanging
        for _ in range(200):
            await asyncio.sleep(0)
        return actor, world, still

    actor, world, still_exchanging = asyncio.run(scene())
    assert still_exchanging
    assert not actor.node.exchanging
    assert actor.node.base_version == world.node.version == 1


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
