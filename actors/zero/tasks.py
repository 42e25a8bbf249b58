"""What a ZeRO client asks of its workers, and the queue where they fetch it. One task is under way at a time."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

from worldlm_ray.errors import RunError

LEAVE = -1
"""Number of the task that ends the loop."""
TRIES = 3
"""Groups of workers that may die one after the other without finishing a task."""
LOOK_S = 0.5

Group = tuple[str, str]
"""A group of workers: the token of the trainer that started it, and the group's own name."""


@dataclass(frozen=True)
class Task:
    """What the client asks of all its workers at once. Buffers are object references, in lists."""

    kind: str
    """A method of the worker's `_Tasks`."""
    args: tuple[Any, ...] = ()


class GroupLost(Exception):
    """The workers that were asked are gone; others take their place."""


class TaskQueue:
    """Where the workers of a client fetch tasks and leave results. Calls come on the actor's threads.

    Args:
        token: of the trainer: groups with another one belong to an earlier incarnation of the client.
        name: of the client, for messages.
    """

    def __init__(self, token: str, *, name: str = "a client") -> None:
        self._token, self._name = token, name
        self._changed = threading.Condition()
        self._group: Group | None = None
        self._workers = 0
        self._number = 0
        self._task: Task | None = None
        self._results: list[Any] = []
        """The task's, once it is done."""
        self._ended: str | None = None
        self._failed_starts: set[Group] = set()
        """Groups that have failed since one was ready."""
        self._tries = 1
        """How many may. What keeps the very first from starting would keep the next, too."""
        self.last_error = ""
        """What a worker said before it died."""

    # ---- the client's side -------------------------------------------------------------------------------------

    def wait_for_group(self, other_than: Group | None) -> tuple[Group, int]:
        """The group of workers that is at work, once it is not the given one, and its size.

        Raises:
            RunError: there will be none.
        """
        with self._changed:
            while self._group is None or self._group == other_than:
                if self._ended is not None:
                    raise RunError(self._ended)
                self._changed.wait(LOOK_S)
            return self._group, self._workers

    def ask(self, group: Group, task: Task) -> Any:
        """Have a group of workers perform a task.

        Raises:
            GroupLost: it has been replaced, or has said that it failed.
            RunError: Ray Train has given up.
        """
        with self._changed:
            self._check(group)
            self._number += 1
            self._task = task
            self._results.clear()
            self._changed.notify_all()
            while not self._results:
                self._changed.wait(LOOK_S)
                self._check(group)
            return self._results.pop()

    def _check(self, group: Group) -> None:
        if self._ended is not None:
            raise RunError(self._ended)
        if self._group != group:
            raise GroupLost

    def end(self, why: str) -> None:
        """Say that Ray Train's run is over."""
        with self._changed:
            self._ended = self._ended or why
            self._changed.notify_all()

    # ---- the workers' side -------------------------------------------------------------------------------------

    def started(self, group: Group, workers: int) -> None:
        """A group of workers is ready; one that was there before is no more."""
        with self._changed:
            if group[0] == self._token:
                self._group, self._workers, self._failed_starts, self._tries = group, workers, set(), TRIES
                self._task = None  # what the group before was asked is not for this one
                self._changed.notify_all()

    def next(self, group: Group, after: int, wait_s: float) -> int | None:
        """Number of the task after the given one; None if there is none yet, LEAVE for a group that was replaced."""
        deadline = time.monotonic() + wait_s
        with self._changed:
            while True:
                if group != self._group or self._ended is not None:
                    return LEAVE
                if self._number > after and self._task is not None:
                    return self._number
                left = deadline - time.monotonic()
                if left <= 0:
                    return None
                self._changed.wait(left)

    def task(self, group: Group, number: int) -> Task:
        """The task of that number."""
        with self._changed:
            if group != self._group or number != self._number or self._task is None:
                raise RunError(f"{self._name}: task {number} is no more; ask for the next one")
            return self._task

    def done(self, group: Group, number: int, result: Any) -> None:
        """A task is done."""
        with self._changed:
            if group == self._group and number == self._number and self._task is not None:
                self._task = None
                self._results.append(result)
                self._changed.notify_all()

    def failed(self, group: Group, error: str) -> None:
        """A worker failed, and its group with it."""
        with self._changed:
            if group[0] != self._token:
                return
            self.last_error = error
            if group == self._group:
                self._group = self._task = None
            else:
                self._failed_starts.add(group)
                if len(self._failed_starts) >= self._tries:
                    said = f"the workers of {self._name} cannot start: {error}; mend that and start again"
                    self._ended = self._ended or said
            self._changed.notify_all()
