"""Time of an exchange without training, in copies of the model: ours, Flower's, NVFlare's and APPFL's, in one run.

Four clients and a world, a process each, on this machine. A client pulls, and pushes an update that it has ready: what
is left is the exchange itself, which is pull, push, check, fold, and publishing the next model. The peers exchange as
many fp32 parameters in rounds of FedAvg, their clients returning what they got. Twice: with 127 million parameters, for
which not every peer's memory suffices, and with 29 million.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors.drivers import RayLink, carried, wait_for
from actors.recorder import RecorderActor
from actors.shared import RECORDER, Address
from actors.world import WorldActor
from worldlm_ray.config.loading import from_mapping
from worldlm_ray.exchange.messages import Model, Update
from worldlm_ray.exchange.outbox import Outbox
from worldlm_ray.exchange.replies import Verdict, Welcome
from worldlm_ray.launch import cluster
from worldlm_ray.plan.plan import Plan, make_plan
from worldlm_ray.protocol.child import Uplink
from worldlm_ray.run_clock import RunClock

CLIENTS, ROUNDS = 4, 10
PEERS = Path(__file__).parent / "peers"
PINNED = {"flower": "flwr==1.41.0", "nvflare": "nvflare==2.9.0", "appfl": "appfl==1.12.0"}
"""What is measured stands in the tables, so it must not change by itself."""
LAYERS = (18, 4)
"""Of the sizes that are measured."""
WARM = 8
"""Rounds that do not count: until every process has touched all memory that it shares with the others."""

PEER_WARM, PEER_ROUNDS = 2, 6
"""Their rounds do not become faster with time."""
SLOW_ROUNDS = 4
"""Of the slowest peer; the first does not count."""


class Idle:
    """A client without training: what `Uplink` asks of a child, and updates that are ready beforehand."""

    def __init__(self, address: Address) -> None:
        plan = address.plan
        self.name, self.layout = plan.node(address.path).name, plan.layout
        self.incarnation, self.seq, self.outbox = 1, 0, Outbox()
        self.started_tokens = 0
        self.link = RayLink(address, self)
        self.uplink = Uplink(plan, address.path, self, tell=lambda record: None, now_s=address.clock.now_s)
        self.values = np.full(plan.layout.size, 1e-6, np.float32)

    def welcomed(self, welcome: Welcome) -> None:
        """Nothing to learn."""

    def answered(self, seq: int, verdict: Verdict) -> None:
        """Keep nothing: what checkpoints cost is not what is measured here."""
        assert verdict.accepted, verdict
        self.outbox.durable(seq)

    def ready(self) -> None:
        """Join the parent."""
        wait_for(carried(self.uplink.join(), self.link))

    def exchange(self, rounds: int) -> tuple[float, float]:
        """So many times pull and push; returns when it began and ended."""
        began = time.monotonic()
        for _ in range(rounds):
            model = wait_for(carried(self.uplink.pull(), self.link))
            assert isinstance(model, Model)
            self.seq += 1
            update = Update(
                sender=self.name,
                seq=self.seq,
                base_version=model.version,
                tokens=100,
                started_tokens=100 * self.seq,
                values=self.values,
            )
            self.outbox.add(update)
            wait_for(carried(self.uplink.push(update), self.link))
        return began, time.monotonic()


def plan_for(folder: str, layers: int = LAYERS[0], preset: str = "125m", **rules: Any) -> Plan:
    """A world of four clients; a model of so many layers (of 125m's: 7 million parameters each), all backbone."""
    raw = {
        "run_dir": folder,
        "model": {"preset": preset, "layers": layers, "key_layers": []},
        "budget": {"rounds": 1_000},
        "checkpoint": {"every_s": 1e9, "every_updates": 10**9},
        "aggregation": rules,
        "world": {"children": [{"client": f"c{i}", "data": {"corpus": "python_reference"}} for i in range(CLIENTS)]},
    }
    return make_plan(from_mapping(raw))


def ours(plan: Plan) -> float:
    """Seconds per update through real actors, on a cluster that is connected."""
    clock, namespace = RunClock.starting(), f"exchange-{time.time_ns()}"
    options: dict[str, Any] = {"num_cpus": 0, "namespace": namespace}
    recorder = ray.remote(RecorderActor).options(name=RECORDER, **options).remote(plan)
    ray.get(recorder.ready.remote())
    actor = ray.remote(WorldActor).options(name="world", max_concurrency=1_000, **options)
    world = actor.remote(Address(plan, "world", clock, namespace))
    ray.get(world.ready.remote())
    ray.get(world.start.remote())
    made = ray.remote(Idle).options(**options)
    clients = [made.remote(Address(plan, spec.path, clock, namespace)) for spec in plan.root.clients]
    ray.get([client.ready.remote() for client in clients])
    ray.get([client.exchange.remote(WARM) for client in clients])
    spans = ray.get([client.exchange.remote(ROUNDS) for client in clients])
    for gone in (*clients, world, recorder):
        ray.kill(gone)
    began, ended = min(span[0] for span in spans), max(span[1] for span in spans)
    return (ended - began) / (CLIENTS * ROUNDS)


def copy_s(size: int) -> float:
    """Seconds of one numpy copy of so many fp32 numbers, into memory that is there already; median of 9."""
    source, target = np.ones(size, np.float32), np.ones(size, np.float32)
    times = []
    for _ in range(9):
        began = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def python_of(peer: str) -> Path:
    """The interpreter of a peer's own virtual environment, which is made once: below $PEERS_DIR, or in out/."""
    place = Path(os.environ.get("PEERS_DIR", Path(__file__).parent / "out")) / f"venv-{PINNED[peer]}"
    python = place / "bin" / "python"
    if not (place / "ready").exists():
        print(f"  (installing {PINNED[peer]} in its own environment)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-qqq", PINNED[peer]], check=True)
        (place / "ready").touch()
    return python


