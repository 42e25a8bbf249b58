"""summary.json: the result of a finished run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from worldlm_ray.plan.rundir import SUMMARY
from worldlm_ray.records import NodeSummary
from worldlm_ray.tracking.node_state import finite
from worldlm_ray.tracking.status import replace_json


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What summary.json says of a run."""

    run: str
    """Name of the run."""
    method: str
    """Name of the method, such as `worldlm` or `fedavg`."""
    seed: int
    """The run's seed."""
    wall_s: float
    """Seconds from start to end; virtual in simulation."""
    tokens: int
    """Trained by all clients together."""
    params_sha256: str | None
    """Fingerprint of the world's final parameters; None where nothing was trained."""
    nodes: Mapping[str, NodeSummary]
    """By path, in the order to be shown."""
    staleness: Mapping[str, float | None] | None = None
    """Mean staleness by path (`Tracker.staleness`); becomes `tau_mean` of the nodes."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """More values for the top level; they cannot replace the others."""


def write_summary(run_dir: Path, summary: Summary) -> dict[str, Any]:
    """Write summary.json, all of it or nothing, and return what it holds."""
    lines = {path: asdict(node) for path, node in summary.nodes.items()}
    for path, line in lines.items():
        if summary.staleness is not None:
            line["tau_mean"] = summary.staleness.get(path)
    written: dict[str, Any] = finite(
        {
            **summary.extra,
            "run": summary.run,
            "method": summary.method,
            "seed": summary.seed,
            "wall_s": summary.wall_s,
            "tokens": summary.tokens,
            "params_sha256": summary.params_sha256,
            "nodes": lines,
        }
    )
    replace_json(run_dir / SUMMARY, written, durable=True)
    return written
