"""Both ends of a border as actors, constructed directly: an object store of dictionaries stands in for Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.exceptions import RayActorError
from support.event_loop_ray import FakeRay, Handle, Method, Recorder, an_update, in_place_of_ray, until
from support.gateway import make_member, make_world, moved_to
from support.worlds import client

import actors.gateway_node
import actors.parent_proxy
from actors.federation import FederationActor
from actors.gateway import GatewayActor
from actors.parent_proxy import ParentProxy
from actors.shared import Address
from actors.world import WorldActor
from worldlm_ray.aggregation.children import Status
from worldlm_ray.errors import GatewayError, MessageError
from worldlm_ray.plan import build
from worldlm_ray.plan.plan import Plan
from worldlm_ray.records import BorderRecord
from worldlm_ray.run_clock import RunClock

Tiny = Callable[..., Plan]
PATH = "world/south"


class TwoRays(FakeRay):
    """Two clusters: a world's, and a member's in which other actors have the same names."""

    def __init__(self) -> None:
        super().__init__()
        self.clusters: dict[str, dict[str, Any]] = {"world": {}, "member": {}}
        for cluster in self.clusters.values():
            cluster["recorder"] = Recorder()

    def get_actor(self, name: str, *, namespace: str) -> Any:
        found = self.clusters[namespace].get(name)
        if found is None:
            raise ValueError(name)
        return found


@dataclass
class Border:
    """The plans of both sides, and the clusters that their actors live in."""

    rays: TwoRays
    world: Plan
    member: Plan
    keys: Any

    def address(self, plan: Plan, path: str) -> Address:
        return Address(plan, path, RunClock.starting(), "world" if plan is self.world else "member")

    async def open(self) -> tuple[WorldActor, GatewayActor, ParentProxy]:
        """A world that has started, its gateway, and the proxy of a member."""
        world, gateway = WorldActor(self.address(self.world, "world")), GatewayActor(self.address(self.world, "world"))
        self.rays.clusters["world"]["world"] = Handle(world)
        await world.start()
        assert self.member.config.joins is not None
        moved_to(Path(self.member.config.joins), await gateway.start())
        proxy = ParentProxy(self.address(self.member, PATH))
        self.rays.clusters["member"]["world"] = Handle(proxy)
        return world, gateway, proxy

    def records(self, cluster: str) -> list[Any]:
        recorder: Recorder = self.rays.clusters[cluster]["recorder"]
        return recorder.records


@pytest.fixture
def border(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Border:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    in_place_of_ray(monkeypatch)
    rays = TwoRays()
    for module in (actors.shared, actors.inner, actors.drivers, actors.gateway_node, actors.parent_proxy):
        monkeypatch.setattr(module, "ray", rays)
    keys = make_world(tmp_path / "gateway")
    make_member(keys, tmp_path / "profile", PATH)
    gateway = {"listen": "127.0.0.1:0", "dir": str(tmp_path / "gateway"), "staging_dir": str(tmp_path)}
    world = tiny([{"member": "south", "required": True}], gateway=gateway)
    tree = {"federation": PATH, "children": [client("c", tmp_path, 3)]}
    member = tiny(world=tree, joins=str(tmp_path / "profile"), run_dir=str(tmp_path / "member"))
    return Border(rays, world, member, keys)


def through(border: Border, work: Callable[[WorldActor, GatewayActor, ParentProxy], Awaitable[None]]) -> None:
    async def run() -> None:
        world, gateway, proxy = await border.open()
        try:
            await asyncio.wait_for(work(world, gateway, proxy), 20.0)
        finally:
            await gateway.stop()
            await proxy._link.close()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

    asyncio.run(run())


def test_a_federation_exchanges_with_a_world_that_it_takes_for_a_neighbour(border: Border) -> None:
    async def work(world: WorldActor, gateway: GatewayActor, proxy: ParentProxy) -> None:
        assert await proxy.greet() == ""
        south = FederationActor(border.address(border.member, PATH))
        await south.start()
        await south.join("c", 1, 0)
        assert (await south.push("c", 1, 1, *an_update(border.member, "c"))).accepted
        await until(lambda: world.node.version == 1 and south.node.in_flight is None)
        expected = build.initial(border.world) + np.float32(0.5)
        assert np.allclose(world.node.theta, expected)
        assert south.node.theta.tobytes() == world.node.theta.tobytes()
        assert await world.has_yet_to_end("south")
        await south.done("c", 1, 1)
        await asyncio.wait_for(world.ended(), 10.0)
        assert not await world.has_yet_to_end("south")

    through(border, work)
    for cluster, node in (("world", PATH), ("member", "world")):  # both have counted the same
        crossed = [each for each in border.records(cluster) if isinstance(each, BorderRecord)]
        assert {each.node for each in crossed} == {node}
        assert sum(each.accepted for each in crossed) == 1
        assert sum(each.bytes_up for each in crossed) == border.world.layout.nbytes
        assert sum(each.bytes_down for each in crossed) == border.world.layout.nbytes
        assert crossed[-1].certificate_days == pytest.approx(30.0, abs=0.1)
        assert crossed[-1].offline_s == 0.0
        assert all(each.mbit_up and each.mbit_down for each in crossed if each.bytes_up)
        assert crossed[-1].parameters == border.world.layout.size
    told = [(each.node, each.event) for each in border.records("world") if hasattr(each, "event")]
    assert [event for node, event in told if node == PATH] == ["training", "finished"]
    assert ("world", "training") in [
        (each.node, each.event) for each in border.records("member") if hasattr(each, "event")
    ]


def test_a_world_that_has_died_is_one_that_cannot_be_reached(border: Border) -> None:
    async def work(world: WorldActor, gateway: GatewayActor, proxy: ParentProxy) -> None:
        async def dead(*_: Any) -> None:
            raise RayActorError

        border.rays.clusters["world"]["world"] = handle = Handle(world)
        await proxy.join("south", 1, 0)
        handle.heartbeat = Method(dead)  # type: ignore[attr-defined]
        gateway._parent._handle = None
        with pytest.raises(MessageError, match="unreachable"):
            await proxy.heartbeat("south", 1, 1)
        del border.rays.clusters["world"]["world"]
        with pytest.raises(MessageError, match="unreachable"):
            await proxy.heartbeat("south", 1, 1)
        border.rays.clusters["world"]["world"] = Handle(world)
        await proxy.heartbeat("south", 1, 1)

    through(border, work)


def test_a_member_of_another_node_is_not_let_in(border: Border, tmp_path: Path) -> None:
    async def work(world: WorldActor, gateway: GatewayActor, proxy: ParentProxy) -> None:
        stranger = tmp_path / "stranger"
        make_member(border.keys, stranger, "world/north/south")
        moved_to(stranger, await gateway.start())
        plan = replace(border.member, config=replace(border.member.config, joins=str(stranger)))
        other = ParentProxy(border.address(plan, PATH))
        with pytest.raises(MessageError, match="no child of world"):
            await other.join("south", 1, 0)
        await other._link.close()

    through(border, work)


def test_a_port_that_is_taken_is_named(border: Border) -> None:
    async def work(world: WorldActor, gateway: GatewayActor, proxy: ParentProxy) -> None:
        taken = replace(border.world.config.gateway, listen=f"127.0.0.1:{await gateway.start()}")
        border.world = replace(border.world, config=replace(border.world.config, gateway=taken))
        with pytest.raises(GatewayError, match=r"cannot listen at 127\.0\.0\.1:"):
            await GatewayActor(border.address(border.world, "world")).start()

    through(border, work)


def test_a_member_that_never_came_is_given_up_when_no_other_child_trains(border: Border) -> None:
    async def work(world: WorldActor, gateway: GatewayActor, proxy: ParentProxy) -> None:
        world.node.children.set_status("south", Status.EXPECTED)
        await world.give_up_absent("south")  # no child has been there: the run has not begun
        assert world.node.children["south"].status is Status.EXPECTED
        assert not await world.has_yet_to_end("south")
        await proxy.join("south", 1, 0)
        assert await world.has_yet_to_end("south")
        await proxy.done("south", 1, 1)
        world.node.children.set_status("south", Status.EXPECTED)
        await world.give_up_absent("south")
        assert world.node.children["south"].status is Status.DONE

    through(border, work)
