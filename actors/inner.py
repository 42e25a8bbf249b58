"""An inner node as an actor: calls become events of the state machine, commands become answers.

The actor is asynchronous and single-threaded: between two `await`s nothing else runs, so the state machine needs no
lock. The order of one exchange, for concurrency's sake:

    1. a child's `push` awaits the buffer, then folds it in one go and answers
    2. its `pull` leaves a future; the machine's Serve command, at once or after a later event, resolves it
    3. the model is put into the object store once; the second and later children get the same reference, and the
       machine then works on the shared copy instead of a private one

Checkpoints are written by a thread beside (actors/node_checkpoints.py). What a child may forget it is told when the
checkpoint is on disk.

Ray starts the actor again when its process dies. It then claims a new incarnation, goes back to its last checkpoint and
begins by itself; its children notice, join again, and send what the checkpoint does not know.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from functools import partial
from typing import Any

import ray

from actors.graceful_shutdown import GracefulShutdown
from actors.node_checkpoints import NodeCheckpoints
from actors.node_records import NodeRecords
from actors.shared import (
    Address,
    Carried,
    begin,
    end_process,
    once_storage_answers,
    schedule_kills,
    was_restarted,
)
from worldlm_ray.aggregation.children import Status
from worldlm_ray.aggregation.events import (
    Admit,
    Answer,
    Charge,
    Clock,
    Command,
    Done,
    Event,
    Exchange,
    Finish,
    Heartbeat,
    Joined,
    Left,
    Note,
    Pull,
    Push,
    Refresh,
    Save,
    Serve,
    Shared,
    Started,
    Wake,
)
from worldlm_ray.errors import CheckpointError, MessageError, SupersededError, WorldLMError
from worldlm_ray.exchange.limits import checked
from worldlm_ray.exchange.messages import Packed, pack
from worldlm_ray.exchange.quota import Quota
from worldlm_ray.exchange.replies import Verdict, Welcome
from worldlm_ray.plan import build, rundir
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.quotas import quota
from worldlm_ray.records import Record
from worldlm_ray.storage import checkpoint
from worldlm_ray.storage.checkpoint import STORAGE_AGAIN_S
from worldlm_ray.tensors.buffers import Flat


class InnerActor(GracefulShutdown):
    """What a federation and the world have in common.

    Args:
        address: the run and the node's path.
    """

    def __init__(self, address: Address) -> None:
        self.plan = address.plan
        self.spec = self.plan.node(address.path)
        self.clock = begin(self.plan, address.path, address.clock, address.namespace)
        self.contributions = build.contributions(self.plan, self.spec)
        initial = once_storage_answers(partial(build.initial, self.plan), address.path)
        self.node = build.inner_node(self.plan, self.spec, initial, self.contributions)
        self.faults = self.plan.faults
        self._place = checkpoint.folder(self.plan.run_dir, self.spec.path)
        self.records = NodeRecords(self.spec.path, self.node, self.clock, address.recorder, self.plan.run_dir)
        self._pulls: dict[str, asyncio.Future[Carried]] = {}
        self._published: tuple[Flat, Any] | None = None
        self._checkpoints = NodeCheckpoints(
            self.plan, self.spec.path, self.node, self.clock, self.records, spawn=self._spawn
        )
        self._due: list[Command] = []
        """What is to be done when the node starts."""
        self._is_up = False
        self._started = asyncio.Event()
        self._ended = asyncio.Event()
        self._error: Exception | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        schedule_kills(self.faults, self.spec.path, self.clock)
        if was_restarted():
            self._spawn(self._begin_again())

    # ---- called by children ----------------------------------------------------------------------------------

    async def join(self, child: str, incarnation: int, seq: int, admission: int = 1) -> Welcome:
        """A child is here; returns what it must know. A border says how often it has let the child in."""
        await self._started.wait()
        found = await self._quota(checked("child", child, str))
        now_s = self.clock.now_s()
        event = Joined(child=child, incarnation=incarnation, seq=seq, quota=found, admission=admission, now_s=now_s)
        commands = await self._handle(event)
        [welcome] = [command.welcome for command in commands if isinstance(command, Admit)]
        return welcome

    async def _quota(self, child: str) -> Quota | None:
        """What a child may claim that has come since this node's plan was made; None where the node knows."""
        if child in self.node.children.quotas:
            return None
        read = partial(_quota_of, self.plan, self.spec.path, child)
        return await asyncio.get_running_loop().run_in_executor(None, read)

    async def push(self, sender: str, incarnation: int, to: int, header: bytes, refs: list[Any]) -> Verdict:
        """Take an update. The buffer is mapped from the object store and folded without a copy."""
        values = await refs[0]
        await self._started.wait()
        packed, now_s = Packed(header, values), self.clock.now_s()
        commands = await self._handle(Push(sender=sender, packed=packed, incarnation=incarnation, to=to, now_s=now_s))
        [verdict] = [command.verdict for command in commands if isinstance(command, Answer)]
        self._checkpoints.save_if_due()
        return verdict

    async def pull(self, child: str, incarnation: int, to: int, started_tokens: int) -> Carried:
        """Give the model to a child, as soon as the child may go on."""
        await self._started.wait()
        if checked("child", child, str) not in self.node.children:
            raise MessageError("unknown_sender", f"{self.spec.path} has no child {child!r}")
        # Who asks again waits with those who asked before; who is refused leaves the place to the next.
        future = self._pulls.setdefault(child, asyncio.get_running_loop().create_future())
        now_s = self.clock.now_s()
        await self._handle(
            Pull(child=child, incarnation=incarnation, to=to, started_tokens=started_tokens, now_s=now_s)
        )
        return await asyncio.shield(future)

    async def done(self, child: str, incarnation: int, to: int) -> None:
        """A child will train no more."""
        await self._started.wait()
        await self._handle(Done(child=child, incarnation=incarnation, to=to, now_s=self.clock.now_s()))

    async def left(self, child: str, incarnation: int, to: int) -> bool:
        """A child leaves the run; returns whether it may end, since a checkpoint knows of all that it has said."""
        await self._started.wait()
        await self._handle(Left(child=child, incarnation=incarnation, to=to, now_s=self.clock.now_s()))
        if child not in self.node.children:
            raise MessageError("unknown_sender", f"{self.spec.path} has no child {child!r}")
        return self.node.children[child].left_durable

    async def heartbeat(self, child: str, incarnation: int, to: int) -> None:
        """A child lives."""
        await self._started.wait()
        await self._handle(Heartbeat(child=child, incarnation=incarnation, to=to, now_s=self.clock.now_s()))

    async def heartbeats(self, sent: list[tuple[str, int, int]]) -> list[str]:
        """Children of one process live; returns the names of those that must join (again)."""
        await self._started.wait()
        lost = []
        for child, incarnation, to in checked("sent", sent, list, longest=len(self.node.children)):
            try:
                await self._handle(Heartbeat(child=child, incarnation=incarnation, to=to, now_s=self.clock.now_s()))
            except MessageError:  # a superseded child learns of it when it joins
                lost.append(child)
        return lost

    async def published(self) -> tuple[int, list[Any]]:
        """For a client anywhere below that measures this node: the version, and a reference to its model in a list."""
        await self._started.wait()
        return self.node.version, [self._publish()]

    # ---- called by the launcher ------------------------------------------------------------------------------

    async def ready(self) -> int:
        """Continue from a checkpoint if there is one; returns the version that this node starts from."""
        if not self._is_up:
            self._set_up()
        return self.node.version

    async def start(self) -> None:
        """Begin: send again what was on its way when the last run of this node ended."""
        if self._started.is_set():
            return
        await self.ready()
        self._publish()
        self.loop = asyncio.get_running_loop()
        self._started.set()
        self._perform(self._due)
        self._spawn(self._live())
        self._spawn(self._tick())

    async def process(self) -> int:
        """Id of this process."""
        return os.getpid()

    async def run_time_s(self) -> float:
        """Run time now, for a process on another machine."""
        return self.clock.now_s()

    async def give_up(self, child: str) -> None:
        """There is no room for a client that has never been there."""
        if self.node.children[child].status is Status.EXPECTED:
            await self._handle(Done(child=child, to=self.node.incarnation, now_s=self.clock.now_s()))

    async def give_up_absent(self, child: str) -> None:
        """A member that has never come is not waited for, once no other child trains."""
        if self.node.children.joined and not self.node.children.any_active:
            await self.give_up(child)

    async def has_yet_to_end(self, child: str) -> bool:
        """Whether a child has been there, and has not said that it trains no more."""
        return self.node.children[child].status in (Status.ACTIVE, Status.SUSPECTED)

    async def ended(self) -> None:
        """Return when everything below has ended and has been passed on.

        Raises:
            Exception: whatever broke the node's exchange with its parent.
        """
        await self._ended.wait()
        if self._error is not None:
            raise self._error

    async def parameters(self) -> list[Any]:
        """A reference to the published model, in a list."""
        return [self._publish()]

    async def save(self) -> int:
        """Write a checkpoint now; returns the version in it."""
        await self._checkpoints.save()
        return self.node.version

    # ---- life --------------------------------------------------------------------------------------------------

    def _set_up(self) -> None:
        incarnation = checkpoint.claim(self._place)
        found = checkpoint.load(self._place, warn=self.records.warn)
        if found is not None:
            self.node.restore(*found)
        self._due = self.node.handle(Started(incarnation=incarnation))
        if incarnation > 1:
            self.records.audit.restored(
                now_s=self.clock.now_s(), incarnation=incarnation, last_seq=self.node.covers().seqs
            )
        self._is_up = True
        self.records.tell("continued" if found else "started")

    async def _begin_again(self) -> None:
        """After a death: wait for the storage if need be, then go on."""
        while not self._is_up:
            try:
                self._set_up()
            except CheckpointError as error:
                self.records.warn(f"cannot go on yet: {error}")
                await asyncio.sleep(STORAGE_AGAIN_S)
        await self.start()

    async def _live(self) -> None:
        """What a node does beside answering its children: nothing, at the world."""

    async def _tick(self) -> None:
        """Now and then look at the clock, and whether this process still is the one that counts."""
        while True:
            await asyncio.sleep(self.plan.config.liveness.heartbeat_s)
            self._beat()
            self._checkpoints.check_newest()
            self.records.audit.flush()
            await self._handle(Clock(now_s=self.clock.now_s()))

    def _beat(self) -> None:
        """A heartbeat to the parent, where there is one and it would hear nothing otherwise."""

    def shut_down(self) -> None:
        """See GracefulShutdown. The event loop turns no more meanwhile, but a checkpoint may be on its way."""
        if self._started.is_set():
            self._checkpoints.save_last()

    # ---- the machine -----------------------------------------------------------------------------------------

    async def _handle(self, event: Event) -> list[Command]:
        await self._checkpoints.steady()
        with self.records.busy():
            commands = self.node.handle(event)
        if not self.node.ended:
            self._ended.clear()  # a child has come back
        self._perform(commands)
        return commands

    def _perform(self, commands: list[Command]) -> None:
        records: list[Record] = []
        for command in commands:
            if isinstance(command, Note):
                records.append(self.records.noted(command.record))
            elif isinstance(command, Charge):
                self._charge(command.child)
            elif isinstance(command, Serve):
                future = self._pulls.pop(command.child, None)
                if future is not None and not future.done():
                    header = pack(command.model, self.plan.layout).header
                    future.set_result((header, [self._publish()]))
            elif isinstance(command, Save):
                if self._checkpoints.is_idle:
                    self._checkpoints.save()  # else it is asked for again if the one under way does not do
            elif isinstance(command, Exchange):
                self._publish()
                self._exchange()
            elif isinstance(command, Refresh):
                self._ask_for_news()
            elif isinstance(command, Wake):
                self._spawn(self._wake(command.at_s))
            elif isinstance(command, Finish):
                self._finish()
        self.records.send(records)

    def _charge(self, child: str) -> None:
        """Blocks: nothing that the update has touched may be published before this is on disk."""
        assert self.contributions is not None
        try:
            self.contributions.charge(child)
        except Exception as error:  # noqa: BLE001 - whatever it is, the update that is not paid for is in memory
            end_process(f"{self.spec.path}: {error}; starting again without the update")

    def _exchange(self) -> None:
        raise NotImplementedError(f"{self.spec.path} has no parent")

    def _ask_for_news(self) -> None:
        raise NotImplementedError(f"{self.spec.path} has no parent")

    def _finish(self) -> None:
        self.records.audit.flush()
        self.records.tell("finished")
        self._ended.set()

    async def _wake(self, at_s: float) -> None:
        await asyncio.sleep(max(at_s - self.clock.now_s(), 0.0))
        await self._handle(Clock(now_s=max(at_s, self.clock.now_s())))

    def _publish(self) -> Any:
        """The one object-store reference of the published model."""
        if self._published is None or self._published[0] is not self.node.theta:
            self._published = None  # an old version goes before the new one comes, unless a child still reads it
            values = self.node.theta
            ref = ray.put(values)
            # Blocking is right here: the object is on this machine already, and no event may come in between.
            self.node.handle(Shared(own=values, copy=ray.get(ref)))
            self._published = (self.node.theta, ref)
        return self._published[1]

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(self._guard(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _guard(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except SupersededError as error:
            end_process(str(error))
        except Exception as error:  # noqa: BLE001 - a boundary: the launcher raises it from `ended`
            self._error = error
            self._ended.set()


def _quota_of(plan: Plan, path: str, child: str) -> Quota:
    """What a child may claim: the run's folder says it.

    Raises:
        MessageError: the run has no such child.
    """
    try:
        renewed = rundir.renewed(plan)
    except WorldLMError as error:
        raise MessageError("unknown_sender", f"{child}: the run's folder cannot be read ({error})") from error
    spec = renewed.specs.get(f"{path}/{child}")
    if spec is None:
        raise MessageError("unknown_sender", f"{path} has no child {child!r}")
    return quota(spec, renewed.round_tokens, renewed.config.budget)
