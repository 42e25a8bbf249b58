"""Checkpoints of a simulated world, and nodes that are killed and come back from them."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import numpy as np

from worldlm_ray.aggregation.events import Saved, Started
from worldlm_ray.plan.faults import Fault
from worldlm_ray.simulation.network import NOTICED_S
from worldlm_ray.simulation.world import World
from worldlm_ray.tensors.buffers import Flat

if TYPE_CHECKING:
    from worldlm_ray.simulation.clients import Clients
    from worldlm_ray.simulation.inner import InnerNodes
    from worldlm_ray.simulation.members import Members

RESTART_S = 2.0
"""Virtual seconds until a killed node is back, unless its fault says otherwise."""

State = tuple[dict[str, Any], dict[str, Flat]]


class Checkpoints:
    """The newest checkpoint of every node. Where nothing can fail none is kept: it would never be read.

    Args:
        world: the nodes.
    """

    def __init__(self, world: World) -> None:
        self._world, self._clock = world, world.clock
        self._saved: dict[str, State] = {}
        self._refused_s: dict[str, float] = {}
        """Since when a node's storage refuses."""

    def save(self, path: str) -> None:
        """Save a node, unless its storage refuses."""
        world, now_s = self._world, self._clock.now_s
        if world.faults and world.faults.now(path, "disk", now_s):
            self._refused_s.setdefault(path, now_s)
            return
        self._refused_s.pop(path, None)
        if world.faults:
            meta, arrays = world.child(path).state()
            copies = {name: np.array(values) for name, values in arrays.items()}
            self._saved[path] = (json.loads(json.dumps(meta)), copies)
        if path in world.nodes:
            world.nodes[path].handle(Saved(covered=world.nodes[path].covers()))

    def refused_for_s(self, path: str) -> float:
        """For how long a node's storage has refused."""
        return self._clock.now_s - self._refused_s.get(path, self._clock.now_s)

    def newest(self, path: str) -> State | None:
        """A copy of a node's newest checkpoint; None if there is none."""
        return deepcopy(self._saved.get(path))


class Restarts:
    """Kills nodes and starts them again.

    Args:
        world: the nodes.
        checkpoints: what they come back from.
        inner: the inner nodes.
        clients: the clients.
        members: who is there.
    """

    def __init__(
        self, world: World, checkpoints: Checkpoints, inner: InnerNodes, clients: Clients, members: Members
    ) -> None:
        self._world, self._clock, self._checkpoints = world, world.clock, checkpoints
        self._inner, self._clients, self._members = inner, clients, members

    def kill(self, fault: Fault) -> None:
        """Kill a node, and start it again after a while."""
        world, path = self._world, fault.node
        incarnation = world.incarnations[path]
        if not incarnation:
            return
        world.incarnations[path] = 0
        self._inner.network.kill(path)
        if path in world.clients:
            self._clients.forget(path)
        self._inner.network.fail_calls_to(path)
        world.note(path, "killed")
        self._clock.after(fault.for_s or RESTART_S, lambda: self.start(path, incarnation + 1))

    def start(self, path: str, incarnation: int) -> None:
        """Start a node from its newest checkpoint, if there is one."""
        world, found = self._world, self._checkpoints.newest(path)
        world.incarnations[path] = incarnation
        world.final.discard(path)
        if path in world.clients:
            self._clients.make(path, incarnation, found)
        else:
            world.catching_up.add(path)
            self._start_node(path, incarnation, found)
        world.note(path, "continued" if incarnation > 1 else "started")
        if path in world.clients:
            self._clients.begin(path)
        elif world.has_never_joined(path):
            world.catching_up.discard(path)
        elif path != "world":
            self._inner.network.restart(path, self._inner.resume(path))

    def _start_node(self, path: str, incarnation: int, found: State | None) -> None:
        world = self._world
        node = world.start_node(path)
        if found is not None:
            node.restore(*found)
        self._inner.audit[path].restored(now_s=self._clock.now_s, incarnation=incarnation, last_seq=node.covers().seqs)
        for command in node.handle(Started(incarnation=incarnation)):
            self._inner.perform(path, command)
        for child in world.specs:
            # Children that wait for no answer find out by their heartbeat.
            if child != "world" and world.parent(child) == path and world.incarnations[child] and child in world.final:
                self._clock.after(NOTICED_S, lambda child=child: self._again(child), of=child)  # type: ignore[misc]
        self._members.end_if_all_have_ended()

    def _again(self, child: str) -> None:
        if child in self._world.clients:
            self._clients.notice(child)
        else:
            self._inner.network.restart(child, self._inner.resume(child))
