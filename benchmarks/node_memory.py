"""Peak memory of an inner node's process and of what it keeps in the object store, in units of the model.

Real actors on Ray. This process plays the children: it pushes updates one after the other, and pulls. Counted is the
growth of the actor's private memory (RssAnon, sampled) plus all of the object store, in which the published model
and the update in flight lie; so nothing that the exchange needs is left out.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import ray

from actors.federation import FederationActor
from actors.recorder import RecorderActor
from actors.shared import RECORDER, Address
from actors.world import WorldActor
from worldlm_ray.config.loading import from_mapping
from worldlm_ray.exchange.messages import Update, pack
from worldlm_ray.launch import cluster
from worldlm_ray.launch.create import options_of
from worldlm_ray.plan.plan import Plan, make_plan
from worldlm_ray.run_clock import RunClock

CHILDREN = (2, 4, 8, 16)
SAMPLE_S = 0.002


def private_bytes() -> int:
    """Anonymous resident memory of this process."""
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class Sampler:
    """Remembers the largest value of a probe, looking every few milliseconds until told to end."""

    def __init__(self, probe: Callable[[], int]) -> None:
        self.probe, self.peak, self.ended = probe, 0, threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()

    def _look(self) -> None:
        while not self.ended.wait(SAMPLE_S):
            self.peak = max(self.peak, self.probe())

    def end(self) -> int:
        """The largest value seen."""
        self.ended.set()
        self.thread.join()
        return self.peak


class Watched:
    """An actor that knows its own peak memory."""

    def __init__(self, address: Address) -> None:
        self.before = private_bytes()
        super().__init__(address)  # type: ignore[call-arg]  # of the actor beside it
        self.sampler = Sampler(private_bytes)

    async def private_peak(self) -> int:
        """Largest private memory so far, above what the process had before."""
        return self.sampler.peak - self.before


class WatchedWorld(Watched, WorldActor):
    """A world that knows its own peak memory."""


class WatchedFederation(Watched, FederationActor):
    """A federation that knows its own peak memory."""


def store_bytes() -> int:
    """Bytes of objects in the local object store."""
    free = ray.available_resources().get("object_store_memory", 0.0)
    return int(ray.cluster_resources()["object_store_memory"] - free)


def plan_for(children: int, folder: str) -> Plan:
    """A world with one federation; the federation has the children. About 25M parameters: 100 MB."""
    clients = [{"client": f"c{i}", "data": {"corpus": "python_reference"}} for i in range(children)]
    raw = {
        "run_dir": folder,
        "merge": {"client": 1.0},  # one model per client
        "model": {
            "preset": "mini",
            "hidden_size": 512,
            "intermediate_size": 1408,
            "layers": 8,
            "context": 64,
        },
        "budget": {"rounds": 100},
        "checkpoint": {"every_s": 1e9},
        "aggregation": {"buffer_size": children},
        "world": {"aggregation": {"buffer_size": 1}, "children": [{"federation": "f", "children": clients}]},
    }
    config_ = from_mapping(raw)
    federation = {"federation": "f", "aggregation": {"buffer_size": children}, "children": clients}
    return make_plan(replace(config_, world={"aggregation": {"buffer_size": 1}, "children": [federation]}))


def measure(children: int) -> dict[str, Any]:
    """Two rounds of all children through a federation and a world."""
    with tempfile.TemporaryDirectory() as folder:
        plan = plan_for(children, folder)
        clock = RunClock.starting()
        namespace = f"memory-{children}"
        recorder = ray.remote(RecorderActor).options(num_cpus=0, name=RECORDER, namespace=namespace).remote(plan)
        actors = {}
        for spec, cls in ((plan.root, WatchedWorld), (plan.root.children[0], WatchedFederation)):
            actor = ray.remote(cls).options(name=spec.path, namespace=namespace, **options_of(spec))
            actors[spec.path] = actor.remote(Address(plan, spec.path, clock, namespace))
            ray.get(actors[spec.path].ready.remote())
            ray.get(actors[spec.path].start.remote())
        federation = actors["world/f"]
        for index in range(children):
            ray.get(federation.join.remote(f"c{index}", 1, 0))
        store = Sampler(store_bytes)
        values = np.full(plan.layout.size, 1e-3, np.float32)
        for seq in (1, 2):
            for index in range(children):
                name = f"c{index}"
                header, refs = ray.get(federation.pull.remote(name, 1, 1, seq * 100))
                base = Update(
                    sender=name,
                    seq=seq,
                    base_version=seq - 1,
                    tokens=100,
                    started_tokens=seq * 100,
                    values=values,
                )
                del refs, header
                packed = pack(base, plan.layout)
                refs = [ray.put(packed.values)]
                verdict = ray.get(federation.push.remote(name, 1, 1, packed.header, refs))
                assert verdict.accepted, verdict
                del refs
            time.sleep(1.0)
        size = plan.layout.nbytes
        row = {
            "children": children,
            "model_bytes": size,
            "world": ray.get(actors["world"].private_peak.remote()) / size,
            "federation": ray.get(federation.private_peak.remote()) / size,
            "object_store": store.end() / size,
        }
        for actor in (*actors.values(), recorder):
            ray.kill(actor)
        return row


def run() -> dict[str, Any]:
    """Print private memory of each node, and the store that both share, in models."""
    rows = []
    with tempfile.TemporaryDirectory() as folder, cluster.connected(plan_for(2, folder), None):
        rows = [measure(children) for children in CHILDREN]
    print(f"{'children':>8} {'world':>8} {'federation':>11} {'store (both, and the update in flight)':>40}")
    for row in rows:
        print(f"{row['children']:8} {row['world']:8.2f} {row['federation']:11.2f} {row['object_store']:40.2f}")
    return {"rows": rows}
