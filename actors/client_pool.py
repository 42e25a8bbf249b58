"""Many clients in one process: each is a client of its own to its parent, and they take turns at one model.

Every client has its own name, seq, incarnation, outbox and checkpoints, and a task of its own that talks to the parent;
whatever touches the model is done by one thread, a client after the other. When the process dies, Ray starts it again,
and all of its clients go on from their checkpoints.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from actors.graceful_shutdown import GracefulShutdown
from actors.plans import StoredPlan, received
from actors.pool_member import PoolMember
from actors.shared import Address, begin, once_storage_answers, schedule_kills, was_restarted
from worldlm_ray.client.shared import VirtualClients
from worldlm_ray.errors import SupersededError
from worldlm_ray.plan import living, rundir
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.tree import parent_path
from worldlm_ray.records import Measure

AHEAD = 2
"""Clients that have pulled and have not trained yet, at most: a model that waits for its turn grows old."""

T = TypeVar("T")


class ClientPoolActor(GracefulShutdown):
    """Several clients below one parent.

    Clients come (`live`, or `admit` and `start`) and leave while the pool lives. One that has left makes room.

    Args:
        address: the run and the path of the first client.
        paths: of all that live here first.
        name: of this actor.
    """

    def __init__(self, address: Address, paths: Sequence[str], name: str = "") -> None:
        self.plan, self._address = address.plan_and_kept_files(), address
        self.clock = begin(self.plan, address.path, address.clock, address.namespace)
        self.recorder, self.loop = address.recorder, asyncio.get_running_loop()
        first = self.plan.node(address.path)
        if was_restarted():
            paths = once_storage_answers(partial(self._who_is_here, paths, name), address.path)
        resources = first.settings.resources
        limit_bytes = None if resources.memory_gb is None else int(resources.memory_gb * 1e9)
        specs = [self.plan.node(path) for path in paths]
        self.clients = VirtualClients(self.plan, specs or [first], limit_bytes=limit_bytes)
        self._model = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        parent = self.plan.node(parent_path(address.path) or "")
        # Where siblings wait for each other they pull together; elsewhere as many as will train next.
        ahead = resources.clients_per_process if parent.settings.aggregation.trigger == "synchronous" else AHEAD
        self._ahead = asyncio.Semaphore(ahead)
        self.members: dict[str, PoolMember] = {}
        self._prepared: asyncio.Task[None] | None = None
        self._heard: asyncio.Future[set[str]] = self.loop.create_future()
        """Paths of the clients that the next heartbeat finds to be lost to the parent."""
        self._beating = self.loop.create_task(self._beat())
        for path in paths:
            self._add(path)
            if was_restarted() or address.begin:
                self.members[path].start()

    def _who_is_here(self, paths: Sequence[str], name: str) -> list[str]:
        """Paths of the clients that lived here when the process died: some have come or left since it was made."""
        self.plan = rundir.renewed(self.plan)
        place = living.recall(self.plan.run_dir)
        if place is not None and place["namespace"] == self._address.namespace:
            paths = place["pools"].get(name, paths)
        return [path for path in paths if path in self.plan.specs]

    def _add(self, path: str) -> None:
        self.members[path] = PoolMember(self, replace(self._address, path=path))
        schedule_kills(self.plan.faults, path, self.clock)

    # ---- called by the launcher: what a client's actor has, by the path of the client ----------------------------

    async def ready(self, path: str) -> int:
        """Continue from a checkpoint if there is one; returns local rounds done so far."""
        return await self.members[path].ready()

    async def admit(self, path: str, sent: Plan | StoredPlan) -> int:
        """Take a client in, unless it lives here; returns the id of this process.

        Args:
            path: of the client.
            sent: a plan of the run that has it.
        """
        if self._is_here(path):
            return os.getpid()
        plan = self.plan if path in self.plan.specs else await self.on_disk(partial(received, sent))
        if not self._is_here(path):  # another call may have been faster
            self.plan = plan
            self.clients.add(plan, plan.node(path))
            self.members = {path: member for path, member in self.members.items() if not member.has_left}
            self._add(path)
        return os.getpid()

    def _is_here(self, path: str) -> bool:
        return path in self.members and not self.members[path].has_left

    async def live(self, path: str, sent: Plan | StoredPlan) -> str:
        """Take a client in, have it begin to live, and wait for its end, as `outcome` does."""
        await self.admit(path, sent)
        await self.start(path)
        return await self.outcome(path)

    async def dismiss(self, path: str) -> None:
        """Forget a client that was taken in and has not begun to live."""
        if path in self.members and not self.members[path].has_begun:
            del self.members[path], self.clients.specs[path]

    async def process(self, path: str = "") -> int:
        """Id of this process."""
        return os.getpid()

    async def start(self, path: str) -> None:
        """Begin to live, unless the client lives already."""
        self.members[path].start()

    async def outcome(self, path: str) -> str:
        """Wait for a client's end: `finished`, `stopped` or `left`.

        Raises:
            Exception: whatever broke the client.
        """
        member = self.members.get(path)
        return "left" if member is None else await member.outcome()  # only one that has left makes room

    async def stop(self, path: str) -> None:
        """End after the round that is under way."""
        if path in self.members:  # not one that has left
            self.members[path].stop()

    async def leave(self, path: str) -> None:
        """Leave the run for good after the round that is under way."""
        self.members[path].leave()

    async def measure(self, path: str, refs: list[Any] | None = None) -> Measure | None:
        """Held-out quality of a client's model, or of the model behind a reference (in a list), unless private."""
        await self.members[path].ready()
        parameters = await refs[0] if refs else None
        client, tokens = self.members[path].client, self.plan.config.evaluation.final_tokens
        return await self.with_model(partial(client.report, tokens, parameters=parameters))

    async def sample(self, path: str, prompt: str = "", tokens: int = 80) -> str:
        """Text from a client's model."""
        await self.members[path].ready()
        return await self.with_model(partial(self.members[path].client.sample, prompt=prompt, tokens=tokens))

    # ---- what members share --------------------------------------------------------------------------------------

    async def with_model(self, work: Callable[[], T]) -> T:
        """Have something done by the one thread that uses the model."""
        return await asyncio.get_running_loop().run_in_executor(self._model, work)

    async def on_disk(self, work: Callable[[], T]) -> T:
        """Have something written, beside the model's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._disk, work)

    async def prepare(self) -> None:
        """Cut the texts of all clients, once."""
        if self._prepared is None:
            self._prepared = asyncio.get_running_loop().create_task(self.with_model(self.clients.prepare))
        await asyncio.shield(self._prepared)

    @property
    def ahead(self) -> asyncio.Semaphore:
        """Held from a pull until its round is trained."""
        return self._ahead

    def end_turn(self) -> None:
        """Let another client take its turn; from any thread."""
        assert self.loop is not None
        self.loop.call_soon_threadsafe(self._ahead.release)

    async def heard(self, path: str) -> bool:
        """Wait for the next heartbeat to the parent; returns whether the parent is the one that this client joined."""
        return path not in await asyncio.shield(self._heard)

    async def _beat(self) -> None:
        """Heartbeats to the parent, for all clients together."""
        while True:
            await asyncio.sleep(self.plan.config.liveness.heartbeat_s)
            members = {member.spec.name: member for member in self.members.values()}
            sent = {name: send for name, member in members.items() if (send := member.heartbeat()) is not None}
            lost = list(sent)
            if sent:
                parent = next(members[name].link.parent for name in sent)
                with suppress(Exception):  # whatever it is: a member that waits finds out by its next call
                    lost = await parent.heartbeats.remote([send.arguments for send in sent.values()])
            heard, self._heard = self._heard, asyncio.get_running_loop().create_future()
            heard.set_result({members[name].spec.path for name in lost if name in members})

    def shut_down(self) -> None:
        """See GracefulShutdown. The event loop turns no more meanwhile: write from here."""
        living = [member for member in self.members.values() if member.is_living]
        for member in living:
            member.stop()
        self._model.shutdown(wait=True, cancel_futures=True)
        self._disk.shutdown(wait=True, cancel_futures=True)
        for member in living:
            with suppress(SupersededError):
                member.save_now()
