"""Who takes part in a simulated world: clients that come late, that have no slot yet, and that leave."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from worldlm_ray.simulation.inner import InnerNodes
from worldlm_ray.simulation.world import World

if TYPE_CHECKING:
    from worldlm_ray.simulation.restarts import Restarts


class Members:
    """Lets clients join and leave.

    Args:
        world: the nodes.
        inner: the inner nodes.
    """

    def __init__(self, world: World, inner: InnerNodes) -> None:
        self._world, self._clock, self._inner = world, world.clock, inner
        self._too_late = False
        """Whether all clients that were there have ended, so that none comes any more."""
        self.restarts: Restarts
        """Starts clients; set by the simulation."""

    def is_member(self, path: str) -> bool:
        """Whether a client means to take part now."""
        return self._world.faults.is_member(path, self._clock.now_s)

    def has_parted(self, path: str) -> bool:
        """Whether a client is to leave."""
        return not self.is_member(path)

    def keep_away(self) -> None:
        """Mark clients that come late, and those for which a federation has no slot yet, as absent."""
        world = self._world
        for path in world.nodes:
            clients = world.clients_of(path)
            there = [client for client in clients if not world.faults.comes_late(client)]
            for client in set(clients) - set(there[: world.specs[path].max_clients]):
                world.absent[client] = world.incarnations[client] = 0

    def fill(self, parent: str) -> None:
        """Start clients whose time has come, as long as there are slots."""
        world = self._world
        clients, most = world.clients_of(parent), world.specs[parent].max_clients
        for client in clients:
            free = (math.inf if most is None else most) - sum(path not in world.absent for path in clients)
            if client in world.absent and free > 0 and not self._too_late and self.is_member(client):
                self.restarts.start(client, world.absent.pop(client) + 1)

    def has_left(self, path: str) -> None:
        """A client has left the run: there may be a slot for another one."""
        world = self._world
        world.absent[path], world.incarnations[path] = world.incarnations[path], 0
        self.fill(world.parent(path))
        self.end_if_all_have_ended()

    def end_if_all_have_ended(self) -> None:
        """Once all clients that are there have ended, those that have never come are not waited for."""
        world = self._world
        if not world.absent:
            return
        there = [path for path in world.clients if path not in world.absent]
        if all(path in world.final for path in there) and (there or any(world.absent.values())):
            self._too_late = True
            self._inner.give_up_optional_children()
