"""A staleness function and an aggregation rule of a user, in one file, in a simulated world that uses both.

Usage: python examples/custom_rule.py [RUN_DIR]

A configuration names such a file by `rules: [custom_rule.py]`; the file may lie beside it. A run keeps a copy, which
all of its processes read. tests/unit/test_custom_rules.py tests rules of this kind.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console

from worldlm_ray.aggregation.fold import Fold
from worldlm_ray.aggregation.rules import aggregation_rule
from worldlm_ray.aggregation.server_optimizer import ServerOptimizer
from worldlm_ray.aggregation.staleness import staleness
from worldlm_ray.config.loading import from_mapping
from worldlm_ray.plan import rundir
from worldlm_ray.plan.plan import make_plan
from worldlm_ray.reports.tables import final_table
from worldlm_ray.simulation.simulator import simulate
from worldlm_ray.tensors.buffers import Flat


@staleness("logarithmic", a=1.0)
def logarithmic(tau: int, a: float, b: float) -> float:
    """1 / (1 + a log(1 + tau)): falls more slowly than any power. Source: this example."""
    return 1.0 / (1.0 + a * math.log1p(tau))


@aggregation_rule("sign_blend")
class SignBlend(Fold):
    """The mean of the updates, and of every number of the model only its sign times the mean magnitude.

    Source: after signSGD, Bernstein et al., arXiv 1802.04434. State, checkpoints and memory are those of the mean.
    """

    def finish(
        self, theta: Flat, optimizer: ServerOptimizer, *, absent: Sequence[Sequence[float]]
    ) -> tuple[Flat, float, list[list[float]]]:
        """Replace the step of the backbone by its signs, as long as the step; see `Fold.finish`."""
        flat, norm, weights = super().finish(theta, optimizer, absent=absent)
        split = self.layout.backbone_size
        step = flat[:split] - theta[:split]
        np.add(theta[:split], np.sign(step) * np.float32(norm / math.sqrt(split)), out=flat[:split])
        return flat, norm, weights


def settings(run_dir: str | None) -> dict[str, Any]:
    """A federation of two clients beside a client: the names are used as ours are."""
    texts = {"python": "python_reference", "law": "licenses"}
    clients = [{"client": name, "data": {"corpus": corpus}} for name, corpus in texts.items()]
    slow = {"client": "packages", "data": {"corpus": "package_descriptions"}, "simulation": {"tokens_per_s": 5_000}}
    return {
        "name": "example-custom-rule",
        "run_dir": run_dir,
        "rules": [__file__],
        "model": {"preset": "nano"},
        "budget": {"rounds": 4},
        "training": {"local_steps": 5, "batch_size": 8},
        "evaluation": {"every_rounds": 0, "tokens": 2048, "final_tokens": 2048},
        "data": {"max_bytes": 400_000},
        "aggregation": {"staleness": {"fn": "logarithmic"}},
        "world": {
            "children": [
                {"federation": "texts", "aggregation": {"rule": "sign_blend", "buffer_size": 2}, "children": clients},
                slow,
            ]
        },
    }


def main() -> None:
    """Simulate, then print the table."""
    plan = rundir.create(make_plan(from_mapping(settings(sys.argv[1] if len(sys.argv) > 1 else None))))
    outcome = simulate(plan)
    Console().print(final_table(outcome.summary, outcome.samples))


if __name__ == "__main__":
    main()
