"""Worlds of two federations whose adapters have unlike ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support import worlds
from support.nodes import pulled
from worldlm_ray.client.client import Client
from worldlm_ray.config.loading import from_mapping
from worldlm_ray.exchange.messages import Model, Update
from worldlm_ray.model.smaller_rank import SmallerRank
from worldlm_ray.plan.plan import Plan, make_plan
from worldlm_ray.tensors.buffers import Flat

WORLD, SMALL = 8, 2


def raw(folder: Path, model: Path, **changes: Any) -> dict[str, Any]:
    """Federations north (rank 8) and south (rank 2) of one client each, in step."""
    found: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "data": {"cache_dir": str(folder / "cache")},
        "model": {
            "backend": "transformers",
            "initial_from": str(model),
            "context": 16,
            "trainable": "lora",
            "lora": {"r": WORLD, "alpha": 16},
        },
        "merge": {"client": 1.0},
        "aggregation": {"trigger": "synchronous"},
        "budget": {"rounds": 2},
        "training": {"local_steps": 4, "batch_size": 4, "lr": 2e-2},
        "evaluation": {"tokens": 256, "final_tokens": 256},
        "world": {
            "children": [
                {"federation": "north", "children": [worlds.client("a", folder, 1)]},
                {
                    "federation": "south",
                    "training": {"lora_rank": SMALL},
                    "children": [worlds.client("b", folder, 2)],
                },
            ]
        },
    }
    return found | changes


def plan_of(folder: Path, model: Path, **changes: Any) -> Plan:
    return make_plan(from_mapping(raw(folder, model, **changes)))


def small_of(plan: Plan) -> tuple[Client, SmallerRank]:
    """The client of south, and its rank."""
    client = Client(plan, plan.node("world/south/b"))
    assert client.rank is not None
    return client, client.rank


def some(plan: Plan, seed: int = 0) -> Flat:
    """Adapters of the world's rank, at random."""
    return np.random.default_rng(seed).normal(scale=0.3, size=plan.layout.size).astype(np.float32)


def model(values: Flat, version: int = 1, **more: Any) -> Model:
    return pulled(values, version, **{"tokens": 1.0} | more)


def scales(root: Any) -> list[float]:
    """What B A is multiplied by, of every adapted layer."""
    return [layer.scaling["default"] for layer in root.modules() if hasattr(layer, "lora_A")]


def record(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Update]]:
    """Every update that clients make from now on, by path."""
    made: dict[str, list[Update]] = {}
    update = Client.update

    def kept(client: Client) -> Update:
        found = update(client)
        made.setdefault(client.spec.path, []).append(replace(found, values=np.array(found.values)))
        return found

    monkeypatch.setattr(Client, "update", kept)
    return made
