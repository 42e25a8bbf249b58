"""Share of a comparison's run that goes into measuring: validation and held-out text, during it and at its end.

Methods of the world `federating`, with its whole budget.
"""

from __future__ import annotations

import tempfile
import time
from typing import Any
from unittest.mock import patch

from worldlm_ray.config.loading import load, to_mapping
from worldlm_ray.experiments.comparison_run import run_one
from worldlm_ray.training.local import LocalTrainer

METHODS = ("local", "fedavg", "worldlm")
TARGET = 0.15


def run() -> dict[str, Any]:
    """Train and measure each method, and print the share of CPU time."""
    rows = []
    print(f"{'method':10} {'CPU s':>7} {'measuring':>10}")
    for method in METHODS:
        spent_s, all_s = _spent(method)
        rows.append({"method": method, "cpu_s": all_s, "measuring": spent_s / all_s})
        print(f"{method:10} {all_s:7.1f} {spent_s / all_s:10.1%}", flush=True)
    print(f"target: less than {TARGET:.0%}")
    return {"rows": rows}


def _spent(method: str) -> tuple[float, float]:
    """CPU seconds of measuring, and of the whole run."""
    evaluate, spent = LocalTrainer.evaluate, 0.0

    def timed(*arguments: Any, **named: Any) -> tuple[float, int]:
        nonlocal spent
        began = time.process_time()
        found = evaluate(*arguments, **named)
        spent += time.process_time() - began
        return found

    with tempfile.TemporaryDirectory() as folder, patch.object(LocalTrainer, "evaluate", timed):
        began = time.process_time()
        run_one(to_mapping(load("federating")), method, 0, folder)
        return spent, time.process_time() - began
