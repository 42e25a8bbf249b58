"""Many clients in one process: each is a client of its own to its parent, and they take turns at one model.

Every client has its own name, seq, incarnation, outbox and checkpoints, and a task of its own that talks to the parent;
whatever touches the model is done by one thread, a client after the other. When the process dies, Ray starts it again,
and all of its clients go on from their checkpoints.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from actors.above import PATIENCE_S, published
from actors.drivers import References, Walk, carried, follow, settled_in_time
from actors.graceful_shutdown import GracefulShutdown
from actors.leaf import GetReady, Leaf
from actors.shared import (
    ARRIVAL_S,
    Address,
    end_process,
    once_storage_answers,
    schedule_kills,
    settle,
    was_restarted,
)
from worldlm_ray.client.client import Client
from worldlm_ray.client.shared import VirtualClients
from worldlm_ray.errors import SupersededError
from worldlm_ray.plan import rundir
from worldlm_ray.protocol.child import Send, Sleep, Stopped
from worldlm_ray.protocol.life import Await, Beside, CheckParent, Compute, Look, Save, TakeTurn, Train
from worldlm_ray.records import Measure
from worldlm_ray.tensors.buffers import Flat

AHEAD = 2
"""Clients that have pulled and have not trained yet, at most: a model that waits for its turn grows old."""

T = TypeVar("T")


class ClientPoolActor(GracefulShutdown):
    """Several clients below one parent.

    Args:
        address: the run and the path of the first client.
        paths: of all of them.
    """

    def __init__(self, address: Address, paths: Sequence[str]) -> None:
        self.plan = address.plan_and_kept_files()
        self.clock = settle(address.clock, address.namespace, address.path, self.plan.run_dir)
        self.recorder, self.loop = address.recorder, asyncio.get_running_loop()
        specs = [self.plan.node(path) for path in paths]
        memory_gb = specs[0].settings.resources.memory_gb
        limit_bytes = None if memory_gb is None else int(memory_gb * 1e9)
        self.clients = VirtualClients(self.plan, specs, limit_bytes=limit_bytes)
        self._model = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        parent = self.plan.node(address.path.rpartition("/")[0])
        # Where siblings wait for each other they pull together; elsewhere as many as will train next.
        ahead = len(paths) if parent.settings.aggregation.trigger == "synchronous" else AHEAD
        self._ahead = asyncio.Semaphore(ahead)
        self.members = {spec.path: _Member(self, replace(address, path=spec.path)) for spec in specs}
        self._prepared: asyncio.Task[None] | None = None
        self._heard: asyncio.Future[set[str]] = self.loop.create_future()
        """Paths of the clients that the next heartbeat finds to be lost to the parent."""
        self._beating = self.loop.create_task(self._beat())
        for path in paths:
            schedule_kills(self.plan.faults, path, self.clock)
        if was_restarted():
            read = partial(rundir.renewed, self.plan)
            now = once_storage_answers(read, address.path)  # some may have left since
            for member in self.members.values():
                if member.spec.path in now.specs:
                    member.start()

    # ---- called by the launcher: what a client's actor has, by the path of the client ----------------------------

    async def ready(self, path: str) -> int:
        """Continue from a checkpoint if there is one; returns local rounds done so far."""
        return await self.members[path].ready()

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
        return await self.members[path].outcome()

    async def stop(self, path: str) -> None:
        """End after the round that is under way."""
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


class _Member(Leaf):
    """One client of the process: takes the steps of its life on the event loop, and on the model's thread."""

    def __init__(self, host: ClientPoolActor, address: Address) -> None:
        super().__init__(host.plan, address, host.recorder)
        self.host = host
        self.is_living = self.is_staying = False
        self._waits: set[asyncio.Future[Any]] = set()
        """What it waits for: in vain, perhaps, once it is told to stop."""
        self._getting_up = asyncio.Lock()
        self._life_task: asyncio.Task[None] | None = None
        self._ended = asyncio.Event()
        self._outcome: str | Exception = ""

    # ---- what the launcher asks ----------------------------------------------------------------------------------

    async def ready(self) -> int:
        async with self._getting_up:
            if not self._is_set_up:
                await self.host.prepare()
                await self.host.with_model(self._set_up)
        return self.client.round

    def start(self) -> None:
        if self._life_task is None:
            self._life_task = asyncio.get_running_loop().create_task(self._guard())

    async def outcome(self) -> str:
        await self._ended.wait()
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome

    def stop(self) -> None:
        if self._is_stopping:
            return
        self._is_stopping = True
        if not self._is_delivering:
            self._give_up_waits()
        # The work that is done deserves to arrive, but not for ever.
        asyncio.get_running_loop().call_later(ARRIVAL_S, self._give_up_waits)

    def _give_up_waits(self) -> None:
        for answer in self._waits:
            answer.cancel()

    def leave(self) -> None:
        self._is_leaving = True

    @property
    def _is_delivering(self) -> bool:
        return self._is_set_up and self.life.delivers_since_s is not None

    def heartbeat(self) -> Send | None:
        """The client's heartbeat; None while no parent would hear it."""
        if not (self.is_living or self.is_staying) or self.link.parent is None:
            return None
        return self.uplink.heartbeat()

    # ---- life ------------------------------------------------------------------------------------------------------

    def _make_client(self) -> Client:
        return self.host.clients.make(self.spec.path)

    def _set_up(self) -> None:
        """On the model's thread."""
        super()._set_up()
        self.host.clients.settle(self.client)

    async def _guard(self) -> None:
        try:
            await self._take(self._get_ready())
            self.is_living = True
            self._outcome = await self._take(carried(self.life.run(), self.link))
            self.is_living, self.is_staying = False, self._outcome == "finished"
            self._ended.set()
            if self.is_staying:
                with suppress(Stopped):
                    await self._take(carried(self.life.stay(), self.link))
        except SupersededError as error:
            end_process(str(error))
        except Exception as error:  # noqa: BLE001 - a boundary: the launcher raises it from `outcome`
            self._outcome = error
        self.is_living = self.is_staying = False
        self._ended.set()

    async def _take(self, steps: References[T]) -> T:
        """Take steps of the client's life. Those that touch the model are taken on its thread, one after the other."""
        walk = Walk(steps, self._lock)
        while not walk.has_ended:
            if isinstance(walk.step, Compute | Train):
                await self.host.with_model(partial(self._compute, walk))
                continue
            try:
                answer = await self._perform(walk.step)
            except Exception as error:  # noqa: BLE001 - whatever it is, the steps know what to do
                walk.go_on(error=error)
            else:
                walk.go_on(answer)
        return walk.result  # type: ignore[return-value]

    def _compute(self, walk: Walk) -> None:
        while not walk.has_ended and isinstance(walk.step, Compute | Train):
            walk.perform(lambda step: step.work() if isinstance(step, Compute) else self._train(step))

    def _train(self, step: Train) -> float:
        return self.life.train(lambda: self._is_stopping or (step.until is not None and step.until.done()))

    async def _perform(self, step: Any) -> Any:
        if isinstance(step, Sleep):
            return await self._wait(asyncio.sleep(step.seconds))
        if isinstance(step, GetReady):
            return await self.ready()
        if isinstance(step, Beside):
            return asyncio.get_running_loop().create_task(self._take(carried(step.steps, self.link)))
        if isinstance(step, Await):
            return await step.handle
        if isinstance(step, Save):
            return await self._save()
        if isinstance(step, Look):
            return await self._look(step.path), 0.0  # others train meanwhile
        if isinstance(step, TakeTurn):
            await self._wait(self.host.ahead.acquire())
            return self._give_turn_back
        if isinstance(step, CheckParent):
            return await self._wait(self.host.heard(self.spec.path))
        return await self._wait(settled_in_time(step))

    def _give_turn_back(self) -> None:
        """From the model's thread, too."""
        self.host.end_turn()

    async def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for the parent or for the others.

        Raises:
            Stopped: the client is told to stop.
        """
        if self._is_stopping and not self._is_delivering:
            work.close()
            raise Stopped
        answer = asyncio.ensure_future(work)
        self._waits.add(answer)
        try:
            await asyncio.wait({answer})
            if answer.cancelled():
                raise Stopped
            return answer.result()
        finally:
            self._waits.discard(answer)
            answer.cancel()

    async def _look(self, path: str) -> tuple[int, Flat] | None:
        with suppress(TimeoutError):
            return await self._wait(asyncio.wait_for(follow(published(self._address, path)), PATIENCE_S))
        return None

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    async def _save(self) -> bool:
        """Write a checkpoint, or go on without. The client does nothing else meanwhile; others do."""
        state = await self.host.with_model(self._state)
        await self.host.on_disk(partial(self._write, *state))
        return True

    def _state(self) -> tuple[dict[str, Any], dict[str, Flat]]:
        with self._lock:
            return self.client.state()

    def save_now(self) -> None:
        """The same without an event loop."""
        self._write(*self._state())
