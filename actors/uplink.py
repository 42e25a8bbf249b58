"""A child's side of the link to its parent: every call is made again until it is heard.

    join    find the parent, learn what it has, send again what it has lost
    push    send an update
    pull    get the parent's model
    done    the last word

A parent may die at any moment and come back from a checkpoint, or the network between the two may fail. Whatever a call
was cut off by, the child joins again and goes on from what the parent then says it has. On Ray the protocol is written
once, as generators: a client drives them from a thread that waits, a federation from its event loop. The simulator has
a version with callbacks in worldlm_ray/simulation/simulator.py.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError

from actors.shared import Address, Carried
from worldlm_ray.errors import MessageError, SupersededError
from worldlm_ray.exchange.compression import nbytes
from worldlm_ray.exchange.messages import Model, Packed, Update, buffer_of, pack_header, unpack_model
from worldlm_ray.exchange.outbox import Outbox
from worldlm_ray.exchange.replies import Verdict, Welcome, believed, checked_verdict
from worldlm_ray.plan.faults import damaged
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.quotas import offered_residuals
from worldlm_ray.plan.tree import parent_path
from worldlm_ray.records import LifeRecord, PullRecord, PushRecord, Record
from worldlm_ray.tensors.buffers import Flat

AGAIN_S = 0.5
"""Between two attempts to find a parent that does not answer; later ones wait longer, up to ..."""
AGAIN_AT_MOST_S = 5.0
LOUD_AFTER = 4
"""Attempts after which an operator is told that the parent cannot be found."""
ANSWER_S = 30.0
"""A task that awaits very many answers asks again for one that has not come within this time."""
TRIES = 3
"""A model that cannot be read is asked for so often."""
POLL_S = 0.2
"""How often a thread that waits for its parent looks whether it should stop."""

T = TypeVar("T")
Steps = Generator[Any, Any, T]
"""What is being done, step by step: yields an object reference to be waited for, or seconds to sleep."""


class Lost(Exception):
    """A call was not answered: the parent has died, has been restarted, or cannot be reached."""


class Stopped(Exception):
    """The child was told to stop while it waited."""


class Child(Protocol):
    """What a client and a federation have in common."""

    incarnation: int
    seq: int
    outbox: Outbox

    @property
    def started_tokens(self) -> int:
        """Tokens of all local rounds begun below."""
        ...

    def welcomed(self, welcome: Welcome) -> None:
        """The parent is there, perhaps again."""
        ...

    def answered(self, verdict: Verdict) -> None:
        """The parent's word about an update."""
        ...


