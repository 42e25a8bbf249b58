"""Checks that the content of a status.json is the status of a run, before tables are made of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from worldlm_ray.tracking.node_state import KINDS


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _count(value: Any) -> bool:
    return type(value) is int


def _or_none(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _counts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_count, value.values()))


_OF_A_RUN: dict[str, Callable[[Any], bool]] = {
    "progress": _number,
    "now_s": _number,
    "tokens": _number,
    "budget": _or_none(lambda value: isinstance(value, dict) and all(map(_or_none(_number), value.values()))),
    "warnings": lambda value: isinstance(value, list),
    "warnings_left_out": _count,
}
_OF_A_NODE: dict[str, Callable[[Any], bool]] = {
    "kind": lambda value: value in KINDS,
    "version": _count,
    "tokens": _number,
    "tokens_per_s": _number,
    "tau": _or_none(_count),
    "loss": _or_none(_number),
    "perplexity": _or_none(_number),
    "busy_fraction": _number,
    "accepted": _count,
    "refused": _counts,
}
"""Fields of every node that the table of a run needs."""
_MAY_MISS = dict.fromkeys(("tau_mean", "loss_start", "clients_loss", "clients_perplexity"), _or_none(_number))


def wrong_field(status: Mapping[str, Any]) -> str:
    """The first unusable field of a status, with what is wrong; empty if there is none."""
    nodes = status.get("nodes")
    if not isinstance(nodes, dict) or not nodes:
        return _told("nodes", status)
    for name, check in _OF_A_RUN.items():
        if name in status and not check(status[name]):
            return _told(name, status)
    for path, node in nodes.items():
        if not isinstance(node, dict):
            return _told(path, nodes, "nodes.")
        if "/" in path and path.rpartition("/")[0] not in nodes:
            return f"nodes.{path} has no parent"
        for name, check in (_OF_A_NODE | _MAY_MISS).items():
            if not (name in node and check(node[name])) and not (name in _MAY_MISS and name not in node):
                return _told(name, node, f"nodes.{path}.")
    return ""


def _told(name: str, values: Mapping[str, Any], place: str = "") -> str:
    if name not in values:
        return f"{place}{name} is missing"
    shown = repr(values[name])
    return f"{place}{name} is {shown if len(shown) <= 40 else shown[:40] + '...'}"
