"""The links of a simulated world: calls from children to parents, which take time and may fail.

A child's side of the protocol is worldlm_ray/protocol/child.py, as on Ray. A task takes its steps as virtual time goes
by: a `Send` travels for the link's latency and the bytes over its bandwidth, and so does its answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from worldlm_ray.aggregation.events import Done, Event, Heartbeat, Joined, Left, Pull, Push
from worldlm_ray.errors import MessageError, SupersededError
from worldlm_ray.exchange.messages import Model
from worldlm_ray.exchange.replies import Verdict, Welcome
from worldlm_ray.plan.faults import damaged
from worldlm_ray.protocol.child import Lost, Send, Sleep, Steps
from worldlm_ray.simulation.world import World

BITS_PER_GBIT = 1e9
NOTICED_S = 1.0
"""Virtual seconds until a caller learns that its call has failed."""

Take = Callable[[str, Event], Verdict | Welcome | None]
"""Lets a node handle an event; returns what it answers to a push or to a child that joins."""


LATER = object()
"""What a step is answered with that takes time: the task goes on later (`Network.go_on`)."""
_FINAL: dict[str, type[Done] | type[Left] | type[Heartbeat]] = {"done": Done, "left": Left, "heartbeat": Heartbeat}


@dataclass(eq=False, slots=True)
class Task:
    """The steps that a child is taking."""

    child: str
    steps: Steps[Any]
    background: bool = False
    """Whether the run may end without it."""
    on_end: Callable[[Task], None] | None = None
    """Called when the steps have ended by themselves."""
    call: int = 0
    """Number of the call under way. Whatever belongs to an older one comes too late."""
    is_answered: bool = True
    """Whether the parent has answered the call under way."""
    is_dropped: bool = False
    """Whether no further step is taken."""
    awaits_model: bool = False
    """Whether the answer is a model, which may come much later than the call."""
    has_ended: bool = False
    result: Any = None


class Network:
    """Links that never fail.

    Args:
        world: the nodes.
        take: lets a node handle an event.
    """

    def __init__(self, world: World, take: Take) -> None:
        self._world, self._clock, self._take = world, world.clock, take
        self._tasks: dict[str, list[Task]] = {}
        """By child."""
        self.others: Mapping[type, Callable[[Task, Any], Any]] = {}
        """What does steps of other kinds than Send and Sleep, by kind; set by what drives the clients' lives."""
        self.has_begun = False
        """Whether the run has begun. Until then a child joins its parent in no time."""

    # ---- tasks ---------------------------------------------------------------------------------------------------

    def start(self, child: str, steps: Steps[Any], *, on_end: Callable[[Task], None] | None = None) -> Task:
        """Take steps of a child, beside those that it takes already."""
        task = Task(child, steps, on_end=on_end)
        self._tasks.setdefault(child, []).append(task)
        self.go_on(task)
        return task

    def restart(self, child: str, steps: Steps[None]) -> None:
        """Take other steps in place of all that a child takes."""
        self.drop(child)
        self.start(child, steps)

    def drop(self, child: str) -> list[Task]:
        """Take no more steps of a child; returns the tasks that took them."""
        dropped = self._tasks.pop(child, [])
        for task in dropped:
            task.call += 1
            task.is_dropped = True
        return dropped

    def kill(self, child: str) -> None:
        """End all that a child does where it is."""
        for task in self.drop(child):
            task.steps.close()

    def fail_calls_to(self, parent: str) -> None:
        """A parent has died: calls that it has not answered fail."""
        below = [task for child, tasks in self._tasks.items() if self._world.parent(child) == parent for task in tasks]
        for task in below:
            if not task.is_answered:
                self._fail(task)

    def serve(self, child: str, model: Model) -> None:
        """Answer a child's pull."""
        size = self._world.bytes_down(model)
        for task in [task for task in self._tasks.get(child, ()) if task.awaits_model]:
            self._answer(task, (model, size), size)

    def go_on(self, task: Task, value: Any = None, error: Exception | None = None) -> None:
        """Answer the step of a task that is due, and take the next ones until one takes time."""
        while True:
            try:
                step = task.steps.throw(error) if error is not None else task.steps.send(value)
            except (StopIteration, SupersededError) as end:
                self._end(task, end)
                return
            if task.is_dropped:
                return  # by this very step
            task.call += 1
            error = None
            if isinstance(step, Sleep):
                self.later(task, self._clock.now_s + step.seconds, lambda: self.go_on(task))
                return
            if not isinstance(step, Send):
                value = self.others[type(step)](task, step)
                if value is LATER:
                    return
            elif step.method == "join" and not self.has_begun:
                value, _ = self._handle(task.child, step)
            else:
                task.is_answered = task.awaits_model = False
                self._send(task, step)
                return

    def _end(self, task: Task, end: StopIteration | SupersededError) -> None:
        if task.is_dropped:
            return
        self._tasks[task.child].remove(task)
        if isinstance(end, StopIteration):
            task.has_ended, task.result = True, end.value
            if task.on_end is not None:
                task.on_end(task)

    def later(self, task: Task, at_s: float, action: Callable[[], None]) -> None:
        """Do what belongs to the call under way, unless another one is by then."""
        call = task.call

        def act() -> None:
            if task.call == call:
                action()

        self._clock.at(at_s, act, background=task.background)

    # ---- calls ---------------------------------------------------------------------------------------------------

    def arrival_s(self, child: str, nbytes: int) -> float:
        """When a message that leaves now arrives over the link between a child and its parent, either way."""
        link = self._world.specs[child].settings.simulation
        return self._clock.now_s + link.latency_s + 8 * nbytes / (link.bandwidth_gbps * BITS_PER_GBIT)

    def heartbeats(self) -> None:
        """Every child tells its parent that it lives; there is no answer."""
        for child, uplink in self._world.uplinks.items():
            send = uplink.heartbeat() if self._world.incarnations[child] else None
            if send is not None:
                at_s = self.arrival_s(child, 0)
                self._clock.at(at_s, lambda child=child, send=send: self._hear(child, send), background=True)  # type: ignore[misc]

    def _hear(self, child: str, send: Send) -> None:
        if self._world.incarnations[self._world.parent(child)]:
            try:
                self._handle(child, send)
            except MessageError:
                return

    def _send(self, task: Task, send: Send) -> None:
        self.later(task, self.arrival_s(task.child, send.nbytes), lambda: self._deliver(task, send))

    def _deliver(self, task: Task, send: Send) -> None:
        if not self._world.incarnations[self._world.parent(task.child)]:
            self._fail(task)
            return
        task.awaits_model = send.method == "pull"
        try:
            answer, is_there = self._handle(task.child, send)
        except MessageError as error:
            self._answer(task, error)
            return
        if is_there:
            self._answer(task, answer)

    def _handle(self, child: str, send: Send) -> tuple[Any, bool]:
        """Let the parent handle a call; returns its answer, and whether it is there already.

        Raises:
            MessageError: the parent refuses.
        """
        path, (name, incarnation, *rest) = self._world.parent(child), send.arguments
        common = {"incarnation": incarnation, "now_s": self._clock.now_s}
        if send.method == "join":
            return self._take(path, Joined(child=name, seq=rest[0], **common)), True
        to, *rest = rest
        if send.method == "push":
            header, update = rest
            packed = self._world.packed(child, header, update)
            return self._take(path, Push(sender=name, packed=packed, to=to, **common)), True
        if send.method == "pull":
            self._take(path, Pull(child=name, started_tokens=rest[0], to=to, **common))
            return None, False
        self._take(path, _FINAL[send.method](child=name, to=to, **common))
        return self._world.nodes[path].children[name].left_durable if send.method == "left" else None, True

    def _answer(self, task: Task, value: Any, nbytes: int = 0) -> None:
        """Send a call's answer, or the error that it raised, on its way."""
        if task.is_answered:
            return
        task.is_answered, task.awaits_model = True, False
        value, error = (None, value) if isinstance(value, MessageError) else (value, None)
        self.later(task, self.arrival_s(task.child, nbytes), lambda: self.go_on(task, value, error))

    def _fail(self, task: Task) -> None:
        """The caller learns after a while that there will be no answer."""
        task.call += 1
        task.is_answered, task.awaits_model = True, False
        self.later(task, self._clock.now_s + NOTICED_S, lambda: self.go_on(task, error=Lost("no answer")))


