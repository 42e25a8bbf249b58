"""A client of a pool: its life takes turns with that of the others, and what touches the model is one thread's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any, Protocol, TypeVar

from actors.above import PATIENCE_S, published
from actors.drivers import References, Walk, carried, follow, settled_in_time
from actors.leaf import GetReady, Leaf
from actors.shared import ARRIVAL_S, Address, end_process
from worldlm_ray.client.client import Client
from worldlm_ray.client.shared import VirtualClients
from worldlm_ray.errors import SupersededError
from worldlm_ray.plan.plan import Plan
from worldlm_ray.protocol.child import Send, Sleep, Stopped
from worldlm_ray.protocol.life import Await, Beside, CheckParent, Compute, Look, Save, TakeTurn, Train
from worldlm_ray.tensors.buffers import Flat

T = TypeVar("T")


class Pool(Protocol):
    """What a client shares with the others of its process."""

    plan: Plan
    recorder: Any
    clients: VirtualClients

    async def with_model(self, work: Callable[[], T]) -> T:
        """Have something done by the one thread that uses the model."""
        ...

    async def on_disk(self, work: Callable[[], T]) -> T:
        """Have something written, beside the model's thread."""
        ...

    async def prepare(self) -> None:
        """Cut the texts of all clients, once."""
        ...

    @property
    def ahead(self) -> asyncio.Semaphore:
        """Held from a pull until its round is trained."""
        ...

    def end_turn(self) -> None:
        """Let another client take its turn; from any thread."""
        ...

    async def heard(self, path: str) -> bool:
        """Wait for the next heartbeat to the parent; returns whether the parent is the one that this client joined."""
        ...


class PoolMember(Leaf):
    """One client of the process: takes the steps of its life on the event loop, and on the model's thread.

    Args:
        pool: that it lives in.
        address: the run and the client's path.
    """

    def __init__(self, pool: Pool, address: Address) -> None:
        super().__init__(pool.plan, address, pool.recorder)
        self.pool = pool
        self.is_living = self.is_staying = False
        self._waits: set[asyncio.Future[Any]] = set()
        """What it waits for: in vain, perhaps, once it is told to stop."""
        self._getting_up = asyncio.Lock()
        self._life_task: asyncio.Task[None] | None = None
        self._ended = asyncio.Event()
        self._outcome: str | Exception = ""

    # ---- what the launcher asks ----------------------------------------------------------------------------------

    async def ready(self) -> int:
        """Make the client, and continue from a checkpoint if there is one; returns local rounds done so far."""
        async with self._getting_up:
            if not self._is_set_up:
                await self.pool.prepare()
                await self.pool.with_model(self._set_up)
        return self.client.round

    @property
    def has_begun(self) -> bool:
        """Whether the client has begun to live."""
        return self._life_task is not None

    @property
    def has_left(self) -> bool:
        """Whether the client has left the run for good, which makes room for another one."""
        return self._outcome == "left"

    def start(self) -> None:
        """Begin to live, unless the client lives already."""
        if self._life_task is None:
            self._life_task = asyncio.get_running_loop().create_task(self._guard())

    async def outcome(self) -> str:
        """Wait for the end; raises whatever broke the client."""
        await self._ended.wait()
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome

    def stop(self) -> None:
        """End after the step that is under way; the rest of the round waits in the checkpoint."""
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
        """Leave the run for good after the round that is under way."""
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
        return self.pool.clients.make(self.spec.path)

    def _set_up(self) -> None:
        """On the model's thread."""
        super()._set_up()
        self.pool.clients.settle(self.client)

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
                await self.pool.with_model(partial(self._compute, walk))
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
            await self._wait(self.pool.ahead.acquire())
            return self._give_turn_back
        if isinstance(step, CheckParent):
            return await self._wait(self.pool.heard(self.spec.path))
        return await self._wait(settled_in_time(step))

    def _give_turn_back(self) -> None:
        """From the model's thread, too."""
        self.pool.end_turn()

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
        state = await self.pool.with_model(self._state)
        await self.pool.on_disk(partial(self._write, *state))
        return True

    def _state(self) -> tuple[dict[str, Any], dict[str, Flat]]:
        with self._lock:
            return self.client.state()

    def save_now(self) -> None:
        """The same without an event loop."""
        self._write(*self._state())