class Uplink:
    """One child's link.

    Args:
        address: the run and the child's path.
        plan: the run.
        child: whose seq and outbox the link keeps in step with the parent.
        tell: takes records.
    """

    def __init__(self, address: Address, plan: Plan, child: Child, *, tell: Callable[[Record], None]) -> None:
        self._address, self._plan, self._child, self._tell = address, plan, child, tell
        self._name, self._faults, self._clock = plan.node(address.path).name, plan.faults, address.clock
        parent = parent_path(address.path)
        self._offered = 0 if parent is None else offered_residuals(plan.node(parent))
        """Residuals that the parent's model may bring."""
        self._parent: Any = None
        self._to = 0
        """Incarnation of the parent that has been joined; 0 while none is."""
        self._refs: dict[int, Any] = {}
        """Object references of what is in the outbox."""

    # ---- what a child says -------------------------------------------------------------------------------------

    def join(self) -> Steps[None]:
        """Find the parent, for as long as it takes, and send it what it does not have."""
        attempt = 0
        while True:
            try:
                yield from self._join()
                if attempt >= LOUD_AFTER:
                    self._life("training", "its parent is back")
                return
            except Lost as error:
                attempt += 1
                if attempt == LOUD_AFTER:
                    self._life("waiting", f"its parent does not answer ({error})")
                yield min(AGAIN_S * attempt, AGAIN_AT_MOST_S)

    def push(self, update: Update) -> Steps[None]:
        """Send an update that is in the outbox."""
        try:
            yield from self._push(update)
        except Lost:
            yield from self.join()  # which sends the outbox

    def pull(self) -> Steps[Model | None]:
        """The parent's model; None if what comes is none, however often it is asked for."""
        tries = 0
        while True:
            try:
                packed = yield from self._packed((yield from self._ask()))
                model = unpack_model(packed, self._plan.layout, residuals=self._offered)
                path, now_s = self._address.path, self._clock.now_s()
                self._tell(PullRecord(node=path, now_s=now_s, version=model.version, bytes=packed.nbytes))
                return model
            except MessageError as error:  # something on the way may have damaged it
                tries += 1
                if tries == TRIES:
                    parent = parent_path(self._address.path)
                    self._life("warning", f"refuses the model of its parent {parent} ({error})")
                    return None
                yield AGAIN_S
            except (Lost, RayActorError, ObjectLostError, GetTimeoutError):
                self._to = 0
                yield from self.join()

    def done(self) -> Steps[None]:
        """The child will train no more."""
        yield from self._until_heard("done")

    def left(self) -> Steps[None]:
        """The child leaves the run, once its parent cannot lose any more what the child has pushed."""
        while not (yield from self._until_heard("left")):
            yield AGAIN_S

    def beat(self) -> Steps[bool]:
        """Tell the parent that the child lives; returns whether the parent is the one that it has joined."""
        try:
            yield from self._call("beat")
        except Lost:
            return False
        return True

    def send_beat(self) -> None:
        """A sign of life whose answer nobody waits for: it comes from beside the thread that talks to the parent."""
        parent, to = self._parent, self._to
        if parent is not None and to and not self._faulty("cut"):
            parent.beat.remote(self._name, self._child.incarnation, to)

    def word(self) -> tuple[str, int, int] | None:
        """A sign of life for a process that gives those of many children at once; None while none would be heard."""
        if self._parent is None or not self._to or self._faulty("cut"):
            return None
        return self._name, self._child.incarnation, self._to

    @property
    def parent(self) -> Any:
        """Handle of the parent's actor; None while it is being looked for."""
        return self._parent

    # ---- calls ---------------------------------------------------------------------------------------------------

    def _until_heard(self, word: str) -> Steps[Any]:
        while True:
            try:
                return (yield from self._call(word))
            except Lost:
                yield from self.join()

    def _join(self) -> Steps[None]:
        self._to = 0
        found = yield from self._send("join", self._name, self._child.incarnation, self._child.seq)
        try:
            welcome, doubt = believed(found, seq=self._child.seq)
        except MessageError as error:
            raise Lost(str(error)) from error
        if doubt:
            self._life("warning", f"its parent's welcome is not believed: {doubt}")
        self._to = welcome.incarnation
        self._child.welcomed(welcome)
        after = welcome.last_seq
        while updates := self._child.outbox.after(after):
            yield from self._push(updates[0])
            after = updates[0].seq

    def _push(self, update: Update) -> Steps[None]:
        header, ref = pack_header(update, self._plan.layout), self._share(update)
        size = len(header) + nbytes(update.codec, update.values.size)
        self._tell(PushRecord(node=self._address.path, now_s=self._clock.now_s(), bytes=size))
        header = damaged(header) if self._faulty("corrupt") else header
        while True:
            verdict = yield from self._verdict(header, ref)
            if verdict.reason == "superseded":
                raise SupersededError(f"{self._address.path}: {verdict.detail}")
            self._child.answered(verdict)
            if self._child.outbox.must_join(update, verdict):
                self._to = 0
                raise Lost(verdict.detail)
            if verdict.reason != "out_of_turn":
                break
            # Sent again after a restart, while its forerunner waits for its siblings': not before that is through.
            yield from self._ask()
        self._refs = {seq: ref for seq, ref in self._refs.items() if seq in self._child.outbox}

    def _verdict(self, header: bytes, ref: Any) -> Steps[Verdict]:
        found = yield from self._call("push", header, [ref])
        try:
            return checked_verdict(found)
        except MessageError as error:
            self._to = 0
            raise Lost(str(error)) from error

    def _packed(self, found: Any) -> Steps[Packed]:
        """What a pull's answer refers to.

        Raises:
            MessageError: malformed: it is no header and one reference.
        """
        try:
            header, [ref] = found
            if isinstance(ref, int | float):  # a step of so many seconds
                raise TypeError(f"{type(ref).__name__} is no reference")
            return Packed(header, (yield ref))
        except (TypeError, ValueError) as error:
            raise MessageError("malformed", f"the answer to a pull is no header and one buffer: {error}") from error

    def _ask(self) -> Steps[Carried]:
        found: Carried = yield from self._call("pull", self._child.started_tokens)
        return found

    def _call(self, method: str, *arguments: Any) -> Steps[Any]:
        """A call that only the parent that was joined may take."""
        if not self._to:
            raise Lost("not joined")
        return (yield from self._send(method, self._name, self._child.incarnation, self._to, *arguments))

    def _send(self, method: str, *arguments: Any) -> Steps[Any]:
        late_s = self._faults.delay_s(self._address.path, self._clock.now_s()) if self._faults else 0.0
        if late_s:
            yield late_s
        if self._faulty("cut"):
            raise Lost("cut off on purpose")
        try:
            if self._parent is None:
                self._parent = self._address.parent
            if self._faulty("repeat"):
                getattr(self._parent, method).remote(*arguments)
            answer = yield getattr(self._parent, method).remote(*arguments)
        except MessageError as error:
            if error.reason == "superseded":
                raise SupersededError(f"{self._address.path}: {error.detail}") from error
            self._to = 0
            raise Lost(str(error.detail)) from error
        except (RayActorError, GetTimeoutError, ValueError) as error:  # ValueError: no actor of that name (yet)
            self._parent, self._to = None, 0
            raise Lost(type(error).__name__) from error
        if self._faulty("drop") or self._faulty("cut"):
            self._to = 0
            raise Lost("its answer was lost on purpose")
        return answer

    def share(self, update: Update) -> Flat:
        """Move an update into the object store; returns a buffer with its values for the child to keep instead."""
        ref = self._share(update)
        # Blocking is right here: the object is on this machine already.
        return ray.get(ref) if update.codec == "fp32" else update.values

    def _share(self, update: Update) -> Any:
        if update.seq not in self._refs:
            self._refs[update.seq] = ray.put(buffer_of(update))
        return self._refs[update.seq]

    def _faulty(self, kind: str) -> bool:
        return bool(self._faults) and self._faults.now(self._address.path, kind, self._clock.now_s())

    def _life(self, event: str, detail: str) -> None:
        self._tell(LifeRecord(node=self._address.path, now_s=self._clock.now_s(), event=event, detail=detail))


