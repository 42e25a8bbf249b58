"""A node as the parent of one client's actor, without Ray: threads stand in for its calls."""

from __future__ import annotations

import threading
from typing import Any

from ray.exceptions import RayActorError

from support.threaded_ray import Ref
from worldlm_ray.aggregation.events import Admit, Answer, Done, Heartbeat, Joined, Left, Pull, Push, Serve, Started
from worldlm_ray.exchange.messages import Packed, pack
from worldlm_ray.plan import build
from worldlm_ray.plan.plan import Plan


class Parent:
    """A world that answers its one client, as long as the gate is open."""

    def __init__(self, plan: Plan, *, incarnation: int = 1) -> None:
        self.plan, self.node = plan, build.inner_node(plan, plan.root, build.initial(plan))
        self.node.handle(Started(incarnation=incarnation))
        self.gate, self.dead = threading.Event(), False
        self.gate.set()
        self.held = threading.Event()
        """Set once a thread stands before a closed gate."""
        self._one = threading.Lock()

    def _handle(self, event: Any) -> list[Any]:
        if not isinstance(event, Joined | Heartbeat):
            if not self.gate.is_set():
                self.held.set()
            assert self.gate.wait(20.0)
        if self.dead:
            raise RayActorError
        with self._one:
            return self.node.handle(event)

    def join(self, child: str, incarnation: int, seq: int) -> Any:
        commands = self._handle(Joined(child=child, incarnation=incarnation, seq=seq, now_s=0.0))
        [welcome] = [command.welcome for command in commands if isinstance(command, Admit)]
        return welcome

    def push(self, sender: str, incarnation: int, to: int, header: bytes, refs: list[Ref]) -> Any:
        packed = Packed(header, refs[0].value)
        found = self._handle(Push(sender=sender, packed=packed, incarnation=incarnation, to=to, now_s=0.0))
        return next(command.verdict for command in found if isinstance(command, Answer))

    def pull(self, child: str, incarnation: int, to: int, started_tokens: int) -> Any:
        event = Pull(child=child, incarnation=incarnation, to=to, started_tokens=started_tokens, now_s=0.0)
        [served] = [command for command in self._handle(event) if isinstance(command, Serve)]
        header = pack(served.model, self.plan.layout).header
        values = served.model.values
        ref = Ref(lambda: values)
        assert ref.ready.wait(20.0)
        return header, [ref]

    def published(self) -> tuple[int, list[Ref]]:
        values = self.node.theta
        return self.node.version, [Ref(lambda: values)]

    def heartbeat(self, child: str, incarnation: int, to: int) -> None:
        self._handle(Heartbeat(child=child, incarnation=incarnation, to=to, now_s=0.0))

    def done(self, child: str, incarnation: int, to: int) -> None:
        self._handle(Done(child=child, incarnation=incarnation, to=to, now_s=0.0))

    def left(self, child: str, incarnation: int, to: int) -> bool:
        self._handle(Left(child=child, incarnation=incarnation, to=to, now_s=0.0))
        return True
