"""Clients that share a process: one actor, and a handle for each of them that speaks like an actor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from worldlm_ray.plan.tree import NodeSpec, may_share, parent_path

POOL = "@"
"""Begins the last part of a pool's name: no node is called so."""


@dataclass(frozen=True)
class _Method:
    """`handle.method.remote(...)` for one client of a pool."""

    method: Any
    path: str

    def remote(self, *arguments: Any, **named: Any) -> Any:
        """Call the pool for this client."""
        return self.method.remote(self.path, *arguments, **named)


@dataclass
class Pool:
    """A pool as the launcher knows it."""

    name: str
    actor: Any
    like: NodeSpec | None
    """A client that lives here, or has: all others are siblings that train alike. None if none is known."""
    paths: list[str] = field(default_factory=list)
    """Of the clients that live here."""

    def has_room_for(self, spec: NodeSpec) -> bool:
        """Whether a client more may live here."""
        if self.like is None or len(self.paths) >= spec.settings.resources.clients_per_process:
            return False
        return parent_path(self.like.path) == parent_path(spec.path) and may_share(self.like, spec)


@dataclass(frozen=True)
class Member:
    """Stands for the actor of a client that lives in a pool."""

    pool: Pool
    path: str

    def __getattr__(self, name: str) -> _Method:
        return _Method(getattr(self.pool.actor, name), self.path)


def name_of(path: str) -> str:
    """Name of the pool whose first client has this path."""
    parent, _, name = path.rpartition("/")
    return f"{parent}/{POOL}{name}"


def actor_of(client: Any) -> Any:
    """The actor behind a client's handle."""
    return client.pool.actor if isinstance(client, Member) else client
