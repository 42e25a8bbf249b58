"""Where a run lives: in a file of its folder, so that other processes find its actors (`join`, `leave`, `--resume`).

The file says, too, which clients live in which pool. A pool that has died and is started again takes them from there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from worldlm_ray.storage import filesystem

FILE = "cluster.json"

Pools = dict[str, list[str]]
"""Paths of clients that live in one pool, by its name."""


def remember(run_dir: Path, place: dict[str, Any]) -> None:
    """Write down where a run lives.

    Args:
        run_dir: the run's folder.
        place: `address` of the cluster; `namespace` of the actors; `local`, whether the cluster ends with the process
            that started it; `anchor`, where run time stands; `began_s`, where it stood when this stretch of the run
            began; `pools`, as `Pools`.
    """
    filesystem.replace_text(run_dir / FILE, json.dumps(place))


def recall(run_dir: Path) -> dict[str, Any] | None:
    """Where a run lives or lived; None if it is not written down."""
    try:
        found = json.loads((run_dir / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and {"address", "namespace", "local", "anchor"} <= found.keys() else None


def forget(run_dir: Path) -> None:
    """The run lives no more."""
    (run_dir / FILE).unlink(missing_ok=True)


def pools(run_dir: Path) -> Pools:
    """The pools of a run, with those that hold no client now."""
    found: Pools = (recall(run_dir) or {}).get("pools", {})
    return found


def enter_pool(run_dir: Path, path: str, name: str) -> None:
    """A client lives in the pool of this name from now on."""

    def enter(pools: Pools) -> None:
        _take_out(pools, path)
        pools.setdefault(name, []).append(path)

    _change(run_dir, enter)


def leave_pools(run_dir: Path, paths: Iterable[str]) -> None:
    """Clients live in no pool any more; the pools stay."""

    def leave(pools: Pools) -> None:
        for path in paths:
            _take_out(pools, path)

    _change(run_dir, leave)


def end_pool(run_dir: Path, name: str) -> None:
    """A pool has ended."""
    _change(run_dir, lambda pools: pools.pop(name, None))


def _take_out(pools: Pools, path: str) -> None:
    for paths in pools.values():
        if path in paths:
            paths.remove(path)


def _change(run_dir: Path, change: Callable[[Pools], object]) -> None:
    """Change the pools of a run, unless it is not written down where it lives."""
    place = recall(run_dir)
    if place is not None:
        change(place.setdefault("pools", {}))
        remember(run_dir, place)
