"""Train a client whose workers may be one or two beside a plain one, add a machine in the middle, say what came of it.

    PYTHONPATH=tests python -m support.resized FOLDER

A separate program, since a process has one Ray at a time. Prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from support.worlds import TINY_MODEL, client
from worldlm_ray import launch
from worldlm_ray.config.loading import from_mapping
from worldlm_ray.launch.cluster import QUIET
from worldlm_ray.plan import rundir
from worldlm_ray.plan.plan import make_plan
from worldlm_ray.tracking import audit

PATH = "world/elastic"
ROUNDS = 45
LONGEST_S = 170.0
RESIZED = "2 workers took the place of those before"


def main(folder: Path) -> None:
    elastic = client("elastic", folder, 1, resources={"workers": [1, 2]}, training={"zero_stage": 2})
    raw = {
        "run_dir": str(folder / "run"),
        "model": TINY_MODEL,
        "merge": {"client": 1.0},
        "budget": {"rounds": ROUNDS},
        "training": {"local_steps": 4, "batch_size": 4, "step_delay_s": 0.25},
        "evaluation": {"tokens": 64, "final_tokens": 128},
        "data": {"cache_dir": str(folder / "cache")},
        "world": {"children": [elastic, client("plain", folder, 2)]},
    }
    plan = rundir.create(make_plan(from_mapping(raw)))
    looks: list[tuple[float, dict[str, Any]]] = []
    ended: list[Any] = []

    def train() -> None:
        try:
            watched = launch.train(plan, on_progress=lambda snapshot: looks.append((time.monotonic(), snapshot)))
            ended.append(watched.summary)
        except Exception as error:  # noqa: BLE001 - printed below
            ended.append(error)

    def steps() -> int:
        return int(looks[-1][1]["nodes"][PATH]["steps"]) if looks else 0

    def wait(condition: Callable[[], bool]) -> None:
        until = time.monotonic() + LONGEST_S
        while not ended and not condition():
            assert time.monotonic() < until, looks[-1][1]["nodes"] if looks else "it has not begun"
            time.sleep(0.2)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        try:
            cluster.add_node(num_cpus=2)  # one for the plain client: what is left takes one worker
            ray.init(cluster.address, **QUIET)
            thread = threading.Thread(target=train, daemon=True)
            thread.start()
            wait(lambda: steps() >= 8)
            added_at, before = time.monotonic(), steps()
            cluster.add_node(num_cpus=1)
            thread.join(timeout=LONGEST_S)
            resized = [at - added_at for at, look in looks if look["nodes"][PATH]["state_detail"] == RESIZED]
            result = ended[0] if ended else "it did not end"
            found = {
                "error": "" if isinstance(result, dict) else str(result),
                "steps": {path: node["steps"] for path, node in result["nodes"].items() if node["kind"] == "client"}
                if isinstance(result, dict)
                else {},
                "steps_before": before,
                "resized_s": resized[0] if resized else None,
                "holds": all(proof.holds for proof in audit.proofs(plan.run_dir)),
                "seqs": [line["seq"] for line in audit.read(plan.run_dir) if line.get("sender") == "elastic"],
            }
            print(json.dumps(found))
        finally:
            ray.shutdown()
            cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
