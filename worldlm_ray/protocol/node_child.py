"""An inner node as the child of its parent."""

from __future__ import annotations

from worldlm_ray.aggregation.events import Answered, Welcomed
from worldlm_ray.aggregation.node import Node
from worldlm_ray.exchange.outbox import KeptUpdates
from worldlm_ray.exchange.replies import Verdict, Welcome


class NodeAsChild:
    """What the parent answers becomes events of the node's state machine.

    Args:
        node: a node with a parent.
    """

    def __init__(self, node: Node) -> None:
        self._node = node

    @property
    def incarnation(self) -> int:
        """How often the node has been started."""
        return self._node.incarnation

    @property
    def seq(self) -> int:
        """Of its newest update."""
        return self._node.seq

    @property
    def outbox(self) -> KeptUpdates:
        """What the parent might still lose."""
        return self._node.outbox

    @property
    def started_tokens(self) -> int:
        """Tokens of all local rounds begun below."""
        return self._node.started_tokens

    def welcomed(self, welcome: Welcome) -> None:
        """The parent is there, perhaps again."""
        self._node.handle(Welcomed(welcome=welcome))

    def answered(self, seq: int, verdict: Verdict) -> None:
        """The parent has judged an update."""
        self._node.handle(Answered(seq=seq, verdict=verdict))
