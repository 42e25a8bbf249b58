"""A thousand clients on two cores: clients that share processes, updates per second and memory per client.

A world of four federations on Ray, a small model, two rounds of two steps of every client. Memory is the resident
memory of the processes that hold clients (their private part, without Ray's shared memory), sampled once a second;
updates per second are those from the first to the last line of the audit trail.
"""

from __future__ import annotations

import random
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from worldlm_ray import launch
from worldlm_ray.config.loading import from_mapping
from worldlm_ray.plan import rundir
from worldlm_ray.plan.plan import Plan, make_plan
from worldlm_ray.tracking.audit import proofs, read

WORLDS = ((8, 1), (40, 10), (1000, 250))
"""Clients, and clients per process."""
FEDERATIONS, ROUNDS, STEPS = 4, 2, 2
TEXT_PER_CLIENT = 12_000
"""Characters."""
MODEL = {"hidden_size": 32, "layers": 2, "heads": 2, "intermediate_size": 64, "context": 32}


def text(folder: Path) -> Path:
    """Sentences of made-up words: one file, which the clients share out among them."""
    path = folder / "text.txt"
    if not path.is_file():
        rng = random.Random(0)
        words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(2_000)]
        size = TEXT_PER_CLIENT * max(clients for clients, _ in WORLDS)
        with path.open("w", encoding="utf-8") as file:
            while file.tell() < size:
                file.write(" ".join(rng.choices(words, k=200)) + ".\n\n")
    return path


def conf(folder: Path, clients: int, share: int) -> dict[str, Any]:
    """The world."""
    return {
        "name": "many",
        "run_dir": str(folder / f"run-{clients}-{share}"),
        "merge": {"client": 1.0},  # one model per client
        "model": MODEL,
        "budget": {"rounds": ROUNDS},
        "training": {"local_steps": STEPS, "batch_size": 4},
        "evaluation": {"every_rounds": 0, "tokens": 32, "final_tokens": 32},
        "resources": {"clients_per_process": share},
        "data": {"files": [str(text(folder))], "cache_dir": str(folder / "cache")},
        "aggregation": {"push_every": 8},
        "world": {
            "children": [
                {
                    "federation": "region",
                    "copies": FEDERATIONS,
                    "children": [{"client": "phone", "copies": clients // FEDERATIONS}],
                }
            ]
        },
    }


class Watch(threading.Thread):
    """Samples the memory of a run's processes."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(daemon=True)
        self.plan = plan
        self.over = threading.Event()
        self.private: dict[int, int] = {}
        """Largest private resident memory of every process that holds clients."""
        self.total = 0
        """Largest of all processes of Ray together, shared memory counted once."""

    def run(self) -> None:
        """Sample until `over`."""
        pids: dict[int, str] = {}
        while not self.over.wait(1.0):
            children = psutil.Process().children(recursive=True)
            total = largest = 0
            for process in children:
                try:
                    memory, name = process.memory_info(), " ".join(process.cmdline())
                except psutil.Error:
                    continue
                total += memory.rss - memory.shared
                largest = max(largest, memory.shared)
                pids[process.pid] = name
                if "ClientPoolActor" in name or "ray::ClientActor" in name:
                    self.private[process.pid] = max(self.private.get(process.pid, 0), memory.rss - memory.shared)
            self.total = max(self.total, total + largest)


def measure(folder: Path, clients: int, share: int) -> dict[str, Any]:
    """One run to its end."""
    plan = rundir.create(make_plan(from_mapping(conf(folder, clients, share))))
    watch = Watch(plan)
    watch.start()
    began = time.monotonic()
    summary = launch.train(plan).summary
    took_s = time.monotonic() - began
    watch.over.set()
    watch.join()
    found = proofs(plan.run_dir)
    if summary["status"] != "finished" or not all(proof.holds for proof in found):
        raise RuntimeError("the run did not end well")
    heard = [line["now_s"] for line in read(plan.run_dir) if line.get("sender", "").startswith("phone")]
    nodes = summary["nodes"]
    federations = [node for node in nodes.values() if node["kind"] == "federation"]
    private = list(watch.private.values())
    return {
        "clients": clients,
        "share": share,
        "processes": len(private),
        "updates": sum(node["accepted"] for node in nodes.values() if node["kind"] == "client"),
        "updates_per_s": (len(heard) - 1) / (max(heard) - min(heard)),
        "took_s": took_s,
        "host_bytes": max(private),
        "bytes_per_client": sum(private) / clients,
        "total_bytes": watch.total,
        "federations_busy": max(node["busy_fraction"] for node in federations),
        "parameters": plan.layout.size,
    }


def run() -> dict[str, Any]:
    """Worlds with few and many clients per process."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for clients, share in WORLDS:
            rows.append(measure(Path(folder), clients, share))
            if len(rows) == 1:
                print(
                    f"{rows[0]['parameters']:,} parameters, {ROUNDS} rounds of {STEPS} steps, {FEDERATIONS} federations"
                )
                head = ("clients", "per process", "updates/s", "whole run (s)", "MB/process", "MB/client", "GB in all")
                print("  ".join(f"{name:>13}" for name in (*head, "aggregators")))
            row = rows[-1]
            values = (
                f"{row['clients']:,}",
                str(row["share"]),
                f"{row['updates_per_s']:.1f}",
                f"{row['took_s']:.0f}",
                f"{row['host_bytes'] / 1e6:.0f}",
                f"{row['bytes_per_client'] / 1e6:.2f}",
                f"{row['total_bytes'] / 1e9:.2f}",
                f"{row['federations_busy']:.1%}",
            )
            print("  ".join(f"{value:>13}" for value in values), flush=True)
    print("nothing was lost and nothing applied twice")
    return {"worlds": rows}