# ---- who takes the steps -----------------------------------------------------------------------------------------


def wait_for(
    steps: Steps[T],
    should_stop: Callable[[], bool] = lambda: False,
    *,
    lock: AbstractContextManager[Any] | None = None,
) -> T:
    """Take the steps from a thread that may wait.

    Args:
        steps: what is to be done.
        should_stop: asked while it waits; True ends it.
        lock: held between two waits, which is when steps change what the child knows of its exchange.

    Raises:
        Stopped: `should_stop` said so before they were through.
    """

    def perform(step: Any) -> Any:
        if isinstance(step, int | float):
            until = time.monotonic() + step
            while not should_stop() and (left := until - time.monotonic()) > 0:
                time.sleep(min(left, POLL_S))
            return None
        while not should_stop():
            ready, _ = ray.wait([step], timeout=POLL_S)
            if ready:
                return ray.get(step)
        raise Stopped

    value, error = None, None
    while True:
        try:
            with lock or nullcontext():
                step = steps.throw(error) if error is not None else steps.send(value)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        if should_stop():
            steps.close()
            raise Stopped
        value, error = None, None
        try:
            value = perform(step)
        except Stopped:
            steps.close()
            raise
        except Exception as caught:  # noqa: BLE001 - whatever it is, the steps know what to do
            error = caught


async def settled(ref: Any) -> Any:
    """The value behind a reference."""
    return await ref


async def follow(steps: Steps[T], *, wait: Callable[[Any], Awaitable[Any]] = settled) -> T:
    """Take the steps from an event loop; `wait` gives the value behind a reference."""
    value, error = None, None
    while True:
        try:
            step = steps.throw(error) if error is not None else steps.send(value)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        value, error = None, None
        try:
            if isinstance(step, int | float):
                await asyncio.sleep(step)
            else:
                value = await wait(step)
        except Exception as caught:  # noqa: BLE001 - whatever it is, the steps know what to do
            error = caught


async def settled_in_time(ref: Any) -> Any:
    """The value behind a reference, for processes that await very many.

    Under load an answer may never come though both sides live: it happened to one of some thousands. Asking again
    costs nothing, since whoever asks twice is served once and what is sent twice is dropped.

    Raises:
        GetTimeoutError: the value has not come within `ANSWER_S`.
    """
    answer = asyncio.ensure_future(ref)
    try:
        await asyncio.wait({answer}, timeout=ANSWER_S)
        if not answer.done():
            raise GetTimeoutError(f"no answer within {ANSWER_S:.0f} s")
        return answer.result()
    finally:
        answer.cancel()
