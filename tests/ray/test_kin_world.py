"""A world of kin experts on Ray: clients and a federation are killed, one client leaves and is forgotten."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.killing import Killer, check
from support.pretrained import save_pretrained
from support.worlds import two_levels

from worldlm_ray import launch
from worldlm_ray.config.loading import from_mapping
from worldlm_ray.experiments.methods import configure
from worldlm_ray.plan import membership, rundir
from worldlm_ray.plan.plan import Plan, make_plan
from worldlm_ray.storage import checkpoint

pytest.importorskip("peft")
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(600)]


def kin(folder: Path, *, rounds: int) -> Plan:
    raw: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "data": {"cache_dir": str(folder / "cache")},
        "model": {
            "backend": "transformers",
            "initial_from": str(save_pretrained(folder / "base")),
            "trainable": "lora",
            "context": 16,
        },
        "budget": {"rounds": rounds},
        "training": {"local_steps": 4, "batch_size": 4, "lr": 1e-2, "step_delay_s": 0.25},
        "evaluation": {"tokens": 256, "final_tokens": 256},
        "checkpoint": {"every_s": 3.0},
        "liveness": {"heartbeat_s": 0.5},
        "world": {"children": two_levels(folder)},
    }
    return rundir.create(make_plan(configure(from_mapping(raw), "kin+asynchronous")))


def saved(plan: Plan, path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    found = checkpoint.load(checkpoint.folder(plan.run_dir, path))
    assert found is not None
    return found


def check_sums(plan: Plan, gone: str = "") -> None:
    """The sums in the checkpoints are those of the children's parts in theirs."""
    for node in plan.root.inner:
        held = [saved(plan, child.path)[1]["own_part.held"] for child in node.children if child.path != gone]
        np.testing.assert_array_equal(saved(plan, node.path)[1]["sums.total"], sum(held), err_msg=node.path)


def test_sums_hold_every_part_once_after_kills(cluster: None, tmp_path: Path) -> None:
    plan = kin(tmp_path, rounds=8)
    killer = Killer(plan, [(6, 0.0, "world/north/a"), (12, 0.0, "world/south")])
    check(plan, killer.train())
    check_sums(plan)


def test_a_client_leaves_a_living_run_and_is_forgotten(cluster: None, tmp_path: Path) -> None:
    plan = kin(tmp_path, rounds=16)
    seen: dict[str, Any] = {}
    thread = threading.Thread(target=lambda: seen.update(end=launch.train(plan, on_progress=seen.update).summary))
    thread.start()
    until = time.monotonic() + 90.0
    while seen.get("nodes", {}).get("world/north/a", {}).get("accepted", 0) < 3:
        assert time.monotonic() < until
        assert thread.is_alive()
        time.sleep(0.1)
    launch.leave(plan, membership.without(plan, "world/north/a"), "world/north/a", forget=True)
    thread.join(timeout=120.0)
    assert seen["end"]["status"] == "finished"
    meta, arrays = saved(plan, "world/north/a")
    assert arrays["own_part.adds"].any()
    np.testing.assert_array_equal(arrays["own_part.held"] + arrays["own_part.adds"], 0)
    assert meta["experts"]["own_part"]["pending"]["weight"] == 0
    check_sums(plan, gone="world/north/a")
