"""Bits of small synchronous and asynchronous runs, as they were before: a change that computes nothing new keeps them.

The values stand in tests/golden.json, with the kind of processor that computed them. Other processors add in another
order: there the losses are compared, to a thousandth. `PYTHONPATH=tests python tests/unit/test_golden.py` writes the
file anew, for a change that is meant to compute something else; the commit says why.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from support.worlds import TINY_MODEL, client, crowd, two_levels

from worldlm_ray.config.loading import from_mapping
from worldlm_ray.plan import plan as plans
from worldlm_ray.simulation.simulator import simulate

FILE = Path(__file__).resolve().parents[1] / "golden.json"
KEYS = {"key_layers": ["model.embed_tokens.*", "model.layers.1.*"]}
SYNCHRONOUS = {"trigger": "synchronous"}


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
    "tree": (two_levels, {"aggregation": SYNCHRONOUS, "merge": {"client": "adaptive", "federation": "adaptive"}}),
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
        {"aggregation": SYNCHRONOUS, "merge": {"client": "adaptive"}},
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
        "training": {"local_steps": 4, "batch_size": 4},
        "evaluation": {"tokens": 64, "final_tokens": 128},
        "data": {"cache_dir": str(folder / "cache")},
        "world": {"children": children(folder)},
    }
    with patch.object(os, "urandom", entropy()):
        done = simulate(plans.make_plan(from_mapping(raw | changes)))
    nodes = {
        path: {key: node[key] for key in ("loss", "steps", "tokens", "version") if key in node}
        for path, node in done.summary["nodes"].items()
    }
    return {"params_sha256": done.summary["params_sha256"], "wall_s": done.summary["wall_s"], "nodes": nodes}


def processor() -> str:
    """What decides in which order numbers are added."""
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} torch {torch.__version__.partition('+')[0]}"


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", CASES)
def test_the_bits_of_a_run_are_those_of_before(golden: dict[str, Any], tmp_path: Path, name: str) -> None:
    found, before = outcome(name, tmp_path), golden["runs"][name]
    if golden["processor"] == processor():
        assert found == before
    losses = {path: node.pop("loss", None) for path, node in found["nodes"].items()}
    expected = {path: node.pop("loss", None) for path, node in before["nodes"].items()}
    assert found["nodes"] == before["nodes"]
    assert losses == {path: loss and pytest.approx(loss, rel=1e-3) for path, loss in expected.items()}


if __name__ == "__main__":
    runs = {}
    for case in CASES:
        with tempfile.TemporaryDirectory() as place:
            runs[case] = outcome(case, Path(place))
            print(case, runs[case]["params_sha256"][:12])
    FILE.write_text(json.dumps({"processor": processor(), "runs": runs}, indent=1) + "\n", encoding="utf-8")
