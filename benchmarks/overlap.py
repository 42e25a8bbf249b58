"""Busy share of clients whose exchanges take almost as long as a round, with and without `exchange.overlap`, on Ray."""

from __future__ import annotations

import tempfile
from typing import Any

from worldlm_ray import launch
from worldlm_ray.config.loading import from_mapping
from worldlm_ray.plan import rundir
from worldlm_ray.plan.plan import make_plan

SECONDS = 90.0
STEPS_S = {"a": 0.10, "b": 0.16, "c": 0.25, "d": 0.40}
"""What a step sleeps, so that two cores are not what limits four clients: from the fastest to the slowest 4 times."""
LOCAL_STEPS = 20
LATE_S = 0.8
"""By this every message is late: a push and a pull together take a little less than the fastest client's round."""


def run() -> dict[str, Any]:
    """Train the same world twice, for the same time, and print each client's share of it."""
    plain, overlapped = (_busy(overlap) for overlap in (False, True))
    print(f"{'client':8} {'step (s)':>9} {'busy':>8} {'overlap':>8} {'of the exchange hidden':>24}")
    hidden = {}
    for path, before in plain.items():
        after = overlapped[path]
        # Rounds take the same training in both: what is left of the waiting per second of training was not hidden.
        hidden[path] = 1.0 - _waiting(after) / _waiting(before)
        print(f"{path:8} {STEPS_S[path[-1]]:9.2f} {before:8.1%} {after:8.1%} {hidden[path]:24.1%}")
    print(f"least busy: {min(plain.values()):.1%}, with overlap {min(overlapped.values()):.1%}; target: >= 90 %")
    return {"busy": plain, "busy_overlap": overlapped, "hidden": hidden}


def _waiting(busy: float) -> float:
    """Seconds waited per second of work."""
    return (1.0 - busy) / busy


def _busy(overlap: bool) -> dict[str, float]:
    """Busy share of every client."""
    with tempfile.TemporaryDirectory() as folder:
        children = [
            {
                "client": name,
                "data": {"corpus": "python_reference", "shard": f"{number}/{len(STEPS_S)}"},
                "training": {"step_delay_s": step_s},
            }
            for number, (name, step_s) in enumerate(STEPS_S.items(), start=1)
        ]
        raw = {
            "run_dir": f"{folder}/run",
            "merge": {"client": 1.0},  # one model per client
            "model": {"preset": "nano"},
            "budget": {"seconds": SECONDS},
            "training": {"local_steps": LOCAL_STEPS},
            "exchange": {"overlap": overlap},
            "evaluation": {"every_rounds": 0, "final_tokens": 2048},
            "faults": [f"0s delay world/{name} by {LATE_S}s for 10000s" for name in STEPS_S],
            "world": {"children": children},
        }
        plan = rundir.create(make_plan(from_mapping(raw)))
        nodes = launch.train(plan).summary["nodes"]
    return {path: node["busy_fraction"] for path, node in nodes.items() if node["kind"] == "client"}
