"""Passes over buffers at an inner node, in bytes per second, against a copy by as many threads: in one process.

Counted is what a pass must read and write once; a copy moves two bytes for each of the model's. The two are measured in
turn, and the ratio is the median over pairs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from worldlm_ray.aggregation.fold import Fold
from worldlm_ray.aggregation.server_optimizer import ServerOptimizer
from worldlm_ray.config.federated import AggregationConfig, ServerOptimizerConfig
from worldlm_ray.exchange.messages import Update
from worldlm_ray.tensors.buffers import THREADS, Flat, lerp, rough_norm, spread
from worldlm_ray.tensors.layout import Layout, make_layout

SIZE = 127_000_000
PAIRS = 15


def seconds(work: Callable[[], object]) -> float:
    """Of doing something once."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def copy(source: Flat, target: Flat) -> None:
    """What everything is compared with."""

    def work(parts: Iterable[slice]) -> None:
        for part in parts:
            np.copyto(target[part], source[part])

    spread(source.size, work)


def passes(layout: Layout) -> dict[str, tuple[int, Callable[[], object]]]:
    """Name of each pass, its bytes by those of the model, and the pass."""
    rng = np.random.Generator(np.random.PCG64(0))
    theta, values = rng.standard_normal(SIZE, np.float32), rng.standard_normal(SIZE, np.float32)
    flat, rules = np.empty(SIZE, np.float32), AggregationConfig()
    optimizers = {name: ServerOptimizer(ServerOptimizerConfig(name=name), SIZE) for name in ("sgd", "nesterov")}
    updates = [
        Update(sender=name, seq=1, base_version=0, tokens=100, started_tokens=100, values=values) for name in "abc"
    ]

    def fold(number: int) -> Fold:
        made = Fold(layout, rules, origin=theta[:0], first_s=0.0, buffer=flat)
        for update in updates[:number]:
            made.add(update, 0, theta)
        return made

    third = fold(2)

    def alone() -> None:
        fold(1).finish(theta, optimizers["sgd"], absent=[[], []])

    return {
        "admission: finite, and the norm": (1, lambda: rough_norm(values)),
        "one update becomes the next model": (3, alone),
        "two updates are folded": (3, lambda: fold(2)),
        "a third is folded in": (3, lambda: third.add(updates[2], 0, theta)),
        "sgd: the sum becomes the next model": (3, lambda: optimizers["sgd"].apply(flat, theta, scale=0.5)),
        "nesterov: the same": (5, lambda: optimizers["nesterov"].apply(flat, theta, scale=0.5)),
        "a child's merge": (3, lambda: lerp(theta, values, 0.5, out=flat)),
    }


def run() -> dict[str, Any]:
    """Measure all, and print a table."""
    layout = make_layout([("model.weight", (SIZE,))], [], layers=0)
    rows = list[dict[str, Any]]()
    source, target = np.ones(SIZE, np.float32), np.ones(SIZE, np.float32)
    for name, (units, work) in passes(layout).items():
        work()
        pairs = [(seconds(lambda: copy(source, target)), seconds(work)) for _ in range(PAIRS)]
        took = statistics.median(pair[1] for pair in pairs)
        ratios = sorted(units / took / (2 / copied) for copied, took in pairs)
        rows.append(
            {
                "pass": name,
                "s": took,
                "gb_per_s": 4e-9 * SIZE * units / took,
                "ratio": statistics.median(ratios),
                "quarters": [ratios[PAIRS // 4], ratios[-PAIRS // 4]],
                "copy_gb_per_s": 8e-9 * SIZE / statistics.median(pair[0] for pair in pairs),
            }
        )
    print(f"{SIZE / 1e6:.0f}M parameters in fp32, {THREADS} threads")
    print(f"{'':38} {'s':>7} {'GB/s':>7} {'of a copy':>10} {'middle half':>14}")
    for row in rows:
        low, high = row["quarters"]
        print(f"{row['pass']:38} {row['s']:7.3f} {row['gb_per_s']:7.1f} {row['ratio']:10.2f} {low:8.2f}-{high:.2f}")
    print(f"a copy: {statistics.median(row['copy_gb_per_s'] for row in rows):.1f} GB/s; target: 0.7 of it")
    return {"rows": rows}
