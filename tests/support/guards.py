"""A member's guarded link on the loopback, and what its operator is told."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from support.borders import ALIKE, Border, NodeAsParent, a_border
from support.nodes import a_node
from worldlm_ray.gateway import policy
from worldlm_ray.gateway.guard import Guard
from worldlm_ray.gateway.guarded import GuardedLink
from worldlm_ray.plan.plan import Plan


def write(folder: Path, **sections: Any) -> Path:
    """Write a policy into a folder."""
    path = folder / policy.FILE
    path.write_text(yaml.safe_dump(sections))
    return path


@dataclass
class Guarded:
    """A border, and a member behind its policy."""

    border: Border
    guard: Guard
    parent: GuardedLink
    told: list[tuple[str, str]] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """Of the profile."""
        return self.border.member().folder


@asynccontextmanager
async def guarded(tmp_path: Path, plan: Plan, initial: Any, **sections: Any) -> AsyncIterator[Guarded]:
    """A member of a world on the loopback.

    Args:
        tmp_path: for everything.
        plan: of the member's run; a client `a` of the world stands for it.
        initial: the world's model.
        sections: of the member's policy.
    """
    parent = NodeAsParent(a_node(layout=plan.layout, initial=initial, children=("a", "b")))
    async with a_border(tmp_path, parent, plan.layout) as border:
        profile, told = border.member(), list[tuple[str, str]]()
        write(profile.folder, **sections)
        guard = Guard(profile, plan, ALIKE)
        link = GuardedLink(
            border.link(check_charter=guard.meet), guard, tell=lambda event, text: told.append((event, text))
        )
        try:
            yield Guarded(border, guard, link, told)
        finally:
            await link.close()
