"""How long a client that joins a living world takes to its first accepted update, and who waits for it, on Ray."""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from worldlm_ray import launch
from worldlm_ray.config.loading import from_mapping
from worldlm_ray.exchange.replies import ACCEPTED
from worldlm_ray.plan import membership, rundir
from worldlm_ray.plan.plan import Plan, make_plan
from worldlm_ray.tracking import audit

JOINERS = 3
BEFORE_S = 20.0
"""The rhythm of the others is taken from this stretch before the first joins."""


def run() -> dict[str, Any]:
    """Let three clients join, one after the other, and print what it took."""
    children = [
        {
            "federation": name,
            "children": [{"client": f"{name}{i}", "data": {"corpus": "python_reference"}} for i in range(2)],
        }
        for name in ("north", "south")
    ]
    with tempfile.TemporaryDirectory() as folder:
        raw = {
            "run_dir": f"{folder}/run",
            "merge": {"client": 1.0},  # one model per client
            "model": {"preset": "nano"},
            "budget": {"seconds": 1_000.0},
            "training": {"local_steps": 10, "batch_size": 4, "step_delay_s": 0.2},
            "evaluation": {"every_rounds": 0, "final_tokens": 2048},
            "world": {"children": children},
        }
        return _join(rundir.create(make_plan(from_mapping(raw))))


def _join(plan: Plan) -> dict[str, Any]:
    done = threading.Event()
    looks: list[dict[str, Any]] = []
    errors: list[Exception] = []

    def train() -> None:
        try:
            launch.train(plan, on_progress=looks.append, should_stop=done.is_set)
        except Exception as error:  # noqa: BLE001 - raised below
            errors.append(error)

    others = [spec.path for spec in plan.root.clients]
    thread = threading.Thread(target=train)
    thread.start()
    try:
        while not looks or min(looks[-1]["nodes"][path]["accepted"] for path in others) < 2:
            assert thread.is_alive(), errors
            time.sleep(0.2)
        time.sleep(BEFORE_S)
        took_s, spans = [], []
        for number in range(JOINERS):
            name = f"new{number}"
            joined = membership.with_client(
                plan, "world/south", name, files=[], overrides=["data.corpus=python_stdlib"]
            )
            began_s = looks[-1]["now_s"]
            took_s.append(launch.join(plan, joined, f"world/south/{name}"))
            spans.append((began_s, looks[-1]["now_s"] + 1.0))
            plan = joined
    finally:
        done.set()
        thread.join()
    heard = _heard(plan.run_dir, others)
    before = statistics.median(gap for at_s, gap in heard if at_s < spans[0][0])
    during = [gap for at_s, gap in heard if any(begin < at_s < end for begin, end in spans)]
    size_mb = plan.layout.nbytes / 1e6
    print(f"join to first accepted update, its first round of 10 steps (2 s of them asleep) and {size_mb:.1f} MB of")
    print(f"model included: {', '.join(f'{s:.1f} s' for s in took_s)}; target: 10 s and the transfer")
    print(f"time between two updates of the others: {before:.2f} s before (median),")
    print(f"  while a client joined {statistics.median(during):.2f} s (median), {max(during):.2f} s (longest)")
    return {"took_s": took_s, "before_s": before, "during_s": statistics.median(during), "longest_s": max(during)}


def _heard(run_dir: Path, others: list[str]) -> list[tuple[float, float]]:
    """When an update of one of them was accepted, and how long after the one before."""
    last: dict[str, float] = {}
    found = []
    for line in audit.read(run_dir):
        path = f"{line['node']}/{line.get('sender')}"
        if path in others and line["verdict"] == ACCEPTED:
            if path in last:
                found.append((line["now_s"], line["now_s"] - last[path]))
            last[path] = line["now_s"]
    return found
