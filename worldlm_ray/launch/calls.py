"""Calls of a run's actors: wait for an answer as long as the user does, and say plainly what went wrong."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.exceptions import ActorUnavailableError, ObjectLostError, RayError, RayTaskError

from worldlm_ray.errors import Interrupted, RunError, WorldLMError
from worldlm_ray.launch import cluster
from worldlm_ray.records import Record

T = TypeVar("T")

POLL_S = 0.5
"""How often is looked whether an answer has come, or the user wants to leave."""


def _nothing(_: Any) -> None:
    pass


@dataclass(frozen=True)
class Observer:
    """Who is told what while a run is driven, and whether the user wants to leave."""

    on_progress: Callable[[dict[str, Any]], None] = _nothing
    """About twice a second, with a snapshot of the run."""
    on_phase: Callable[[str], None] = _nothing
    """What begins, or what is being waited for."""
    on_step: Callable[[str], None] = _nothing
    """How far the phase has come."""
    on_warning: Callable[[str], None] = _nothing
    """What the user should know of."""
    should_stop: Callable[[], bool] = lambda: False
    """Whether the user wants to leave."""
    on_record: Callable[[Record], None] | None = None
    """What happened, as the recorder has heard of it."""

    def check(self) -> None:
        """Leave if the user wants to.

        Raises:
            Interrupted: so it is.
        """
        if self.should_stop():
            raise Interrupted("stopped")

    def answer(self, refs: Any) -> Any:
        """The value behind a reference, or the values behind several.

        While `ray.get` waits, of all that a signal's handler may raise it lets only Ctrl-C through.

        Raises:
            Interrupted: the user wants to leave.
        """
        waiting = refs if isinstance(refs, list) else [refs]
        while waiting:
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=POLL_S)
            if waiting:
                self.check()
        return ray.get(refs)

    def ask(self, actor: Any, method: str, *arguments: Any, **named: Any) -> Any:
        """The answer of an actor, once it is alive (again).

        Raises:
            Interrupted: the user wants to leave.
        """
        while True:
            try:
                return self.answer(getattr(actor, method).remote(*arguments, **named))
            except ActorUnavailableError:
                self.check()
                time.sleep(POLL_S)


def answer(refs: Any) -> Any:
    """As `Observer.answer`, whatever the user wants."""
    return Observer().answer(refs)


def ask(actor: Any, method: str, *arguments: Any, **named: Any) -> Any:
    """As `Observer.ask`, whatever the user wants."""
    return Observer().ask(actor, method, *arguments, **named)


def with_living_owners(read: Callable[[], T]) -> T:
    """What `read` gives; read again where an actor died after it had handed out its model and before that was read."""
    while True:
        try:
            return read()
        except RayError as error:
            cause = error.cause if isinstance(error, RayTaskError) else error
            if not isinstance(cause, ObjectLostError):
                raise


def plain(error: RayTaskError) -> WorldLMError:
    """The error that an actor raised, without Ray's wrapping."""
    cause = error.cause
    if isinstance(cause, WorldLMError):
        return cause
    return RunError(f"an actor failed: {type(cause).__name__}: {cluster.first_line(cause)}; {cluster.CURE}")
