"""Busy share of clients when one of four is eight times slower than the others, on Ray."""

from __future__ import annotations

import statistics
import tempfile
from typing import Any

from worldlm_ray import launch
from worldlm_ray.config.loading import from_mapping
from worldlm_ray.plan import rundir
from worldlm_ray.plan.plan import make_plan

SECONDS = 45.0
STEP_S = 0.02
"""Every step of the three fast clients sleeps this long, so that two cores are not what limits them."""
SLOW_STEP_S = 0.34
"""A step of the fast ones takes about 0.045 s with its sleep on two cores: this makes the slow one 8 times slower."""


def run() -> dict[str, Any]:
    """Train for a fixed time and print each client's share of it."""
    with tempfile.TemporaryDirectory() as folder:
        children = [
            {
                "client": f"fast{i}",
                "data": {"corpus": "python_reference"},
                "training": {"step_delay_s": STEP_S},
            }
            for i in range(3)
        ]
        slow = {
            "client": "slow",
            "data": {"corpus": "python_reference"},
            "training": {"step_delay_s": SLOW_STEP_S},
        }
        raw = {
            "run_dir": f"{folder}/run",
            "merge": {"client": 1.0},  # one model per client
            "model": {"preset": "nano"},
            "budget": {"seconds": SECONDS},
            "training": {"local_steps": 25},
            "evaluation": {"every_rounds": 0, "final_tokens": 2048},
            "world": {"children": [*children, slow]},
        }
        plan = rundir.create(make_plan(from_mapping(raw)))
        seen: list[dict[str, Any]] = []
        summary = launch.train(plan, on_progress=seen.append).summary
    clients = {path: node for path, node in summary["nodes"].items() if node["kind"] == "client"}
    print(f"{'client':14} {'steps':>6} {'busy':>7} {'accepted':>9}")
    for path, node in clients.items():
        print(f"{path:14} {node['steps']:6} {node['busy_fraction']:7.1%} {node['accepted']:9}")
    fast = [node["busy_fraction"] for path, node in clients.items() if "fast" in path]
    # Speeds while all four trained: the slow one ends its last round after the budget of time is spent.
    speeds = [
        {name: snapshot["nodes"][f"world/{name}"]["tokens_per_s"] for name in ("fast0", "slow")} for snapshot in seen
    ]
    speed = statistics.median(each["fast0"] / each["slow"] for each in speeds if each["slow"])
    print(f"the slow one is {speed:.1f} times slower; least busy of the others: {min(fast):.1%}; target: >= 95 %")
    return {"clients": clients, "least_busy_of_the_fast": min(fast), "slow_factor": speed}
