"""Who takes the steps of worldlm_ray/protocol/ on Ray: a thread that waits, or an event loop.

RayLink     makes a Send a call of the parent's actor; buffers travel through the object store
FaultyLink  wraps a link, and does on purpose what a fault script says of it
wait_for    takes the steps from a thread that may wait
follow      takes the steps from an event loop
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Generator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError

from actors.shared import Address
from worldlm_ray.exchange.messages import Packed, Update, buffer_of
from worldlm_ray.plan.faults import Faults, damaged
from worldlm_ray.plan.plan import Plan
from worldlm_ray.protocol.child import Child, Lost, Send, Sleep, Steps, Stopped, Uplink
from worldlm_ray.protocol.life import Share

ANSWER_S = 30.0
"""A task that awaits very many answers asks again for one that has not come within this time."""
STOP_EVERY_S = 0.2
"""How often a thread that waits for its parent looks whether it should stop."""

T = TypeVar("T")
References = Generator[Any, Any, T]
"""Yields object references to be waited for, and `Sleep`."""


class Link(Protocol):
    """Carries a child's calls to its parent."""

    @property
    def parent(self) -> Any:
        """Handle of the parent's actor; None while it is not known or cannot be reached."""
        ...

    def call(self, send: Send) -> Any:
        """Make a call; returns a reference to its answer."""
        ...

    def carry(self, send: Send) -> References[Any]:
        """Make a call and return its answer.

        Raises:
            Lost: there is no answer.
            MessageError: the parent refuses.
        """
        ...

    def share(self, update: Update) -> Update:
        """Move what travels of an update into the object store; returns the update with it, for the child to keep."""
        ...


class RayLink:
    """The link of one child to its parent's actor.

    Args:
        address: the run and the child's path.
        child: whose outbox says which updates may still be sent again.
    """

    def __init__(self, address: Address, child: Child) -> None:
        self._address, self._child = address, child
        self._parent: Any = None
        self._refs: dict[int, Any] = {}
        """Object references of what is in the outbox."""

    @property
    def parent(self) -> Any:
        """Handle of the parent's actor; None while it is being looked for."""
        return self._parent

    def call(self, send: Send) -> Any:
        """See Link."""
        if self._parent is None:
            self._parent = self._address.parent
        arguments: tuple[Any, ...] = send.arguments
        if send.method == "push":
            *others, update = arguments
            # In a list, since Ray would otherwise fetch it before the call (see actors.shared.Carried).
            arguments = (*others, [self._reference(update)])
        return getattr(self._parent, send.method).remote(*arguments)

    def carry(self, send: Send) -> References[Any]:
        """See Link."""
        self._refs = {seq: ref for seq, ref in self._refs.items() if seq in self._child.outbox}
        try:
            answer = yield self.call(send)
            return (yield from _packed(answer)) if send.method == "pull" else answer
        except ObjectLostError as error:
            raise Lost(type(error).__name__) from error
        except (RayActorError, GetTimeoutError, ValueError) as error:  # ValueError: no actor of that name (yet)
            self._parent = None
            raise Lost(type(error).__name__) from error

    def share(self, update: Update) -> Update:
        """See Link."""
        ref = self._reference(update)
        # Blocking is right here: the object is on this machine already.
        return update.in_shared_memory(ray.get(ref))

    def _reference(self, update: Update) -> Any:
        if update.seq not in self._refs:
            self._refs[update.seq] = ray.put(buffer_of(update))
        return self._refs[update.seq]


def _packed(answer: Any) -> References[Any]:
    """What the answer to a pull refers to; the answer itself if it is no header and one reference."""
    try:
        header, [ref] = answer
        return Packed(header, (yield ref))
    except (TypeError, ValueError):
        return answer


class FaultyLink:
    """A link on which happens what a fault script says: cut, drop, repeat, corrupt, delay.

    Args:
        link: carries the calls.
        script: the faults.
        path: of the child.
        now_s: gives the run time.
    """

    def __init__(self, link: Link, script: Faults, path: str, now_s: Callable[[], float]) -> None:
        self._link, self._script, self._path, self._now_s = link, script, path, now_s

    @property
    def parent(self) -> Any:
        """See Link."""
        return None if self._is("cut") else self._link.parent

    def call(self, send: Send) -> Any:
        """See Link."""
        return self._link.call(send)

    def carry(self, send: Send) -> References[Any]:
        """See Link."""
        late_s = self._script.delay_s(self._path, self._now_s())
        if late_s:
            yield Sleep(late_s)
        if self._is("cut"):
            raise Lost("cut off on purpose")
        if send.method == "push" and self._is("corrupt"):
            *who, header, update = send.arguments
            send = Send(send.method, (*who, damaged(header), update), send.nbytes)
        if self._is("repeat"):
            with suppress(ValueError):  # there is no such actor (yet), which the call itself says, too
                self._link.call(send)
        answer = yield from self._link.carry(send)
        if self._is("drop") or self._is("cut"):
            raise Lost("its answer was lost on purpose")
        return answer

    def share(self, update: Update) -> Update:
        """See Link."""
        return self._link.share(update)

    def _is(self, kind: str) -> bool:
        return self._script.now(self._path, kind, self._now_s())


