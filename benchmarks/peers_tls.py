"""An update over TLS with client authentication and the model back: ours, Flower's and NVFlare's, in one run.

One member and its parent, processes on this machine, without training. Ours is the gateway, a node behind it in
another process, and a link, as in benchmarks/gateway.py; the node aggregates each update at once. Flower is a SuperLink
with TLS and authenticated SuperNodes, NVFlare a provisioned server with mutual TLS. Both run FedAvg with one client,
which returns what it got, and a round of theirs has their polls and starts of processes in it. An exchange of 1,000
parameters is measured, too, and taken off in the last columns: what remains is the price of the bytes. Larger models go
through ours alone, where memory suffices.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.exchange import PEERS, PINNED, python_of
from benchmarks.gateway import link_to, served
from benchmarks.gateway_processes import layout_of
from worldlm_ray.exchange.messages import Update, pack_header, unpack_model
from worldlm_ray.gateway.link import Link

SIZE, EMPTY = 29_000_000, 1_000
"""Parameters that are compared, and of an exchange with next to nothing in it."""
LARGER = (128_000_000, 550_000_000)
WARM, ROUNDS, PEER_ROUNDS = 2, 7, 4
"""Of a peer's rounds the first does not count."""
COPIES = 10
"""Of a model's fp32 bytes, that must be free for ours: five in the processes, and five in shared memory."""
TARGET = 5.0


def ours(size: int) -> list[float]:
    """Seconds of push, aggregation and pull together, of each round."""
    with served(size, alone=True) as (member, port, _):
        return asyncio.run(_rounds(link_to(member, port, size), size))


async def _rounds(link: Link, size: int) -> list[float]:
    layout, values, found = layout_of(size), np.random.default_rng(0).standard_normal(size, np.float32), []
    try:
        to = (await link.join("a", 1, 0)).incarnation
        for seq in range(1, WARM + ROUNDS + 1):
            fields: dict[str, Any] = {"sender": "a", "seq": seq, "base_version": seq - 1, "tokens": 10}
            header = pack_header(Update(**fields, started_tokens=10 * seq, values=values), layout)
            began = time.perf_counter()
            verdict = await link.push("a", 1, to, header, values)
            model = await link.pull("a", 1, to, 10 * seq)
            found.append(time.perf_counter() - began)
            assert verdict.accepted, verdict
            assert unpack_model(model, layout).version == seq
            del model  # before the next one comes
    finally:
        await link.close()
    return found[WARM:]


def peer(name: str, script: str) -> dict[int, list[float]]:
    """Seconds of each round of a peer, by size.

    Raises:
        RuntimeError: it does not work here: the end of what it has said.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = [str(PEER_ROUNDS), folder, str(EMPTY), str(SIZE)]
        command = [str(python_of(name)), str(PEERS / script), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1_800, check=False)
    if done.returncode:
        raise RuntimeError(f"{PINNED[name]}: {done.stderr[-2_000:]}")
    rounds = json.loads(done.stdout.strip().splitlines()[-1])["rounds_s"]
    return {int(size): seconds[1:] for size, seconds in rounds.items()}


def run() -> dict[str, Any]:
    """Measure all, ours before and after the peers, and print a table."""
    sides: dict[str, dict[int, list[float]]] = {"worldlm_ray": {EMPTY: ours(EMPTY), SIZE: ours(SIZE)}}
    for name in ("flower", "nvflare"):
        print(f"  {PINNED[name]} ...", flush=True)
        sides[PINNED[name]] = peer(name, f"{name}_tls.py")
    sides["worldlm_ray"][SIZE] += ours(SIZE)
    rows, load = [_row(name, found) for name, found in sides.items()], os.getloadavg()[0]
    print(f"{SIZE / 1e6:.0f}M parameters, {4 * SIZE / 1e6:.0f} MB in fp32, up and down; medians; load {load:.1f}")
    print(f"{'':16} {'s':>7} {'least':>7} {'most':>7} {'times ours':>11} {'s, bytes':>9} {'times ours':>11}")
    for row in rows:
        row["times"], row["bytes_times"] = (row[key] / rows[0][key] for key in ("s", "bytes_s"))
        columns = f"{row['s']:7.2f} {row['least']:7.2f} {row['most']:7.2f} {row['times']:11.1f}"
        print(f"{row['side']:16} {columns} {row['bytes_s']:9.2f} {row['bytes_times']:11.1f}")
    print(f"target: both peers at least {TARGET:.0f} times ours")
    return {"rows": rows, "larger": [_larger(size) for size in LARGER], "load": load}


def _row(side: str, found: dict[int, list[float]]) -> dict[str, Any]:
    seconds, empty_s = found[SIZE], statistics.median(found[EMPTY])
    took = statistics.median(seconds)
    return {"side": side, "s": took, "least": min(seconds), "most": max(seconds), "bytes_s": took - empty_s}


def _larger(size: int) -> dict[str, Any]:
    """Ours alone."""
    text, wanted, free = f"{size / 1e6:.0f}M parameters, {4 * size / 1e6:,.0f} MB", COPIES * 4 * size, _free_bytes()
    if free < wanted:
        print(f"{text}: left out: {free / 1e9:.1f} GB of memory are free, and {wanted / 1e9:.1f} GB are needed")
        return {"size": size, "s": None}
    found = ours(size)
    took = statistics.median(found)
    print(f"{text}: {took:.2f} s, {min(found):.2f} to {max(found):.2f}")
    return {"size": size, "s": took, "least": min(found), "most": max(found)}


def _free_bytes() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1_024
    raise OSError("/proc/meminfo has no MemAvailable")
