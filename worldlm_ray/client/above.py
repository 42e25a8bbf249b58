"""Which models of the nodes above it a client measures during a run, and how often.

An inner node has no text. What its own model is worth is known from the clients below it: at the end of some of its
rounds a client takes the published model of a node above, measures it on its held-out text, and tells the result
(`OwnModelRecord`). It takes the nodes above in turn, the nearest first, and spends at most `SHARE` of its time so.
A client that keeps its losses private measures none.
"""

from __future__ import annotations

from worldlm_ray.plan.tree import parent_path

SHARE = 0.02
"""Of the time that a client trains and measures."""
FORWARD = 3.0
"""A training step takes as long as so many forward passes: where time is virtual, a measurement takes one."""


class Turns:
    """The turns of one client.

    Args:
        path: the client's.
        cost_s: what a measurement is expected to take; the last one's time, once there was one.
    """

    def __init__(self, path: str, *, cost_s: float = 0.0) -> None:
        self.above: list[str] = []
        """Paths of the nodes above, the one whose turn it is first."""
        while (parent := parent_path(path)) is not None:
            self.above.append(parent)
            path = parent
        self.cost_s, self.spent_s = cost_s, 0.0
        self._measured = False

    def expect(self, cost_s: float) -> None:
        """The client's own model took so long to measure: another one will take as long, as far as is known."""
        if not self._measured:
            self.cost_s = cost_s

    def due(self, busy_s: float) -> str | None:
        """The node whose model to measure now; None while that might take more than its share of the time.

        Args:
            busy_s: seconds that the client has spent training and measuring.
        """
        return self.above[0] if self.spent_s + self.cost_s <= SHARE * busy_s else None

    def done(self, spent_s: float, *, measured: bool) -> None:
        """It was the first node's turn.

        Args:
            spent_s: what it took of the client's time.
            measured: whether there was a model to measure.
        """
        self.above.append(self.above.pop(0))
        self.spent_s += spent_s
        if measured:
            self.cost_s, self._measured = spent_s, True
