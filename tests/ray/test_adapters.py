"""A world of adapters on Ray: a client, then a federation are killed; nothing is lost, and an export can be loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.killing import Killer, check
from support.pretrained import save_pretrained
from support.worlds import two_levels

from worldlm_ray.config.loading import from_mapping
from worldlm_ray.experiments.evaluate import sound_theta
from worldlm_ray.plan import build, rundir
from worldlm_ray.plan.plan import make_plan

pytest.importorskip("peft")
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(600)]


def test_a_killed_client_of_adapters_comes_back_and_nothing_is_lost(cluster: None, tmp_path: Path) -> None:
    base = save_pretrained(tmp_path / "base")
    raw: dict[str, Any] = {
        "run_dir": str(tmp_path / "run"),
        "data": {"cache_dir": str(tmp_path / "cache")},
        "model": {"backend": "transformers", "initial_from": str(base), "trainable": "lora", "context": 16},
        "budget": {"rounds": 8},
        "training": {"local_steps": 4, "batch_size": 4, "lr": 1e-2, "step_delay_s": 0.25},
        "evaluation": {"tokens": 256, "final_tokens": 256},
        "checkpoint": {"every_s": 3.0, "every_updates": 6},
        "liveness": {"heartbeat_s": 0.5},
        "world": {"children": two_levels(tmp_path)},
    }
    plan = rundir.create(make_plan(from_mapping(raw)))
    killer = Killer(plan, [(6, 0.0, "world/north/a"), (12, 0.0, "world/south")])
    check(plan, killer.train())
    assert killer.hit == 2
    before, after = build.initial(plan), sound_theta(plan, plan.root)
    assert np.abs(after - before).max() > 1e-3