class FaultyNetwork(Network):
    """Links on which happens what the run's fault script says: cut, drop, repeat, corrupt, delay."""

    def arrival_s(self, child: str, nbytes: int) -> float:
        """See Network."""
        return super().arrival_s(child, nbytes) + self._world.faults.delay_s(child, self._clock.now_s)

    def _send(self, task: Task, send: Send) -> None:
        super()._send(task, send)
        if self._is(task.child, "repeat"):
            at_s = self.arrival_s(task.child, send.nbytes)
            self._clock.at(at_s, lambda: self._hear(task.child, send), background=task.background)

    def _hear(self, child: str, send: Send) -> None:
        if not self._is(child, "cut"):
            super()._hear(child, send)

    def _deliver(self, task: Task, send: Send) -> None:
        if self._is(task.child, "cut"):
            self._fail(task)
            return
        if send.method == "push" and self._is(task.child, "corrupt"):
            *who, header, update = send.arguments
            send = Send(send.method, (*who, damaged(header), update), send.nbytes)
        super()._deliver(task, send)

    def _answer(self, task: Task, value: Any, nbytes: int = 0) -> None:
        if not task.is_answered and (self._is(task.child, "drop") or self._is(task.child, "cut")):
            self._fail(task)
        else:
            super()._answer(task, value, nbytes)

    def _is(self, child: str, kind: str) -> bool:
        return self._world.faults.now(child, kind, self._clock.now_s)
