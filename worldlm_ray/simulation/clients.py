"""Clients of a simulated world: when they pull, train, push, measure and end.

Training is real, and takes the virtual time of its tokens. Where a client trains while it exchanges
(`exchange.overlap`), the virtual time at which the parent's model arrives says after how many steps it is merged.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np

from worldlm_ray.aggregation.events import Done, Left
from worldlm_ray.client.above import FORWARD, Turns
from worldlm_ray.exchange.messages import Model, Update
from worldlm_ray.plan.tree import NodeSpec
from worldlm_ray.protocol.child import Steps
from worldlm_ray.seeds import derive
from worldlm_ray.simulation.inner import InnerNodes
from worldlm_ray.simulation.members import Members
from worldlm_ray.simulation.restarts import Checkpoints, State
from worldlm_ray.simulation.world import World


class Budget:
    """A budget in tokens, spent to the round, however late the world would hear of it.

    Here all tokens are known at once. On Ray the world counts them, from what its children tell in their exchanges,
    and overshoots by what is begun meanwhile: asynchronous methods that exchange seldom would train most.

    Args:
        world: the nodes.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._tokens = world.plan.config.budget.tokens
        self._begun_by = dict.fromkeys(world.clients, 0)
        self._begun = 0
        """Tokens of all rounds that clients have begun."""
        self.under_way = 0
        """Tokens of the rounds that are being trained."""

    def count(self, path: str) -> None:
        """A client's rounds have changed."""
        client = self._world.clients[path]
        tokens = client.begun * client.round_tokens
        self._begun += tokens - self._begun_by[path]
        self._begun_by[path] = tokens

    @property
    def is_spent(self) -> bool:
        """Whether the budget holds no more rounds, as far as that is settled here."""
        return self._tokens is not None and self._is_settled_here and self._begun >= self._tokens

    def apply(self, model: Model) -> Model:
        """A model as its receiver reads it."""
        if self._tokens is None or not self._is_settled_here:
            return model
        progress = max(model.progress, min((self._begun - self.under_way) / self._tokens, 1.0))
        return replace(model, progress=progress, finished=model.finished or self.is_spent)

    @property
    def _is_settled_here(self) -> bool:
        return not self._world.nodes["world"].synchronous  # synchronous children all hear the same


