"""The small runs whose bits are compared, and what is compared of them."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from support.worlds import TINY_MODEL, client, crowd, two_levels
from worldlm_ray.config.loading import from_mapping
from worldlm_ray.plan import plan as plans
from worldlm_ray.simulation.simulator import simulate

KEYS = {"key_layers": ["model.embed_tokens.*", "model.layers.1.*"]}
SYNCHRONOUS = {"trigger": "synchronous"}
CHOOSING = {"validation_fraction": 0.05}
"""Text on which a client of two models chooses."""


def mixed(folder: Path) -> list[dict[str, Any]]:
    """A federation that is twice as slow as the other, and a client at the world itself."""
    slow = {"tokens_per_s": 400.0, "latency_s": 0.3}
    north, south = two_levels(folder)
    return [north, south | {"simulation": slow}, client("own", folder, 5)]


def private(folder: Path) -> list[dict[str, Any]]:
    """One federation of clients with record-level privacy, and one without."""
    north, south = two_levels(folder)
    return [north | {"privacy": {"unit": "record", "noise_multiplier": 0.8, "grad_sample_mode": "hooks"}}, south]


def guild(folder: Path) -> list[dict[str, Any]]:
    """A federation with client-level privacy: its own aggregator adds the noise."""
    clients = [client(name, folder, number) for number, name in enumerate("abc")]
    privacy = {"unit": "client", "max_grad_norm": 0.5, "target_epsilon": 80.0, "max_updates": 3}
    return [{"federation": "guild", "privacy": privacy, "children": clients}]


CASES: dict[str, tuple[Callable[[Path], list[dict[str, Any]]], dict[str, Any]]] = {
    "flat": (lambda f: [client(n, f, i) for i, n in enumerate("abc")], {"aggregation": SYNCHRONOUS}),
    "tree": (
        two_levels,
        {"aggregation": SYNCHRONOUS, "merge": {"client": "validated", "federation": 0.5}, "data": CHOOSING},
    ),
    "key_layers": (
        two_levels,
        {
            "aggregation": SYNCHRONOUS | {"attention": {"score": "cosine"}},
            "model": TINY_MODEL | KEYS,
            "merge": {"client": 0.5, "federation": 0.7},
        },
    ),
    "routed_key_layers": (
        two_levels,
        {"aggregation": SYNCHRONOUS | {"residuals": {"per_round": 2, "threshold": 1.0}}, "model": TINY_MODEL | KEYS},
    ),
    "int8": (two_levels, {"aggregation": SYNCHRONOUS, "exchange": {"codec": "int8"}}),
    "int4_momentum": (
        two_levels,
        {
            "aggregation": SYNCHRONOUS | {"server_optimizer": {"name": "nesterov", "lr": 0.7, "momentum": 0.9}},
            "exchange": {"codec": "int4"},
        },
    ),
    "median": (two_levels, {"aggregation": SYNCHRONOUS | {"robust": {"rule": "median"}}}),
    "private": (private, {"aggregation": SYNCHRONOUS}),
    "private_clients": (guild, {"aggregation": SYNCHRONOUS}),
    "shared_process": (
        lambda f: [
            {"federation": "north", "resources": {"clients_per_process": 3}, "children": [crowd("phone", f, copies=4)]}
        ],
        {"aggregation": SYNCHRONOUS, "merge": {"client": "validated"}, "data": CHOOSING},
    ),
    "asynchronous": (mixed, {"aggregation": {"trigger": "goal_achieved", "staleness": {"fn": "polynomial"}}}),
    "overlap": (mixed, {"exchange": {"overlap": True}, "simulation": {"latency_s": 0.4}, "merge": {"client": 0.5}}),
    "faults": (
        mixed,
        {
            "faults": [
                "1.5s kill world/north/a for 1s",
                "2.2s kill world/south for 1s",
                "3s drop world/north/b for 1s",
            ],
            "liveness": {"heartbeat_s": 0.5},
            "checkpoint": {"every_s": 0.5},
            "budget": {"rounds": 5},
        },
    ),
}


def entropy() -> Callable[[int], bytes]:
    """Stands for the operating system's entropy: other bytes for each of our calls, the same in every run."""
    real, numbers = os.urandom, itertools.count()

    def drawn(size: int) -> bytes:
        if not sys._getframe(1).f_globals["__name__"].startswith("worldlm_ray"):
            return real(size)
        return np.random.Generator(np.random.PCG64(next(numbers))).bytes(size)

    return drawn


def outcome(name: str, folder: Path) -> dict[str, Any]:
    """What is compared of a run: the bits of the world's model, and each node's losses and counts."""
    children, changes = CASES[name]
    raw: dict[str, Any] = {
        "name": name,
        "run_dir": str(folder / "run"),
        "model": TINY_MODEL,
        "budget": {"rounds": 3},
        "merge": {"client": 1.0},
        "training": {"local_steps": 4, "batch_size": 4},
        "evaluation": {"tokens": 64, "final_tokens": 128},
        "data": {"cache_dir": str(folder / "cache"), "validation_fraction": 0.0},
        "world": {"children": children(folder)},
    }
    changed = raw | changes | {"data": raw["data"] | changes.get("data", {})}
    with patch.object(os, "urandom", entropy()):
        done = simulate(plans.make_plan(from_mapping(changed)))
    nodes = {
        path: {key: node[key] for key in ("loss", "steps", "tokens", "version") if key in node}
        for path, node in done.summary["nodes"].items()
    }
    return {"params_sha256": done.summary["params_sha256"], "wall_s": done.summary["wall_s"], "nodes": nodes}
