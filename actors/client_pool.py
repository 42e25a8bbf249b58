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
from actors.drivers import carried, settled_in_time
from actors.drivers import follow as follow_references
from actors.graceful_shutdown import GracefulShutdown
from actors.leaf import Leaf
from actors.shared import (
    ARRIVAL_S,
    STORAGE_AGAIN_S,
    Address,
    end_process,
    once_storage_answers,
    schedule_kills,
    settle,
    was_restarted,
)
from worldlm_ray.client.client import Client
from worldlm_ray.client.shared import VirtualClients
from worldlm_ray.errors import CheckpointError, SupersededError
from worldlm_ray.exchange.messages import Model, Update
from worldlm_ray.plan import rundir
from worldlm_ray.protocol.child import Send, Steps
from worldlm_ray.records import Measure

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
        self._beating: asyncio.Task[None] | None = None
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
        self.members[path].leaving = True

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

    def beat(self) -> None:
        """Begin to give signs of life, for all clients together."""
        if self._beating is None:
            self._beating = asyncio.get_running_loop().create_task(self._beat())

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self.plan.config.liveness.heartbeat_s)
            members = {member.spec.name: member for member in self.members.values()}
            sent = {name: send for name, member in members.items() if (send := member.heartbeat()) is not None}
            if not sent:
                continue
            parent = next(members[name].link.parent for name in sent)
            try:
                lost: list[str] = await parent.heartbeats.remote([send.arguments for send in sent.values()])
            except Exception:  # noqa: BLE001 - whatever it is: a member that waits finds out by its next call
                lost = list(sent)
            for name in lost:
                members[name].join_again()

    def shut_down(self) -> None:
        """See GracefulShutdown. The event loop turns no more meanwhile: write from here."""
        living = [member for member in self.members.values() if member.is_living]
        for member in living:
            member.stopping = True
        self._model.shutdown(wait=True, cancel_futures=True)
        self._disk.shutdown(wait=True, cancel_futures=True)
        for member in living:
            with suppress(SupersededError):
                member.save_now()


