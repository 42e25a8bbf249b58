"""What `worldlm dashboard` shows of a run, as JSON: made anew from the files of its folder, living or ended."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from worldlm_ray.errors import RunError
from worldlm_ray.reports import trail
from worldlm_ray.reports.liveness import liveness
from worldlm_ray.reports.tables import folded, left_of
from worldlm_ray.storage import filesystem
from worldlm_ray.tracking import curves
from worldlm_ray.tracking.audit import Proof
from worldlm_ray.tracking.charts import SHARED_LINES, Lines
from worldlm_ray.tracking.drawing import ATTENTION
from worldlm_ray.tracking.node_state import finite
from worldlm_ray.tracking.status import has_ended, read_status

EVERY_S = 2.0
"""Seconds between two looks of the page while the run lives."""
ENDED_EVERY_S = 20.0
"""The same of a run that has ended: it may be resumed."""
TIME_SHARE = 0.25
"""Largest fraction of the time that reading may take. The files of a long run are read less often."""
POINTS = 300
"""Points of a curve, about: a chart has no more pixels to tell them apart."""
EDGES = 64
"""Edges of the audit trail that are listed. Those with a loss come first."""
BLENDS = {"up": "children", "down": "parent"}
"""Whose key layers a node blends with its own, by the direction of an attention record."""
LOSS, MEAN = "loss", "clients_loss"
"""Names in metrics.jsonl: of a node's own model, and the mean of the clients below."""
_AWAY = {"lost", "left", "paused"}
_OF_A_NODE = (
    "kind",
    "version",
    "tokens",
    "tokens_per_s",
    "loss",
    "loss_version",
    "clients_loss",
    "private",
    "tau",
    "tau_mean",
    "epsilon",
    "accepted",
    "bytes_up",
    "bytes_down",
    "state",
    "state_detail",
    "diverged",
)
_OF_A_BORDER = ("mbit_up", "mbit_down", "offline_s")
_OF_A_RUN = (
    "now_s",
    "progress",
    "budget",
    "tokens",
    "tokens_per_s",
    "accepted",
    "refused",
    "bytes_up",
    "bytes_down",
    "warnings",
    "trouble",
)


