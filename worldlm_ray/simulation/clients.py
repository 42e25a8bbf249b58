"""Clients of a simulated world: the virtual clock takes the steps of their lives (worldlm_ray/protocol/life.py).

Training is real, and takes the virtual time of its tokens. Where a client trains while it exchanges
(`exchange.overlap`), the virtual time at which the parent's model arrives says after how many steps it is merged. All
else that a client does takes no virtual time.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import count
from typing import Any

import numpy as np

from worldlm_ray.client.above import FORWARD, Turns
from worldlm_ray.plan.tree import NodeSpec
from worldlm_ray.protocol.life import Await, Beside, CheckParent, Compute, Life, Look, Save, Share, TakeTurn, Train
from worldlm_ray.seeds import derive
from worldlm_ray.simulation.cost_model import CostPlan
from worldlm_ray.simulation.members import Members
from worldlm_ray.simulation.network import LATER, NOTICED_S, Network, Task
from worldlm_ray.simulation.restarts import Checkpoints, State
from worldlm_ray.simulation.world import World
from worldlm_ray.tensors.buffers import Flat


class VirtualTurns(Turns):
    """Turns at measuring where that takes no virtual time: it counts as so much all the same."""

    def expect(self, cost_s: float) -> None:
        """That is known beforehand."""

    def done(self, spent_s: float, *, measured: bool) -> None:
        """See Turns."""
        super().done(self.cost_s if measured else 0.0, measured=measured)


_NO_TURNS = VirtualTurns("world")
"""Of all clients that measure nothing."""


class VirtualLife(Life):
    """A life whose rounds take virtual time.

    Args:
        world: the nodes.
        path: of the client.
        tokens_per_s: how fast it trains.
        members: who takes part.
    """

    def __init__(self, world: World, path: str, *, tokens_per_s: float, members: Members) -> None:
        client, tokens = world.clients[path], world.plan.config.evaluation.tokens
        is_costly = not isinstance(world.plan, CostPlan)
        super().__init__(
            world.plan,
            client,
            world.uplinks[path],
            tell=world.tell,
            now_s=world.now_s,
            is_stopping=_never,
            is_leaving=partial(members.has_parted, path) if world.faults else _never,
            turns=VirtualTurns(path, cost_s=tokens / (FORWARD * tokens_per_s)) if is_costly else _NO_TURNS,
        )
        self._budget = world.budget
        self.steps = world.specs[path].settings.training.local_steps
        """Of a round."""
        self.round_s: float = client.round_tokens / tokens_per_s
        """What a round takes."""
        self._round_began_s = self._stretch_began_s = 0.0
        self.follows = True
        """Whether a paused client goes on following its parent."""

    @property
    def pace_s(self) -> float:
        """Between two pulls of a paused client."""
        return max(self._pace_s, self.round_s)

    def begin_training(self) -> None:
        """The round under way begins, or goes on, now."""
        now_s, step = self._now_s(), self._client.step
        if step == 0:
            self._round_began_s = now_s
        self._stretch_began_s = now_s

    def time_s(self, steps: int) -> float:
        """When so many steps of the round under way are done."""
        return self._round_began_s + (self.round_s if steps == self.steps else steps * (self.round_s / self.steps))

    @property
    def steps_begun(self) -> int:
        """Steps of the round under way that are done once the one that is due now is."""
        since_s, step_s = self._now_s() - self._round_began_s, self.round_s / self.steps
        return min(math.ceil(since_s / step_s - 1e-9), self.steps)

    def train_to(self, steps: int) -> float:
        """Train until so many steps of the round are done, which is now; returns virtual seconds since it went on."""
        ahead = count(self._client.step)
        if self._client.step < steps:
            self._client.train((lambda: next(ahead) >= steps) if steps < self.steps else _never)
        train_s = self._now_s() - self._stretch_began_s
        self._busy_s += train_s
        return train_s

    def _may_begin_ahead(self) -> bool:
        return super()._may_begin_ahead() and not self._budget.is_spent


def _never() -> bool:
    return False


class Clients:
    """Takes the steps of the clients' lives.

    Args:
        world: the nodes.
        network: takes the steps that are calls.
        members: who takes part.
        checkpoints: where clients are saved.
    """

    def __init__(self, world: World, network: Network, members: Members, checkpoints: Checkpoints) -> None:
        self._world, self._clock, self._network = world, world.clock, network
        self._members, self._checkpoints = members, checkpoints
        self.speeds = {spec.path: self._speed(spec) for spec in world.plan.root.clients}
        """Tokens per second of every client."""
        self._lives: dict[str, VirtualLife] = {}
        self._staying: dict[str, Task] = {}
        """Of clients that have ended: what takes the steps of their staying, while it waits for a heartbeat."""
        network.others = {
            Compute: self._compute,
            Train: self._train,
            Beside: lambda task, step: network.start(task.child, step.steps),
            Await: self._await,
            Share: lambda _, step: step.update,
            Save: self._save,
            Look: self._look,
            TakeTurn: self._take_turn,
            CheckParent: self._check_parent,
        }

    def make(self, path: str, incarnation: int, found: State | None) -> None:
        """Make a client anew, from a checkpoint if there is one."""
        world = self._world
        client = world.clients[path] = world.make_client(path, dataset=world.clients[path].dataset)
        client.incarnation = incarnation
        if found is not None:
            client.restore(*found)
        world.connect(path)
        world.budget.count(path)

    def begin(self, path: str) -> None:
        """Let a client live."""
        world = self._world
        if world.clients[path].warning:
            world.warn(path, world.clients[path].warning)
        life = VirtualLife(world, path, tokens_per_s=self.speeds[path], members=self._members)
        self._lives[path] = life
        self._network.start(path, life.run(), on_end=self._end)

    def forget(self, path: str) -> None:
        """A client was killed: its round is lost."""
        self._staying.pop(path, None)
        self._world.budget.count(path)

    def notice(self, path: str) -> None:
        """A client that has ended learns that its parent has been restarted."""
        task = self._staying.pop(path, None)
        if task is not None:
            task.background, self._lives[path].follows = False, True
            self._network.go_on(task, False)

    def _end(self, task: Task) -> None:
        """A life has ended. Where no parent can die, only a paused client has a reason to stay."""
        path = task.child
        if task.result == "left":
            self._members.has_left(path)
            return
        self._members.end_if_all_have_ended()
        if self._world.faults or self._world.clients[path].paused:
            self._network.start(path, self._lives[path].stay())

    # ---- steps ---------------------------------------------------------------------------------------------------

    def _compute(self, task: Task, step: Compute) -> Any:
        answer = step.work()
        self._world.budget.count(task.child)
        return answer

    def _take_turn(self, task: Task, _: TakeTurn) -> None:
        """At once. Rounds that the parent has accepted are counted before the client pulls."""
        self._world.budget.count(task.child)

    def _train(self, task: Task, step: Train) -> object:
        life, exchange = self._lives[task.child], step.until
        life.begin_training()
        self._train_later(task, life.steps)
        if exchange is not None and exchange.has_ended:
            self._train_later(task, life.steps_begun)
        elif exchange is not None:
            exchange.on_end = lambda _: self._train_later(task, life.steps_begun)
        return LATER

    def _train_later(self, task: Task, steps: int) -> None:
        """Train when the virtual time of so many steps is over, unless the client trains less than that."""
        self._network.later(task, self._lives[task.child].time_s(steps), partial(self._train_to, task, steps))

    def _train_to(self, task: Task, steps: int) -> None:
        train_s = self._lives[task.child].train_to(steps)
        self._world.budget.count(task.child)
        self._network.go_on(task, train_s)

    def _await(self, task: Task, step: Await) -> Any:
        exchange = step.handle
        if exchange.has_ended:
            return exchange.result
        exchange.on_end = lambda _: self._network.go_on(task, exchange.result)
        return LATER

    def _save(self, task: Task, _: Save) -> bool:
        self._checkpoints.save(task.child)
        return True

    def _look(self, _: Task, step: Look) -> tuple[tuple[int, Flat] | None, float]:
        node = self._world.nodes[step.path]
        is_there = self._world.incarnations[step.path] and node.version
        return (node.version, node.theta) if is_there else None, 0.0

    def _check_parent(self, task: Task, _: CheckParent) -> object:
        """Answer once the client would notice that its parent has been restarted, or once a paused one is to pull."""
        path, now_s = task.child, self._clock.now_s
        life = self._lives[path]
        self._staying[path] = task
        if not self._world.uplinks[path].knows_parent:
            self._network.later(task, now_s + NOTICED_S, partial(self.notice, path))
        elif self._world.clients[path].paused and life.follows:
            task.background = True
            at_s = math.nextafter(now_s + life.pace_s, math.inf)  # the life measures that no less time has passed
            self._network.later(task, at_s, partial(self._follow, task))
        return LATER

    def _follow(self, task: Task) -> None:
        """Have a paused client take its parent's model; for the last time if nothing else happens any more."""
        self._staying.pop(task.child)
        self._lives[task.child].follows = not self._clock.is_idle
        self._network.go_on(task, True)

    def _speed(self, spec: NodeSpec) -> float:
        pace = spec.settings.simulation
        if not pace.speed_spread:
            return pace.tokens_per_s
        seed: Any = derive(self._world.plan.config.seed, spec.path, "speed")
        return pace.tokens_per_s * math.exp(
            pace.speed_spread * np.random.Generator(np.random.PCG64(seed)).standard_normal()
        )
