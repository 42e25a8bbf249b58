"""A world that grows and shrinks with its machines: pretended ones, Ray's processes of several machines on this one.

Eight clients in two federations share out over the machines that are there. Who has no room waits; when machines come
they begin, from their federation's model; when one is drained they wait again, and nothing that they have pushed is
lost. The command `worldlm scale elastic` is the same with a table and a plot.
"""

from __future__ import annotations

import sys
import tempfile

from worldlm_ray.config.loading import load
from worldlm_ray.experiments import scaling
from worldlm_ray.launch.scale import elastic, scale
from worldlm_ray.plan import rundir
from worldlm_ray.plan.plan import make_plan
from worldlm_ray.tracking.audit import proofs

STAGE_S = float(sys.argv[1]) if len(sys.argv) > 1 else 20.0
"""Seconds of every stage."""


def main() -> None:
    """Train on one, two and one machines."""
    with tempfile.TemporaryDirectory() as folder:
        settings = load("elastic", [f"run_dir={folder}/run"])
        plan = rundir.create(elastic(make_plan(settings)))
        stages, looks = scale(plan, [1, 2, 1], stage_s=STAGE_S, on_phase=print)
        tokens = {spec.path: plan.round_tokens(spec) for spec in plan.root.clients}
        for row in scaling.figures(plan.run_dir, stages, round_tokens=tokens, looks=looks):
            print(f"{row.machines} machines: {row.clients} clients, {row.tokens_per_s:,.0f} tokens/s")
        lost = sum(len(proof.lost) + len(proof.twice) for proof in proofs(plan.run_dir))
        print(f"updates lost or applied twice: {lost}")


if __name__ == "__main__":
    main()
