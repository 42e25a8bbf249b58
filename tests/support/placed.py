"""Train a small world on pretended machines with labels, and print on which of them each actor lived: JSON.

    PYTHONPATH=tests python -m support.placed FOLDER

A separate program, since a process has one Ray at a time.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import ray
from ray._private.state import actors
from ray.cluster_utils import Cluster

from support.killing import Killer
from support.worlds import TINY_MODEL, client
from worldlm_ray.config.loading import from_mapping
from worldlm_ray.launch.cluster import HEAD, QUIET
from worldlm_ray.plan import rundir
from worldlm_ray.plan.plan import make_plan

REGIONS = ("eu", "us")


def main(folder: Path) -> None:
    children: list[dict[str, Any]] = [
        {
            "federation": region,
            "placement": {"labels": {"region": region}},
            "children": [client(f"{region}{number}", folder, seed + number) for number in range(2)],
        }
        for seed, region in enumerate(REGIONS)
    ]
    children[0]["children"][1] |= {"training": {"zero_stage": 2}, "resources": {"workers": 2}}
    raw = {
        "run_dir": str(folder / "run"),
        "model": TINY_MODEL,
        "merge": {"client": 1.0},
        "budget": {"rounds": 4},
        "training": {"local_steps": 4, "batch_size": 4, "step_delay_s": 0.25},
        "evaluation": {"tokens": 64, "final_tokens": 128},
        "data": {"cache_dir": str(folder / "cache")},
        "world": {"children": children},
    }
    plan = rundir.create(make_plan(from_mapping(raw)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        try:
            for region in REGIONS:
                cluster.add_node(num_cpus=4, labels={"region": region})
            cluster.add_node(num_cpus=8)  # where there is most room, and where no node belongs
            ray.init(cluster.address, **QUIET)
            summary = Killer(plan, [(2, 0.0, "world/us"), (4, 0.0, "world/eu")]).train()
            regions = {node["NodeID"]: node["Labels"].get("region", "") for node in ray.nodes()}
            regions |= {node["NodeID"]: "head" for node in ray.nodes() if HEAD in node["Resources"]}
            lived = [
                [actor["Name"], actor["ActorClassName"], regions[actor["Address"]["NodeID"]], actor["NumRestarts"]]
                for actor in actors().values()
            ]
            print(json.dumps({"status": summary["status"], "lived": lived}))
        finally:
            ray.shutdown()
            cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