class Dashboard:
    """The content of the page, for any number of readers.

    Args:
        run_dir: folder of the run.
        clock: monotonic seconds; it only paces reading.
    """

    def __init__(self, run_dir: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._run_dir, self._clock = run_dir, clock
        self._lock = threading.Lock()
        self._made, self._next = b"", 0.0

    def json(self) -> bytes:
        """What `look` gives, as UTF-8 in which no `<` stands. One reading serves all who ask meanwhile."""
        with self._lock:
            began = self._clock()
            if not self._made or began >= self._next:
                text = json.dumps(look(self._run_dir), allow_nan=False, separators=(",", ":"))
                self._made = text.replace("<", "\\u003c").encode()
                ended = self._clock()
                self._next = ended + max(EVERY_S / 2, (ended - began) / TIME_SHARE)
            return self._made


def look(run_dir: Path) -> dict[str, Any]:
    """What the files of a run say now.

    Args:
        run_dir: folder of the run.

    Returns:
        run, said: its name, and a line on whether it lives; every_s: when to look again; nodes: a row each in the order
        of the tree; curves: of losses; attention: the newest weights; audit: counts by edge. Where the run has no
        status, `error` says why instead.
    """
    about = {"run": run_dir.name, "every_s": EVERY_S}
    try:
        with filesystem.refusals(run_dir):
            status = read_status(run_dir)
            ended = has_ended(run_dir, status)
            found = {
                **about,
                **{name: status.get(name) for name in _OF_A_RUN},
                "every_s": ENDED_EVERY_S if ended else EVERY_S,
                "ended": ended,
                "said": liveness(run_dir, status),
                "left": left_of(status),
                "nodes": list(_rows(status["nodes"])),
                **_curves(run_dir, status["nodes"]),
                "audit": _audit(run_dir),
            }
    except (RunError, OSError) as error:
        return {**about, "error": str(error)}
    return dict(finite(found))


def _rows(nodes: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row for each node; many siblings of a kind are one row, as in the table of `worldlm status`."""
    for path, node in folded(nodes):
        row = {name: node.get(name) for name in _OF_A_NODE}
        border = node.get("border") or {}
        yield {
            **row,
            **{name: border.get(name) for name in _OF_A_BORDER},
            "path": path,
            "name": path.rpartition("/")[2],
            "depth": path.count("/"),
            "refused": sum(node["refused"].values()),
            "away": _is_away(node),
        }


def _is_away(node: Mapping[str, Any]) -> bool:
    """Whether a node takes no part for now; one that waits with a reason does not hear its parent."""
    waits = node.get("state") == "waiting" and bool(node.get("state_detail"))
    return waits or node.get("state") in _AWAY or bool((node.get("border") or {}).get("offline_s"))


def _curves(run_dir: Path, nodes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Curves of losses, of the nodes that have a line in TensorBoard, too, and the newest attention weights.

    Returns:
        `curves`, each with its node, kind and name, and `points`: run time in seconds, tokens, nats per byte.
        `attention` by node and `of`, whose key layers it weighs: the mean weight by name, the largest first.
    """
    kinds = {path: str(node["kind"]) for path, node in nodes.items()}
    lines = Lines(kinds)
    points: dict[tuple[str, str], list[tuple[float, int, float]]] = {}
    blends: dict[tuple[str, str], tuple[float, dict[str, float]]] = {}
    for line in curves.read(run_dir):
        node, name, value = line["node"], line["name"], line["value"]
        if name in (LOSS, MEAN) and value is not None and (node in lines or node in SHARED_LINES):
            points.setdefault((node, name), []).append((line["now_s"], line["tokens"], value))
        elif name.startswith(f"{ATTENTION}/") and value is not None and node in lines:
            _, direction, candidate = name.split("/", 2)
            if blends.get((node, direction), (None,))[0] != line["now_s"]:
                blends[node, direction] = line["now_s"], {}
            blends[node, direction][1][candidate] = value
    order = {path: number for number, path in enumerate((*kinds, *SHARED_LINES))}
    shown = [
        {"node": node, "kind": kinds.get(node, "client"), "name": name, "points": _thinned(points[node, name])}
        for node, name in sorted(points, key=lambda each: (order[each[0]], each[1]))
        if kinds.get(node) != "client" or name == LOSS
    ]
    attention = [
        {"node": node, "of": BLENDS.get(direction, direction), "weights": blends[node, direction][1]}
        for node, direction in sorted(blends, key=lambda each: (order[each[0]], each[1]))
    ]
    return {"curves": shown, "attention": attention}


def _thinned(points: list[tuple[float, int, float]]) -> list[tuple[float, int, float]]:
    """Evenly spaced points of a curve, with its first and its last one."""
    step = -(-len(points) // POINTS)
    kept = points[::step]
    return kept if kept[-1] is points[-1] else [*kept, points[-1]]


def _audit(run_dir: Path) -> dict[str, Any]:
    """What `worldlm audit` says: the conclusion, and counts by edge."""
    found = trail.look(run_dir)
    listed = sorted(found.proofs, key=lambda proof: proof.holds)
    return {
        "holds": found.holds,
        "conclusion": found.conclusion(run_dir),
        "applied": sum(len(proof.applied) for proof in found.proofs),
        "refused": sum(proof.refused for proof in found.proofs),
        "edges": [_counts(proof) for proof in listed[:EDGES]],
        "left_out": max(len(listed) - EDGES, 0),
    }


def _counts(proof: Proof) -> dict[str, Any]:
    return {
        "sender": proof.sender,
        "node": proof.node,
        "applied": len(proof.applied),
        "again": proof.again,
        "refused": proof.refused,
        "lost": len(proof.lost),
        "twice": len(proof.twice),
        "holds": proof.holds,
    }