class _Member(Leaf):
    """One client of the process, and its life."""

    def __init__(self, host: ClientPoolActor, address: Address) -> None:
        super().__init__(host.plan, address, host.recorder)
        self.host = host
        self.stopping = self.leaving = self.is_living = self.is_staying = False
        self._may_cancel = self._pushing = False
        """Whether it waits for its parent: in vain, perhaps, once it is told to stop."""
        self._getting_up = asyncio.Lock()
        self._life_task: asyncio.Task[None] | None = None
        self._again: asyncio.Task[None] | None = None
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
        if self.stopping:
            return
        self.stopping = True
        if not self._pushing:
            self._cancel()
        # The work that is done deserves to arrive, but not for ever.
        asyncio.get_running_loop().call_later(ARRIVAL_S, self._cancel)

    def _cancel(self) -> None:
        if self._life_task is not None and (self._may_cancel or self._pushing):
            self._life_task.cancel()

    def heartbeat(self) -> Send | None:
        """The client's sign of life; None while no parent would hear it."""
        if not (self.is_living or self.is_staying) or self.link.parent is None:
            return None
        return self.uplink.heartbeat()

    def join_again(self) -> None:
        """At its end a client stays with its parent: one that died must hear again what it has forgotten."""
        if self.is_staying and (self._again is None or self._again.done()):
            self._again = asyncio.get_running_loop().create_task(self._join_again())

    async def _join_again(self) -> None:
        try:
            await self._follow(self.uplink.join())
            await self._follow(self.uplink.done())
        except SupersededError as error:
            end_process(str(error))

    # ---- life ------------------------------------------------------------------------------------------------------

    def _make_client(self) -> Client:
        return self.host.clients.make(self.spec.path)

    def _set_up(self) -> None:
        """On the model's thread."""
        super()._set_up()
        self.host.clients.settle(self.client)

    async def _guard(self) -> None:
        try:
            await self._begin_again()
            self._outcome = await self._live()
        except SupersededError as error:
            end_process(str(error))
        except Exception as error:  # noqa: BLE001 - a boundary: the launcher raises it from `outcome`
            self._outcome = error
        self.is_living = False
        self._ended.set()

    async def _begin_again(self) -> None:
        """Get ready; after a death, wait for the storage if need be."""
        while True:
            try:
                await self.ready()
                return
            except CheckpointError as error:
                if not was_restarted():
                    raise
                self._warn(f"cannot go on yet: {error}")
                await asyncio.sleep(STORAGE_AGAIN_S)
                if self.stopping:
                    raise

    async def _live(self) -> str:
        client, clock = self.client, self.clock
        try:
            await self._wait(self._follow(self.uplink.join()))
            self._tell(client.progress_record(now_s=clock.now_s()))
            if client.steps == 0:
                self._say_left_out()
                self._tell(await self.host.with_model(partial(client.start_record, now_s=clock.now_s())))
            self._began_s = self._saved_s = clock.now_s()
            self._tell(self._life("training"))
            self.is_living = True
            self.host.beat()
            while not self.stopping:
                if not client.began and self.leaving:
                    return await self._say_goodbye()
                if not client.began and client.is_done:
                    return await self._finish()
                update = await self._round()
                if update is None and not client.began:
                    return await self._finish()
                if update is not None:
                    await self._push(update)
                    await self._look_above()
                    await self._save_if_due()
        except asyncio.CancelledError:
            if not self.stopping:
                raise
        await self._save()
        self._tell(self._life("stopped"))
        return "stopped"

    async def _round(self) -> Update | None:
        """Pull and train; None if there is nothing to train any more, or the round was left unfinished."""
        await self._wait(self.host.ahead.acquire())
        try:
            model = None
            if not self.client.began:
                model = await self._wait(self._follow(self.uplink.pull()))
                if model is not None and model.finished:
                    return None
            return await self.host.with_model(partial(self._train, model))
        finally:
            self.host.ahead.release()

    def _train(self, model: Model | None) -> Update | None:
        """On the model's thread: begin a round, or go on with the one that was begun."""
        client = self.client
        if not client.began:
            self._tell(*client.begin(model, now_s=self.clock.now_s()))
        if not client.began:
            return None
        train_s = self._train_stretch(lambda: self.stopping)
        if client.step < client.training.local_steps:
            return None
        self._end_round(train_s)
        return client.update()

    async def _push(self, update: Update) -> None:
        shared = self.link.share(update)
        self.client.use_shared_copy(update.values, shared)
        self._pushing = True
        try:
            await self._follow(self.uplink.push(replace(update, values=shared)))
        finally:
            self._pushing = False

    async def _look_above(self) -> None:
        """Measure a node above, when that is due. While its model is on its way, others train."""
        path = self._due_above()
        if path is None or self.stopping:
            return
        found = None
        with suppress(TimeoutError):
            found = await self._wait(asyncio.wait_for(follow_references(published(self._address, path)), PATIENCE_S))
        await self.host.with_model(partial(self._measure_above, path, found))

    async def _finish(self) -> str:
        await self._save()
        await self._wait(self._follow(self.uplink.done()))
        finished = self._life("finished", self.client.last_word)
        self._tell(self.client.progress_record(now_s=self.clock.now_s()), finished)
        self.is_staying = True
        return "finished"

    async def _say_goodbye(self) -> str:
        await self._save()
        await self._wait(self._follow(self.uplink.left()))
        self._tell(self._life("left"))
        return "left"

    async def _follow(self, steps: Steps[T]) -> T:
        return await follow_references(carried(steps, self.link), wait=settled_in_time)

    async def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for the parent, unless told to stop."""
        self._may_cancel = True
        try:
            return await work
        finally:
            self._may_cancel = False

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    async def _save_if_due(self) -> None:
        if self.clock.now_s() - self._saved_s >= self.plan.config.checkpoint.every_s:
            await self._save()

    async def _save(self) -> None:
        """Write a checkpoint, or go on without. The client does nothing else meanwhile; others do."""
        self._saved_s = self.clock.now_s()
        state = await self.host.with_model(self.client.state)
        await self.host.on_disk(partial(self._write, *state))

    def save_now(self) -> None:
        """The same without an event loop."""
        self._write(*self.client.state())
