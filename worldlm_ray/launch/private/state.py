"""What Ray's head knows: processes that died, and actors.

The public state API (`ray.util.state`) needs the dashboard, which a local run does not start.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray._private import state
from ray.core.generated import common_pb2, gcs_pb2


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
