"""A parent at a border that writes an audit trail and comes back from checkpoints, as an actor does, without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.borders import NodeAsParent
from worldlm_ray.aggregation.events import Note, Saved, Started
from worldlm_ray.aggregation.node import Node
from worldlm_ray.exchange.replies import Verdict
from worldlm_ray.records import VerdictRecord
from worldlm_ray.storage import checkpoint
from worldlm_ray.tracking.audit import AuditLog

CHECKPOINTS = "checkpoints"


class TrailedParent(NodeAsParent):
    """A node whose verdicts stand in the trail of a run.

    Args:
        node: new; it goes back to the newest checkpoint, if there is one.
        run_dir: of the run.
        every: updates between two checkpoints.
    """

    def __init__(self, node: Node, run_dir: Path, *, every: int = 1) -> None:
        super().__init__(node)
        self._place, self._every, self._since = run_dir / CHECKPOINTS, every, 0
        self.trail = AuditLog(run_dir, node.path)
        incarnation, found = checkpoint.claim(self._place), checkpoint.load(self._place)
        if found is not None:
            node.restore(*found)
        self.due = node.handle(Started(incarnation=incarnation))
        if incarnation > 1:
            self.trail.restored(now_s=0.0, incarnation=incarnation, last_seq=node.covers().seqs)

    async def push(self, sender: str, incarnation: int, to: int, header: bytes, values: Any) -> Verdict:
        verdict = await super().push(sender, incarnation, to, header, values)
        self._since += verdict.accepted
        if self._since >= self._every:
            self.save()
        return verdict

    def save(self) -> None:
        """Write a checkpoint."""
        self._since = 0
        checkpoint.save(self._place, *self.node.state(), incarnation=self.node.incarnation)
        self.node.handle(Saved(covered=self.node.covers()))

    def _take(self, method: str, event: Any) -> list[Any]:
        commands = super()._take(method, event)
        for command in commands:
            if isinstance(command, Note) and isinstance(command.record, VerdictRecord):
                self.trail.verdict(command.record)
        return commands
