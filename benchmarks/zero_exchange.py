"""What a push and a pull cost a client with two workers beyond a plain client's, in shares of its local round."""

from __future__ import annotations

import tempfile
from typing import Any

from worldlm_ray import launch
from worldlm_ray.config.loading import from_mapping
from worldlm_ray.plan import rundir
from worldlm_ray.plan.plan import make_plan

ROUNDS, STEPS = 10, 50
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stage 2": {"training": {"zero_stage": 2}, "resources": {"workers": 2}},
    "stage 3": {"training": {"zero_stage": 3}, "resources": {"workers": 2}},
}


def _rounds(preset: str, settings: dict[str, Any], folder: str) -> tuple[float, float]:
    """Seconds of training of a round (the last), and mean seconds of a cycle outside training."""
    raw = {
        "run_dir": f"{folder}/run",
        "merge": {"client": 1.0},  # one model per client
        "model": {"preset": preset},
        "budget": {"rounds": ROUNDS},
        "training": {"local_steps": STEPS},
        "evaluation": {"every_rounds": 0, "tokens": 64, "final_tokens": 64},
        "checkpoint": {"every_s": 1e9},
        "data": {"corpus": "docstrings"},
        "world": {"children": [{"client": "one", **settings}]},
    }
    plan = rundir.create(make_plan(from_mapping(raw)))
    snapshots: list[dict[str, Any]] = []
    launch.train(plan, on_progress=snapshots.append)
    node = snapshots[-1]["nodes"]["world/one"]
    train_s = plan.round_tokens(plan.node("world/one")) / node["tokens_per_s"]
    return train_s, train_s * (1.0 / node["busy_fraction"] - 1.0)


def run() -> dict[str, Any]:
    """A world of one client each, one after the other."""
    rows = []
    for preset in ("nano", "micro"):
        between = {}
        for kind, settings in KINDS.items():
            with tempfile.TemporaryDirectory() as folder:
                train_s, between[kind] = _rounds(preset, settings, folder)
            share = (between[kind] - between["plain"]) / train_s
            rows.append(
                {"preset": preset, "kind": kind, "train_s": train_s, "outside_s": between[kind], "share": share}
            )
            print(
                f"  {preset}, {kind:8} round of {STEPS} steps {train_s:.2f} s, outside training {between[kind]:.3f} s"
                + (f", beyond a plain client's {share:.1%} of a round" if kind != "plain" else "")
            )
    return {"rows": rows}