class OutOfMemoryError(Exception):
    """A peer's process was killed."""


def flower(size: int) -> float:
    """Seconds per update; raises `OutOfMemoryError` where this machine's memory is too small for it."""
    python, script = str(python_of("flower")), str(PEERS / "flower_exchange.py")
    port = _free_port()
    quiet: dict[str, Any] = {"stderr": subprocess.DEVNULL, "text": True}
    rounds = PEER_ROUNDS + PEER_WARM
    server = subprocess.Popen(
        [python, script, "server", port, str(size), str(CLIENTS), str(rounds)], stdout=subprocess.PIPE, **quiet
    )
    clients = [
        subprocess.Popen([python, script, "client", port], stdout=subprocess.DEVNULL, **quiet) for _ in range(CLIENTS)
    ]
    try:
        out, _ = server.communicate(timeout=1_800)
    finally:
        lost = [process for process in (server, *clients) if process.poll() == -signal.SIGKILL]
        for process in (server, *clients):
            process.kill()
            process.wait()
    if lost:
        raise OutOfMemoryError
    return _per_update(out, skip=PEER_WARM)


def nvflare(size: int) -> float:
    """Seconds per update; raises `OutOfMemoryError` where this machine's memory is too small for it."""
    script = str(PEERS / "nvflare_exchange.py")
    with tempfile.TemporaryDirectory() as folder:
        command = [str(python_of("nvflare")), script, str(size), str(CLIENTS), str(PEER_ROUNDS + PEER_WARM + 1), folder]
        done = subprocess.run(command, capture_output=True, text=True, timeout=3_600, check=False)
    if done.returncode:
        if "-9" in done.stderr:
            raise OutOfMemoryError
        raise RuntimeError(done.stderr[-2_000:])
    # Its rounds are the times between arrivals, one fewer than the models.
    return _per_update(done.stdout, skip=PEER_WARM)


def appfl(size: int) -> float:
    """Seconds per update; raises `OutOfMemoryError` where this machine's memory is too small for it."""
    python, script = str(python_of("appfl")), str(PEERS / "appfl_exchange.py")
    port, quiet = _free_port(), dict[str, Any](stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with tempfile.TemporaryDirectory() as folder:
        numbers = [str(number) for number in (size, CLIENTS, SLOW_ROUNDS)]
        server = subprocess.Popen([python, script, "server", port, *numbers, folder], **quiet)
        clients = [
            subprocess.Popen([python, script, "client", port, f"c{i}", str(SLOW_ROUNDS), folder], **quiet)
            for i in range(CLIENTS)
        ]
        try:
            while server.poll() is None and any(client.poll() is None for client in clients):
                time.sleep(0.5)
            ended = {process.poll() for process in (server, *clients)} - {None, 0}
            if -signal.SIGKILL in ended:
                raise OutOfMemoryError
            if ended:
                raise RuntimeError(f"{PINNED['appfl']}: a process ended with {ended}; run {script} by hand")
        finally:
            for process in (server, *clients):
                process.kill()
                process.wait()
        arrivals = [json.loads(path.read_text()) for path in Path(folder).glob("arrivals-*.json")]
    spans = [[b - a for a, b in itertools.pairwise(times)] for times in arrivals]
    return statistics.median(statistics.mean(row) for row in list(zip(*spans, strict=True))[1:]) / CLIENTS


def _free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def _per_update(out: str, *, skip: int) -> float:
    rounds = json.loads(out.strip().splitlines()[-1])["rounds_s"][skip:]
    return statistics.median(rounds) / CLIENTS


def run() -> dict[str, Any]:
    """Measure all, with a numpy copy before and after each, and print a table per size."""
    rows = [row for layers in LAYERS for row in _table(layers)]
    print("target: at most 6 copies, and the fastest peer at least 10 times ours")
    return {"rows": rows}


def _table(layers: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        plan = plan_for(f"{folder}/run", layers)
        size = plan.layout.size
        sides: dict[str, Callable[[], float]] = {
            "worldlm_ray, asynchronous": lambda: connected(plan),
            "worldlm_ray, synchronous": lambda: connected(
                plan_for(f"{folder}/synchronous", layers, trigger="synchronous")
            ),
            PINNED["flower"]: lambda: flower(size),
            PINNED["nvflare"]: lambda: nvflare(size),
            PINNED["appfl"]: lambda: appfl(size),
        }
        for name, measure in sides.items():
            before = copy_s(size)
            print(f"  {name}, {size / 1e6:.0f}M parameters ...", flush=True)
            try:
                took = measure()
            except OutOfMemoryError:
                took = None
            copy = (before + copy_s(size)) / 2
            rows.append({"side": name, "size": size, "update_s": took, "copy_s": copy})
    print(f"{size / 1e6:.0f}M parameters in fp32, {4 * size / 1e6:.0f} MB; {CLIENTS} clients")
    print(f"{'':28} {'s per update':>13} {'numpy copies':>13} {'times ours':>11}")
    for row in rows:
        if row["update_s"] is None:
            print(f"{row['side']:28} ran out of this machine's memory")
            continue
        row["copies"] = row["update_s"] / row["copy_s"]
        times = row["update_s"] / rows[0]["update_s"]
        print(f"{row['side']:28} {row['update_s']:13.3f} {row['copies']:13.1f} {times:11.1f}")
    return rows


def connected(plan: Plan) -> float:
    """Seconds per update, on its own cluster."""
    with cluster.connected(plan, None):
        return ours(plan)
