"""Worlds of clients that mix experts, and a trainer of one whose experts are all at random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from support import worlds
from worldlm_ray.config.loading import from_mapping
from worldlm_ray.experiments.methods import configure
from worldlm_ray.plan.plan import Plan, make_plan
from worldlm_ray.training.making import plain_trainer


def raw(folder: Path, model: Path, **changes: Any) -> dict[str, Any]:
    """Two federations of two clients on a small model with adapters."""
    found: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "data": {"cache_dir": str(folder / "cache")},
        "model": {"backend": "transformers", "initial_from": str(model), "context": 16, "trainable": "lora"},
        "budget": {"rounds": 4},
        "training": {"local_steps": 4, "batch_size": 4, "lr": 2e-2},
        "evaluation": {"tokens": 256, "final_tokens": 256, "every_rounds": 0},
        "world": {"children": worlds.two_levels(folder)},
    }
    return found | changes


def plan_of(folder: Path, model: Path, method: str = "kin", *, freeze_a: bool = False, **changes: Any) -> Plan:
    mapping = raw(folder, model, **changes)
    mapping["model"]["lora"] = {"freeze_a": freeze_a}
    return make_plan(configure(from_mapping(mapping), method))


def trainer_with_experts(plan: Plan, *, seed: int = 0) -> Any:
    """A trainer whose own adapter, experts of others and routers are all at random."""
    trainer: Any = plain_trainer(plan.shape, plan.layout, plan.root.clients[0].settings)
    rng = np.random.default_rng(seed)
    trainer.write(rng.normal(scale=0.3, size=plan.layout.size).astype(np.float32))
    trainer.take_experts(
        {n: rng.normal(scale=0.3, size=plan.layout.size).astype(np.float32) for n in trainer.experts.others}
    )
    torch.manual_seed(seed)
    trainer.experts.router.normal_(std=0.3)
    return trainer


def tokens(batch: int = 2) -> Any:
    return torch.randint(256, (batch, 17), generator=torch.Generator().manual_seed(0))
