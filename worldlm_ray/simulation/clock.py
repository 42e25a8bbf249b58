"""Virtual time: what happens next, ordered by time and then by the order in which it was scheduled."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count


class Clock:
    """A queue of actions.

    Args:
        incarnations: of every node, by path; 0 while it is dead. What was scheduled for a node is dropped when it dies.
    """

    def __init__(self, incarnations: dict[str, int]) -> None:
        self.now_s = 0.0
        self.events = 0
        """Actions done so far."""
        self._incarnations = incarnations
        self._queue: list[tuple[float, int, bool, Callable[[], None]]] = []
        self._background = 0
        """Entries of the queue that do not keep the run going: heartbeats and looks at the clock."""
        self._order = count()

    def at(self, time_s: float, action: Callable[[], None], *, of: str | None = None, background: bool = False) -> None:
        """Schedule an action.

        Args:
            time_s: when; what has passed means now.
            action: what to do.
            of: the node that does it. It is dropped if the node has died by then, or has been restarted.
            background: whether the run may end without it.
        """
        if of is not None:
            action = self._unless_dead(of, action)
        self._background += background
        heapq.heappush(self._queue, (max(time_s, self.now_s), next(self._order), background, action))

    def after(
        self, delay_s: float, action: Callable[[], None], *, of: str | None = None, background: bool = False
    ) -> None:
        """Schedule an action so many seconds from now; see `at`."""
        self.at(self.now_s + delay_s, action, of=of, background=background)

    def _unless_dead(self, of: str, action: Callable[[], None]) -> Callable[[], None]:
        incarnation = self._incarnations[of]

        def act() -> None:
            if self._incarnations[of] == incarnation:
                action()

        return act

    def step(self) -> None:
        """Go on to the next action and do it."""
        self.now_s, _, background, action = heapq.heappop(self._queue)
        self._background -= background
        action()
        self.events += 1

    @property
    def is_empty(self) -> bool:
        """Whether nothing is scheduled."""
        return not self._queue

    @property
    def is_idle(self) -> bool:
        """Whether nothing but background actions is scheduled."""
        return len(self._queue) <= self._background