class Clients:
    """The clients' rounds.

    Args:
        world: the nodes.
        inner: the inner nodes.
        members: who takes part.
        checkpoints: where clients are saved.
    """

    def __init__(self, world: World, inner: InnerNodes, members: Members, checkpoints: Checkpoints) -> None:
        self._world, self._clock, self._inner, self._network = world, world.clock, inner, inner.network
        self._members, self._checkpoints, self._budget = members, checkpoints, Budget(world)
        self.speeds = {spec.path: self._speed(spec) for spec in world.plan.root.clients}
        """Tokens per second of every client."""
        self._busy_s = dict.fromkeys(world.clients, 0.0)
        self._turns: dict[str, Turns] = {}
        """Of clients that have measured a node above them."""
        self._training: set[str] = set()
        self._begun_s: dict[str, float] = {}
        """When a client's round under way began."""
        self._complete: set[str] = set()
        """Clients that have ended a round before the exchange of the one before has come back."""
        self._merging: set[str] = set()
        """Clients that have the parent's model and merge it after the step that is under way."""
        self._last: set[str] = set()
        """Clients that know that the round under way is the last."""
        self._rounds = dict.fromkeys(world.clients, 0)
        """Rounds begun by a client, those that were given up included."""
        self._pauses: dict[str, int] = {}
        """How often a client has paused."""
        for path in world.clients:
            self._count_on_join(path)

    # ---- starting and stopping -------------------------------------------------------------------------------------

    def begin(self, path: str) -> None:
        """A client's first round."""
        self.introduce(path)
        self._network.start(path, self._pull(path))

    def introduce(self, path: str) -> None:
        """Record what there is to say of a client before its first round."""
        client = self._world.clients[path]
        for text in client.left_out:
            self._world.warn(path, text)
        if client.left_out:
            self._world.note(path, "training")
        self._world.record(client.start_record(now_s=self._clock.now_s))
        if client.warning:
            self._world.warn(path, client.warning)

    def start(self, path: str, incarnation: int, found: State | None) -> None:
        """Make a client anew, from a checkpoint if there is one."""
        world = self._world
        client = world.clients[path] = world.make_client(path, dataset=world.clients[path].dataset)
        client.incarnation = incarnation
        if found is not None:
            client.restore(*found)
        world.connect(path)
        self._count_on_join(path)
        self._budget.count(path)

    def forget(self, path: str) -> None:
        """A client was killed: its round is lost."""
        self._end_training(path)
        for of_clients in (self._complete, self._merging, self._last):
            of_clients.discard(path)

    def _count_on_join(self, path: str) -> None:
        self._world.uplinks[path].on_join = lambda: self._budget.count(path)

    # ---- what a child says -----------------------------------------------------------------------------------------

    def resume(self, path: str) -> Steps[None]:
        """A child joins its parent again, after a restart of either, and goes on from there."""
        world = self._world
        world.catching_up.add(path)
        yield from world.uplinks[path].join()
        world.catching_up.discard(path)
        final = world.final.get(path)
        if final is Left:
            yield from self._members.leave(path)
        elif final is Done:
            yield from self._finish(path) if path in world.clients else self._inner.finish(path)
        elif path in world.clients:
            client = world.clients[path]
            if not client.began or (client.in_flight is not None and path not in self._merging):
                yield from self._pull(path)
        else:
            node = world.nodes[path]
            if node.wants_refresh or node.is_sent:
                yield from self._inner.pull(path)

    def _pull(self, path: str) -> Steps[None]:
        """Fetch the parent's model and go on with it, unless the client leaves or has ended."""
        client = self._world.clients[path]
        if not client.began and not self._members.is_member(path):
            yield from self._members.leave(path)
        elif not client.began and (client.is_done or path in self._last):
            yield from self._finish(path)
        else:
            model = yield from self._world.uplinks[path].pull()
            assert isinstance(model, Model), "nothing damages a simulated model"
            self._receive(path, self._budget.apply(model))

    def _push(self, path: str, update: Update) -> Steps[None]:
        yield from self._world.uplinks[path].push(update)
        yield from self._pull(path)

    def _finish(self, path: str) -> Steps[None]:
        """A client's final message."""
        world, client = self._world, self._world.clients[path]
        client.paused = client.may_pause
        if client.serves and not client.paused:
            client.serve((yield from world.uplinks[path].pull()), now_s=self._clock.now_s)
        world.final[path] = Done
        world.note(path, "paused" if client.paused else "finished", client.last_word)
        self._members.end_if_all_have_ended()
        if client.paused:
            number = self._pauses[path] = self._pauses.get(path, 0) + 1
            self._follow_later(path, number)
        yield from world.uplinks[path].done()

    def _follow_later(self, path: str, number: int) -> None:
        self._clock.after(self._round_s(path), lambda: self._follow(path, number), of=path, background=True)

    def _follow(self, path: str, number: int) -> None:
        if self._pauses[path] == number:  # else it has sent its final message again since, and goes on from there
            self._network.start(path, self._follow_once(path, number, is_last=self._clock.is_idle), background=True)

    def _follow_once(self, path: str, number: int, *, is_last: bool) -> Steps[None]:
        """A paused client takes its parent's model, about as often as it did while it trained, until the run ends."""
        uplink, client = self._world.uplinks[path], self._world.clients[path]
        joins = uplink.joins
        model = yield from uplink.pull()
        for record in client.follow(model, now_s=self._clock.now_s):
            self._world.record(record)
        if uplink.joins != joins:  # the parent must hear again that the client has ended
            yield from uplink.done()
        if not is_last:
            self._follow_later(path, number)

    # ---- a round ---------------------------------------------------------------------------------------------------

    def _receive(self, path: str, model: Model) -> None:
        if self._world.clients[path].began:
            self._merge_after_step(path, model)
        else:
            self._begin(path, model)

    def _begin(self, path: str, model: Model) -> None:
        client = self._world.clients[path]
        records = [] if model.finished else client.begin(model, now_s=self._clock.now_s)
        if not client.began:
            self._network.start(path, self._finish(path))
            return
        for record in records:
            self._world.record(record)
        self._train(path)

    def _train(self, path: str) -> None:
        """Let a round that has begun take its time. When within it the training is done makes no difference."""
        client = self._world.clients[path]
        if not client.overlaps:
            client.train()
        self._budget.count(path)
        self._rounds[path] += 1
        self._training.add(path)
        self._budget.under_way += client.round_tokens
        self._begun_s[path], number = self._clock.now_s, self._rounds[path]
        train_s = self._round_s(path)
        self._busy_s[path] += train_s
        self._clock.after(train_s, lambda: self._end_round(path, train_s, number), of=path)

    def _end_round(self, path: str, train_s: float, number: int) -> None:
        client, now_s = self._world.clients[path], self._clock.now_s
        if number != self._rounds[path]:
            return
        if client.overlaps and not client.is_whole:
            client.train()
        self._end_training(path)
        measure = client.measure(self._world.plan.config.evaluation.tokens) if client.measure_is_due else None
        busy = self._busy_s[path] / now_s
        self._world.record(client.round_record(now_s=now_s, train_s=train_s, busy_fraction=busy, measure=measure))
        self._measure_above(path)
        if client.in_flight is not None:
            self._complete.add(path)  # the exchange under way has to come back first
        else:
            self._send_round(path)

    def _send_round(self, path: str) -> None:
        update = self._world.clients[path].update()
        self._checkpoints.save_if_due(path)
        self._begin_ahead(path)
        self._network.start(path, self._push(path, update))

    def _begin_ahead(self, path: str) -> None:
        """Begin the next round before the exchange of the last one has come back, unless that was the last."""
        client = self._world.clients[path]
        stays = not client.is_done and path not in self._last and self._members.is_member(path)
        if client.overlaps and stays and not self._budget.is_spent:
            client.begin_ahead()
            if client.began:
                self._train(path)

    def _merge_after_step(self, path: str, model: Model) -> None:
        """An exchange has come back in the middle of a round: the model is merged when the step under way is done."""
        client = self._world.clients[path]
        if client.in_flight is None or path in self._merging:
            return  # it has come back twice
        if client.is_whole:
            self._merge(path, model)
            return
        steps, since_s = client.training.local_steps, self._clock.now_s - self._begun_s[path]
        step_s = self._round_s(path) / steps
        done = min(math.ceil(since_s / step_s - 1e-9), steps)
        end_s = self._begun_s[path] + (self._round_s(path) if done == steps else done * step_s)
        self._merging.add(path)
        self._clock.at(end_s, lambda: self._merge(path, model, steps=done), of=path)

    def _merge(self, path: str, model: Model, *, steps: int = 0) -> None:
        client = self._world.clients[path]
        self._merging.discard(path)
        ahead = count(client.step)
        if client.step < steps:
            client.train(lambda: next(ahead) >= steps)
        for record in client.merge(model, now_s=self._clock.now_s):
            self._world.record(record)
        if model.finished:
            self._last.add(path)
        is_complete = path in self._complete
        self._complete.discard(path)
        if not client.began:
            self._give_up(path)
        elif is_complete:
            self._send_round(path)

    def _give_up(self, path: str) -> None:
        """A client has dropped the round under way with its diverged model: it asks for another one."""
        if path in self._training:
            self._end_training(path)
            self._busy_s[path] -= self._begun_s[path] + self._round_s(path) - self._clock.now_s
        self._budget.count(path)
        self._rounds[path] += 1  # the end that is scheduled for it comes too late
        self._network.start(path, self._pull(path))

    def _end_training(self, path: str) -> None:
        if path in self._training:
            self._training.discard(path)
            self._budget.under_way -= self._world.clients[path].round_tokens

    def _measure_above(self, path: str) -> None:
        """Let a client measure a node above it when that is due. Like every measurement it takes no virtual time."""
        world, client = self._world, self._world.clients[path]
        if not client.measure_is_due:
            return
        cost_s = world.plan.config.evaluation.tokens / (FORWARD * self.speeds[path])
        turns = self._turns.setdefault(path, Turns(path, cost_s=cost_s))
        above = turns.due(self._busy_s[path])
        if above is None:
            return
        node = world.nodes[above]
        measured = bool(world.incarnations[above] and node.version)
        if measured:
            now_s = self._clock.now_s
            world.record(client.measure_above(above, node.theta, version=node.version, now_s=now_s))
        turns.done(cost_s if measured else 0.0, measured=measured)

    def _round_s(self, path: str) -> float:
        tokens: int = self._world.clients[path].round_tokens
        return tokens / self.speeds[path]

    def _speed(self, spec: NodeSpec) -> float:
        pace = spec.settings.simulation
        if not pace.speed_spread:
            return pace.tokens_per_s
        seed: Any = derive(self._world.plan.config.seed, spec.path, "speed")
        return pace.tokens_per_s * math.exp(
            pace.speed_spread * np.random.Generator(np.random.PCG64(seed)).standard_normal()
        )
