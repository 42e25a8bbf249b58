"""What Ray offers inside itself only. It moves between minor versions: everything of that kind stands here.

Written for Ray 2.60, which the package asks for. Where another version lacks something, the run goes on without it.
"""

from __future__ import annotations

import functools
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray._private import services, state, utils, worker
from ray.core.generated import common_pb2, gcs_pb2


@contextmanager
def starting() -> Iterator[None]:
    """While Ray starts: it takes no signal handler of this process, and its processes get no signal of ours.

    A scheduler or `timeout` sends SIGTERM to the whole process group. The run needs Ray to write its checkpoints then,
    so Ray's processes have groups of their own. They still end with this process (PR_SET_PDEATHSIG).
    """
    popen, setter = services.ConsolePopen, utils.set_sigterm_handler
    services.ConsolePopen = functools.partial(popen, process_group=0)
    utils.set_sigterm_handler = lambda _: None
    try:
        yield
    finally:
        services.ConsolePopen, utils.set_sigterm_handler = popen, setter
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                # Ray's C++ code has put a handler that prints a stack below Python's: this puts ours in its place.
                handler = signal.getsignal(number)
                signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def silent() -> Iterator[None]:
    """While this process is connected: what Ray's daemons report does not appear on the terminal.

    It tells of actors that are started again, which is their ordinary life here; `deaths` says what matters.
    """
    printer = worker.print_to_stdstream
    worker.print_to_stdstream = lambda *_, **__: None
    try:
        yield
    finally:
        worker.print_to_stdstream = printer


@dataclass(frozen=True)
class Death:
    """A process of Ray's that has ended although it was not asked to."""

    ended_at_ms: int
    """Milliseconds since 1970."""
    is_memory: bool
    """Whether Ray's memory monitor has ended it."""
    detail: str
    """Ray's own words, several lines."""


@dataclass(frozen=True)
class ActorState:
    """What Ray's head knows of an actor."""

    state: str
    """`PENDING_CREATION`, `ALIVE`, `RESTARTING`, `DEAD` or `DEPENDENCIES_UNREADY`."""
    restarts: int


def deaths() -> list[Death]:
    """Worker processes of this cluster that were killed or have crashed, the oldest first; none if Ray does not say."""
    told = (common_pb2.WorkerExitType.SYSTEM_ERROR, common_pb2.WorkerExitType.NODE_OUT_OF_MEMORY)
    found = []
    for raw in _rows("get_worker_table"):
        row = gcs_pb2.WorkerTableData.FromString(raw)
        if not row.is_alive and row.exit_type in told:
            is_memory = row.exit_type == common_pb2.WorkerExitType.NODE_OUT_OF_MEMORY
            found.append(Death(row.end_time_ms, is_memory, row.exit_detail))
    return sorted(found, key=lambda death: death.ended_at_ms)


def actors(namespace: str) -> dict[str, ActorState]:
    """Named actors of a namespace; none if Ray does not say."""
    found = {}
    for raw in _rows("get_actor_table", None, None):
        row = gcs_pb2.ActorTableData.FromString(raw)
        if row.ray_namespace == namespace and row.name:
            name = gcs_pb2.ActorTableData.ActorState.Name(row.state)
            found[row.name] = ActorState(name, int(row.num_restarts))
    return found


def _rows(table: str, *arguments: Any) -> list[bytes]:
    with suppress(Exception):  # the head may be gone, or the table another one
        if ray.is_initialized():
            return list(getattr(state.state._connect_and_get_accessor(), table)(*arguments))
    return []
