"""A pool of clients on one event loop, below a world."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from actors.client_pool import ClientPoolActor
from actors.shared import Address
from actors.world import WorldActor
from support.event_loop_ray import FakeRay, Handle
from support.worlds import crowd
from worldlm_ray.plan import rundir
from worldlm_ray.plan.plan import Plan
from worldlm_ray.run_clock import RunClock

UNHURRIED = {"local_steps": 4, "batch_size": 4, "step_delay_s": 0.02}
"""Training that leaves time to shut the parent's gate."""


class Pool:
    """A world, and a pool of all of its clients but those left out."""

    name = "world/@phone-1"

    def __init__(self, fake: FakeRay, plan: Plan, *, without: tuple[str, ...] = ()) -> None:
        self.fake, self.plan = fake, plan
        self.paths = [spec.path for spec in plan.root.clients if spec.name not in without]

    async def begin(self) -> WorldActor:
        self.world = WorldActor(self.address("world"))
        await self.world.start()
        self.fake.actors["world"] = Handle(self.world)
        await self.live()
        return self.world

    async def live(self) -> None:
        self.pool = ClientPoolActor(self.address(self.paths[0]), self.paths, self.name)
        await asyncio.gather(*map(self.pool.ready, self.paths))
        for path in self.paths:
            await self.pool.start(path)

    def address(self, path: str) -> Address:
        return Address(self.plan, path, RunClock.starting(), "test")

    async def ends(self) -> list[str]:
        return await asyncio.wait_for(asyncio.gather(*map(self.pool.outcome, self.paths)), 60.0)

    def client(self, number: int) -> Any:
        return self.pool.members[self.paths[number]].client

    def records(self, kind: type) -> list[Any]:
        return [record for record in self.fake.actors["recorder"].records if isinstance(record, kind)]


def two(tiny: Callable[..., Plan], folder: Path, **changes: Any) -> Plan:
    settings: dict[str, Any] = {"resources": {"clients_per_process": 2}, "budget": {"rounds": 3}}
    return rundir.create(tiny([crowd("phone", folder, copies=2)], **(settings | changes)))
