"""Losses of methods at equal tokens on real text, at 75m: worldlm, FedAvg and local training."""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.gpu.card import device
from benchmarks.gpu.rows import Rows
from worldlm_ray.config.loading import from_mapping
from worldlm_ray.experiments.compare import compare

CORPORA = {"code": ("python_stdlib", "cpp_headers"), "prose": ("python_reference", "package_descriptions")}
METHODS = ("local", "fedavg", "worldlm")


def measure(rows: Rows, toy: bool) -> None:
    """One seed of each method, and the mean loss of the clients' own models."""
    where = device(toy)
    text = {"max_bytes": 60_000 if toy else 8_000_000}
    raw: dict[str, Any] = {
        "name": "gpu",
        "model": {"preset": "nano"} if toy else {"preset": "75m", "context": 512},
        "budget": {"rounds": 2 if toy else 12},
        "training": {"local_steps": 2 if toy else 40, "batch_size": 4 if toy else 32, "lr": 1e-3, "compile": "off"},
        "evaluation": {"tokens": 1024 if toy else 65_536, "final_tokens": 1024 if toy else 65_536},
        "resources": {"gpus": 1.0 if where == "cuda" else 0.0},
        "world": {
            "children": [
                {"federation": name, "children": [{"client": c, "data": {"corpus": c} | text} for c in clients]}
                for name, clients in CORPORA.items()
            ]
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        for method in METHODS:  # one by one, so that a run that is cut off leaves the others' rows
            found = compare(from_mapping(raw), [method], [0], out=Path(folder) / method)
            rows.add(f"{method}: mean loss of the clients' own models", mean(_own(found)), "nats per byte")


def _own(found: list[dict[str, Any]]) -> list[float]:
    return [float(row["own"]) for row in found if row.get("own") is not None]
