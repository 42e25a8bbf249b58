"""An inner node as an actor: calls become events of the state machine, commands become answers.

The actor is asynchronous and single-threaded: between two `await`s nothing else runs, so the state machine needs no
lock. The order of one exchange, for concurrency's sake:

    1. a child's `push` awaits the buffer, then folds it in one go and answers
    2. its `pull` leaves a future; the machine's Serve command, at once or after a later event, resolves it
    3. the model is put into the object store once; the second and later children get the same reference, and the
       machine then works on the shared copy instead of its own
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

import ray

from actors.shared import Address, Carried
from worldlm_ray import checkpoint
from worldlm_ray.aggregation.events import (
    Answer,
    Charge,
    Clock,
    Command,
    Done,
    Event,
    Exchange,
    Finish,
    Joined,
    Note,
    Pull,
    Push,
    Serve,
    Verdict,
    Wake,
)
from worldlm_ray.messages import Packed, pack
from worldlm_ray.params import Flat
from worldlm_ray.plan import plan_from_mapping
from worldlm_ray.records import AggregationRecord, LifeRecord, Record


class InnerActor:
    """What a federation and the world have in common.

    Args:
        address: the run and the node's path.
    """

    def __init__(self, address: Address) -> None:
        self.plan = plan_from_mapping(address.mapping)
        self.spec = self.plan.node(address.path)
        self.clock, self.recorder = address.clock, address.recorder
        self.contributions = self.plan.contributions(self.spec)
        self.node = self.plan.inner_node(self.spec, self.plan.initial(), self.contributions)
        self._place = checkpoint.folder(self.plan.run_dir, self.spec.path)
        self._began_s = self._saved_s = self.clock.now_s()
        self._busy_s = 0.0
        self._verdicts: dict[str, Verdict] = {}
        self._pulls: dict[str, asyncio.Future[Carried]] = {}
        self._published: tuple[Flat, Any] | None = None
        self._ended = asyncio.Event()
        self._error: Exception | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        found = checkpoint.load(self._place, warn=lambda text: self._tell("warning", text))
        if found is not None:
            self.node.restore(*found)
        self._tell("continued" if found else "started")

    # ---- called by children ----------------------------------------------------------------------------------

    async def join(self, child: str) -> int:
        """A child is here; returns the highest seq accepted from it."""
        self._handle(Joined(child=child, now_s=self.clock.now_s()))
        return self.node.children[child].last_seq

    async def push(self, sender: str, header: bytes, refs: list[Any]) -> Verdict:
        """Take an update. The buffer is mapped from the object store and folded without a copy."""
        values = await refs[0]
        packed = Packed(header, values)
        self._handle(Push(sender=sender, packed=packed, now_s=self.clock.now_s()))
        self._save_if_due()
        return self._verdicts.pop(sender)

    async def pull(self, child: str, started_tokens: int) -> Carried:
        """Give the model to a child, as soon as the child may go on."""
        future: asyncio.Future[Carried] = asyncio.get_running_loop().create_future()
        self._pulls[child] = future
        self._handle(Pull(child=child, started_tokens=started_tokens, now_s=self.clock.now_s()))
        return await future

    async def done(self, child: str) -> None:
        """A child will train no more."""
        self._handle(Done(child=child, now_s=self.clock.now_s()))

    # ---- called by the launcher ------------------------------------------------------------------------------

    async def ready(self) -> int:
        """The version that this node starts from; also answers whether the actor is up."""
        return self.node.version

    async def start(self) -> None:
        """Begin: send again what was on its way when the last run of this node ended."""
        self._publish()
        self._perform(self.node.resume())

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
        self._save()
        return self.node.version

    # ---- the machine -----------------------------------------------------------------------------------------

    def _handle(self, event: Event) -> None:
        began = time.perf_counter()
        commands = self.node.handle(event)
        self._busy_s += time.perf_counter() - began
        self._perform(commands)

    def _perform(self, commands: list[Command]) -> None:
        records: list[Record] = []
        for command in commands:
            if isinstance(command, Note):
                records.append(self._with_busy(command.record))
            elif isinstance(command, Charge):
                assert self.contributions is not None
                self.contributions.charge(command.child)  # blocks: nothing may be published before it is on disk
            elif isinstance(command, Answer):
                self._verdicts[command.child] = command.verdict
            elif isinstance(command, Serve):
                future = self._pulls.pop(command.child, None)
                if future is not None and not future.done():
                    header = pack(command.model, self.plan.layout).header
                    future.set_result((header, [self._publish()]))
            elif isinstance(command, Exchange):
                self._publish()
                update = self.node.begin_exchange()
                ref, _ = self._share(update.values)
                # Saved before it is sent: after a crash the same update goes out again under the same seq.
                self._save()
                # Only the reference goes on: Ray keeps a coroutine's arguments alive until it returns.
                self._spawn(self._exchange(pack(update, self.plan.layout).header, ref, update.values.nbytes))
                del update
            elif isinstance(command, Wake):
                self._spawn(self._wake(command.at_s))
            elif isinstance(command, Finish):
                self._spawn(self._finish())
        if records:
            self.recorder.record.remote(records)

    async def _exchange(self, header: bytes, ref: Any, nbytes: int) -> None:
        raise NotImplementedError(f"{self.spec.path} has no parent")

    async def _finish(self) -> None:
        self._tell("finished")
        self._ended.set()

    async def _wake(self, at_s: float) -> None:
        await asyncio.sleep(max(at_s - self.clock.now_s(), 0.0))
        self._handle(Clock(now_s=max(at_s, self.clock.now_s())))

    def _publish(self) -> Any:
        """The one object-store reference of the published model."""
        if self._published is None or self._published[0] is not self.node.theta:
            self._published = None  # an old version goes before the new one comes, unless a child still reads it
            ref, view = self._share(self.node.theta)
            self._published = (view, ref)
        return self._published[1]

    def _share(self, values: Flat) -> tuple[Any, Flat]:
        """Move one of the machine's buffers into the object store; returns the reference and the shared copy."""
        ref = ray.put(values)
        # Blocking is right here: the object is on this machine already, and no event may come in between.
        return ref, self.node.use_shared_copy(values, ray.get(ref))

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(self._guard(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _guard(self, work: Any) -> None:
        try:
            await work
        except Exception as error:  # noqa: BLE001 - a boundary: the launcher raises it from `ended`
            self._error = error
            self._ended.set()

    def _save_if_due(self) -> None:
        every_s = self.plan.config.checkpoint.every_s
        if self.clock.now_s() - self._saved_s >= every_s:
            self._save()

    def _save(self) -> None:
        checkpoint.save(self._place, *self.node.state(), keep=self.plan.config.checkpoint.keep)
        self._saved_s = self.clock.now_s()

    def _with_busy(self, record: Record) -> Record:
        if isinstance(record, AggregationRecord):
            alive_s = max(self.clock.now_s() - self._began_s, 1e-9)
            return replace(record, busy_fraction=min(self._busy_s / alive_s, 1.0))
        return record

    def _tell(self, event: str, detail: str = "") -> None:
        record = LifeRecord(
            node=self.spec.path,
            now_s=self.clock.now_s(),
            event=event,
            version=self.node.version,
            detail=detail,
        )
        self.recorder.record.remote([record])