def link_of(address: Address, plan: Plan, child: Child) -> Link:
    """The link of a child to its parent, with the faults of the run's script if it has any."""
    link = RayLink(address, child)
    return FaultyLink(link, plan.faults, address.path, address.clock.now_s) if plan.faults else link


def send_heartbeat(uplink: Uplink, link: Link) -> None:
    """A heartbeat whose answer is not waited for: it comes from beside the thread that talks to the parent."""
    send, parent = uplink.heartbeat(), link.parent
    if send is not None and parent is not None:
        parent.heartbeat.remote(*send.arguments)


def carried(steps: Steps[T], link: Link) -> References[T]:
    """The steps of the protocol or of a life, with each call made, and each update shared, over a link."""
    value, error = None, None
    while True:
        try:
            step = steps.throw(error) if error is not None else steps.send(value)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        value, error = None, None
        try:
            if isinstance(step, Send):
                value = yield from link.carry(step)
            else:
                value = link.share(step.update) if isinstance(step, Share) else (yield step)
        except Exception as caught:  # noqa: BLE001 - whatever it is, the steps know what to do
            error = caught


# ---- who takes the steps -----------------------------------------------------------------------------------------


class Walk:
    """Steps under way: the one that is due, and at the end the result.

    Args:
        steps: what is to be done.
        lock: held between two steps, which is when they change what the child knows of its exchange.
    """

    def __init__(self, steps: Generator[Any, Any, Any], lock: AbstractContextManager[Any] | None = None) -> None:
        self._steps, self._lock = steps, lock or nullcontext()
        self.step: Any = None
        self.has_ended, self.result = False, None
        self.go_on()

    def go_on(self, answer: Any = None, error: Exception | None = None) -> None:
        """Answer the step that is due; the next one is due then."""
        try:
            with self._lock:
                self.step = self._steps.throw(error) if error is not None else self._steps.send(answer)
        except StopIteration as end:
            self.has_ended, self.result = True, end.value

    def perform(self, work: Callable[[Any], Any]) -> None:
        """Do the step that is due by `work`, and go on with what it gives or raises."""
        try:
            answer = work(self.step)
        except Exception as error:  # noqa: BLE001 - whatever it is, the steps know what to do
            self.go_on(error=error)
        else:
            self.go_on(answer)


def wait_for(
    steps: References[T],
    should_stop: Callable[[], bool] = lambda: False,
    *,
    lock: AbstractContextManager[Any] | None = None,
    others: Mapping[type, Callable[[Any], Any]] = MappingProxyType({}),
) -> T:
    """Take the steps from a thread that may wait.

    Args:
        steps: what is to be done.
        should_stop: asked while it waits; True throws `Stopped` into the steps.
        lock: see Walk.
        others: what does steps of other kinds than references and Sleep.

    Raises:
        Stopped: `should_stop` said so before they were through.
    """

    def wait(step: Any) -> Any:
        if isinstance(step, Sleep):
            until = time.monotonic() + step.seconds
            while not should_stop() and (left := until - time.monotonic()) > 0:
                time.sleep(min(left, STOP_EVERY_S))
        while not should_stop():
            if isinstance(step, Sleep):
                return None
            ready, _ = ray.wait([step], timeout=STOP_EVERY_S)
            if ready:
                return ray.get(step)
        raise Stopped

    walk = Walk(steps, lock)
    while not walk.has_ended:
        walk.perform(others.get(type(walk.step), wait))
    return walk.result  # type: ignore[return-value]


async def settled(ref: Any) -> Any:
    """The value behind a reference."""
    return await ref


async def follow(steps: References[T], *, wait: Callable[[Any], Awaitable[Any]] = settled) -> T:
    """Take the steps from an event loop; `wait` gives the value behind a reference."""
    walk = Walk(steps)
    while not walk.has_ended:
        try:
            sleeps = isinstance(walk.step, Sleep)
            answer = await (asyncio.sleep(walk.step.seconds) if sleeps else wait(walk.step))
        except Exception as error:  # noqa: BLE001 - whatever it is, the steps know what to do
            walk.go_on(error=error)
        else:
            walk.go_on(answer)
    return walk.result  # type: ignore[return-value]


async def settled_in_time(ref: Any) -> Any:
    """The value behind a reference, for processes that await very many.

    Under load an answer may never come though both sides live: it happened to one of some thousands. Asking again
    costs nothing, since a child that asks twice is served once and what is sent twice is dropped.

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
