"""The root of the tree as an actor."""

from __future__ import annotations

from actors.inner import InnerActor


class WorldActor(InnerActor):
    """The world: an inner node without a parent."""
