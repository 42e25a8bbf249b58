"""Inner nodes of a simulated world: what they command is carried out here."""

from __future__ import annotations

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
    Note,
    ParentModel,
    Refresh,
    Save,
    Serve,
    UpdateDue,
    UpdateSent,
    Wake,
)
from worldlm_ray.exchange.messages import Update
from worldlm_ray.exchange.replies import Verdict, Welcome
from worldlm_ray.protocol.child import Steps
from worldlm_ray.records import VerdictRecord
from worldlm_ray.simulation.cost_model import CostPlan
from worldlm_ray.simulation.network import FaultyNetwork, Network
from worldlm_ray.simulation.restarts import Checkpoints
from worldlm_ray.simulation.world import World
from worldlm_ray.storage.checkpoint import STORAGE_AGAIN_S
from worldlm_ray.tracking.audit import AuditLog

AUDIT_EVERY_S = 2.0
"""Without training, wall seconds between two writes of the audit trail."""


class InnerNodes:
    """The world's aggregator and all federations.

    Args:
        world: the nodes.
        checkpoints: where nodes are saved.
    """

    def __init__(self, world: World, checkpoints: Checkpoints) -> None:
        self._world, self._clock, self._checkpoints = world, world.clock, checkpoints
        self.network = (FaultyNetwork if world.faults else Network)(world, self.take)
        every_s = AUDIT_EVERY_S if isinstance(world.plan, CostPlan) else 0.0
        self.audit = {path: AuditLog(world.plan.run_dir, path, every_s=every_s) for path in world.nodes}

    def take(self, path: str, event: Event) -> Verdict | Welcome | None:
        """Let a node handle an event; returns what it answers to a push or to a child that joins."""
        world = self._world
        reply: Verdict | Welcome | None = None
        for command in world.nodes[path].handle(event):
            if isinstance(command, Answer):
                reply = command.verdict
            elif isinstance(command, Admit):
                reply = command.welcome
            else:
                self.perform(path, command)
        if path in world.final and not world.nodes[path].ended and world.incarnations[path]:
            world.final.discard(path)  # a client below has come back: so does the federation
            self.network.restart(path, self.resume(path))
        return reply

    def perform(self, path: str, command: Command) -> None:
        """Carry out what a node commands."""
        world, node = self._world, self._world.nodes[path]
        if isinstance(command, Note):
            if isinstance(command.record, VerdictRecord):
                self.audit[path].verdict(command.record)
            world.record(command.record)
        elif isinstance(command, Charge):
            ledgers = world.contributions[path]
            assert ledgers is not None
            ledgers.charge(command.child)
        elif isinstance(command, Serve):
            self.network.serve(f"{path}/{command.child}", command.model)
        elif isinstance(command, Save):
            self._checkpoints.save(path)
        elif isinstance(command, Exchange):
            node.handle(UpdateDue())
            self._send_once_known(path)
        elif isinstance(command, Refresh):
            if path not in world.catching_up:  # which asks for it, too
                self.network.start(path, self.resume(path))
        elif isinstance(command, Wake):
            self._clock.at(command.at_s, lambda: self._wake(path), of=path)
        elif isinstance(command, Finish):
            world.note(path, "finished", version=node.version)
            if path != "world":
                self.network.start(path, world.uplinks[path].done())

    def _wake(self, path: str) -> None:
        self.take(path, Clock(now_s=self._clock.now_s))

    def look_at_the_clock(self) -> None:
        """Let every node see which child has been silent for too long."""
        for path in self._world.nodes:
            if self._world.incarnations[path]:
                self._wake(path)

    def give_up_optional_children(self) -> None:
        """No child that has not joined will come any more: no node waits for one."""
        for path, node in self._world.nodes.items():
            optional = [name for name, child in node.children.items() if child.status is Status.EXPECTED]
            for name in optional if self._world.incarnations[path] else ():
                self.take(path, Done(child=name, to=node.incarnation, now_s=self._clock.now_s))

    def flush(self) -> None:
        """Write the audit trails to disk."""
        for trail in self.audit.values():
            trail.flush()

    # ---- a federation's link to its parent -------------------------------------------------------------------------

    def resume(self, path: str) -> Steps[None]:
        """A federation joins its parent again, after a restart of either, and goes on from there."""
        world, node = self._world, self._world.nodes[path]
        world.catching_up.add(path)
        yield from world.uplinks[path].join()
        world.catching_up.discard(path)
        if path in world.final:
            yield from world.uplinks[path].done()
        elif node.wants_refresh or node.is_sent:
            yield from self.pull(path)

    def pull(self, path: str) -> Steps[None]:
        """Fetch the parent's model for a federation."""
        model = yield from self._world.uplinks[path].pull()
        self.take(path, ParentModel(model=model, now_s=self._clock.now_s))

    def _exchange(self, path: str, update: Update) -> Steps[None]:
        yield from self._world.uplinks[path].push(update)
        yield from self.pull(path)

    def _send_once_known(self, path: str) -> None:
        """Send a federation's update once a checkpoint knows it, or once the storage has refused for too long."""
        world, node = self._world, self._world.nodes[path]
        patience_s = world.plan.config.checkpoint.patience_s
        if world.faults and not node.may_send:
            self._checkpoints.save(path)
        known = node.may_send or not world.faults  # where nothing can fail, no checkpoint is needed
        if known or (patience_s is not None and self._checkpoints.refused_for_s(path) >= patience_s):
            update = node.in_flight
            assert update is not None, "an exchange has begun"
            node.handle(UpdateSent())
            if path not in world.catching_up:  # which sends it, too
                self.network.start(path, self._exchange(path, update))
            return
        self._clock.after(STORAGE_AGAIN_S, lambda: self._send_once_known(path), of=path)
