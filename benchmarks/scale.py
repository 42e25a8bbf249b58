"""Cost of an update at a node with 10 to 10,000 children; and what processes and calls add to an update.

Without Ray and without training, updates go straight into the state machine (pull, push, fold, aggregation,
publishing), which is what grows with the number of children if anything does. Then four clients exchange a model of
184,000 parameters over Ray: what is left is the calls.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import Any

import numpy as np

from benchmarks import exchange
from worldlm_ray.aggregation.events import Joined, Pull, Push, Saved, Shared
from worldlm_ray.aggregation.node import Node
from worldlm_ray.aggregation.node_setup import NodePlace, NodeRules
from worldlm_ray.config.federated import AggregationConfig, MergeConfig
from worldlm_ray.config.schema import BudgetConfig
from worldlm_ray.exchange.messages import Packed, Update, pack
from worldlm_ray.tensors.buffers import frozen
from worldlm_ray.tensors.layout import Layout, make_layout

CHILDREN = (10, 100, 1_000, 10_000)
SIZES = {"1.3M parameters (nano)": 1_300_000, "13M parameters": 13_000_000}
KEYS = 4
"""Key layers, a twentieth of the parameters each."""
UPDATES = 300


def layout_of(size: int) -> Layout:
    """A backbone and key layers."""
    part = size // 20
    shapes = [(f"model.layers.{i}.weight", (part,)) for i in range(KEYS)] + [("model.body", (size - KEYS * part,))]
    return make_layout(shapes, [f"model.layers.{i}.*" for i in range(KEYS)], layers=KEYS)


def seconds_per_update(layout: Layout, children: int) -> float:
    """Median over updates, each of another child in turn."""
    names = tuple(f"c{index}" for index in range(children))
    node = Node(
        NodePlace(path="world", children=names, has_parent=False),
        NodeRules(aggregation=AggregationConfig(), merge=MergeConfig(), budget=BudgetConfig(rounds=10**6)),
        layout,
        frozen(np.zeros(layout.size, np.float32)),
    )
    for name in names:
        node.handle(Joined(child=name, incarnation=1, seq=0, now_s=0.0))
    values = np.full(layout.size, 1e-4, np.float32)
    times, shared = [], np.empty(layout.size, np.float32)
    for number in range(UPDATES):
        name = names[number * 7 % children]
        seq = node.children[name].last_seq + 1
        update = Update(
            sender=name, seq=seq, base_version=node.version, tokens=100, started_tokens=100 * seq, values=values
        )
        packed = pack(update, layout)
        began = time.perf_counter()
        node.handle(Pull(child=name, incarnation=1, to=1, started_tokens=100 * seq, now_s=0.0))
        node.handle(Push(sender=name, packed=Packed(packed.header, values), incarnation=1, to=1, now_s=0.0))
        np.copyto(shared, node.theta)  # a backend puts it into shared memory
        node.handle(Shared(own=node.theta, copy=shared))
        times.append(time.perf_counter() - began)
        if number % 50 == 0:
            node.handle(Saved(covered=node.covers()))  # as after a checkpoint
    assert node.version == UPDATES
    return statistics.median(times)


def run() -> dict[str, Any]:
    """Measure, and print a table."""
    rows = []
    print(f"{'':24} {'children':>9} {'ms per update':>14} {'against 10':>11}")
    for name, size in SIZES.items():
        layout = layout_of(size)
        first = None
        for children in CHILDREN:
            took = seconds_per_update(layout, children)
            first = first or took
            rows.append({"model": name, "children": children, "update_s": took, "ratio": took / first})
            print(f"{name:24} {children:9,} {1e3 * took:14.3f} {took / first:11.2f}")
    print("target: within 1.2 from 10 to 1,000")
    with tempfile.TemporaryDirectory() as folder:
        calls = exchange.connected(exchange.plan_for(folder, layers=3, preset="nano"))
    print(f"an update of nano over Ray: {1e3 * calls:.1f} ms")
    return {"rows": rows, "ray_update_s": calls}
