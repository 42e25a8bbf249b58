"""A whole machine of the cluster lost and another one added: how long until its clients train again, on Ray."""

from __future__ import annotations

import logging
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from worldlm_ray import launch
from worldlm_ray.config.loading import from_mapping
from worldlm_ray.plan import rundir
from worldlm_ray.plan.plan import make_plan
from worldlm_ray.tracking.audit import proofs

ROUNDS = 40
FAST_CHECKS = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}


def run() -> dict[str, Any]:
    """Lose a machine with half of the clients, add one, and print what it cost."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": FAST_CHECKS}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        nodes = [cluster.add_node(num_cpus=2) for _ in range(2)]
        ray.init(cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        try:
            with tempfile.TemporaryDirectory() as folder:
                return _lose(cluster, nodes, Path(folder))
        finally:
            ray.shutdown()
            cluster.shutdown()


def _lose(cluster: Any, nodes: list[Any], folder: Path) -> dict[str, Any]:
    children = [
        {
            "federation": name,
            "children": [{"client": f"{name}{i}", "data": {"corpus": "python_reference"}} for i in range(2)],
        }
        for name in ("north", "south")
    ]
    raw = {
        "run_dir": str(folder / "run"),
        "merge": {"client": 1.0},  # one model per client
        "model": {"preset": "nano"},
        "budget": {"rounds": ROUNDS},
        "training": {"local_steps": 10, "batch_size": 4, "step_delay_s": 0.2},
        "evaluation": {"every_rounds": 0, "final_tokens": 2048},
        "world": {"children": children},
    }
    plan = rundir.create(make_plan(from_mapping(raw)))
    looks: list[dict[str, Any]] = []
    summaries: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: summaries.append(launch.train(plan, on_progress=looks.append).summary))
    thread.start()
    while not looks or min(_rounds(looks[-1]).values()) < 3:
        time.sleep(0.2)
    before, lost_at = looks[-1], time.monotonic()
    cluster.remove_node(nodes[0], allow_graceful=False)
    cluster.add_node(num_cpus=2)
    added_s = time.monotonic() - lost_at
    back_s: dict[str, float] = {}
    while thread.is_alive() and len(back_s) < 4:
        for path, done in _rounds(looks[-1]).items():
            if path not in back_s and done >= _rounds(before)[path] + 2:
                back_s[path] = time.monotonic() - lost_at
        time.sleep(0.1)
    thread.join()
    rounds = {spec.path: summaries[0]["nodes"][spec.path]["steps"] // 10 for spec in plan.root.clients}
    holds = all(proof.holds for proof in proofs(plan.run_dir))
    print(f"another machine was there after {added_s:.1f} s; two more rounds of each client after:")
    for path, seconds in back_s.items():
        print(f"  {path:22} {seconds:6.1f} s")
    print(f"rounds at the end: {rounds}, budget {ROUNDS}")
    print("nothing lost, nothing applied twice" if holds else "UPDATES LOST OR APPLIED TWICE")
    return {"added_s": added_s, "back_s": back_s, "rounds": rounds, "holds": holds}


def _rounds(snapshot: dict[str, Any]) -> dict[str, int]:
    return {path: node["rounds"] for path, node in snapshot["nodes"].items() if node["kind"] == "client"}
