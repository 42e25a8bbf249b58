"""Clients that share a process: one actor, and a handle for each of them that speaks like an actor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

HOST = "@"
"""Begins the last part of a host's name: no node is called so."""


@dataclass(frozen=True)
class _Method:
    """`handle.method.remote(...)` for one client of a host."""

    method: Any
    path: str

    def remote(self, *arguments: Any, **named: Any) -> Any:
        """Call the host for this client."""
        return self.method.remote(self.path, *arguments, **named)


@dataclass(frozen=True)
class Member:
    """Stands for the actor of a client that lives in a host."""

    host: Any
    path: str

    def __getattr__(self, name: str) -> _Method:
        return _Method(getattr(self.host, name), self.path)


def name_of(path: str) -> str:
    """Name of the host whose first client has this path."""
    parent, _, name = path.rpartition("/")
    return f"{parent}/{HOST}{name}"


def actor_of(client: Any) -> Any:
    """The actor behind a client's handle."""
    return client.host if isinstance(client, Member) else client
