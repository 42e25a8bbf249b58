"""A private client on Ray whose budget is spent and that stays: it follows its parent, and blocks nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.worlds import client

from worldlm_ray import launch
from worldlm_ray.plan import rundir
from worldlm_ray.plan.plan import Plan
from worldlm_ray.reports import spending
from worldlm_ray.storage import checkpoint
from worldlm_ray.tracking import audit

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]
Tiny = Callable[..., Plan]


@pytest.mark.long
def test_a_paused_client_follows_until_the_run_ends(cluster: None, tiny: Tiny, tmp_path: Path) -> None:
    privacy = {"unit": "record", "noise_multiplier": 1.0, "target_epsilon": 2.0, "on_exhausted": "pause"}
    children = [
        client("spent", tmp_path, 1, privacy=privacy, training={"batch_size": 40}),
        client("free", tmp_path, 2, training={"step_delay_s": 0.4}),
    ]
    changes: dict[str, Any] = {"checkpoint": {"every_s": 0.0}, "liveness": {"heartbeat_s": 0.5}}
    plan = rundir.create(tiny(children, budget={"rounds": 16}, aggregation={"trigger": "synchronous"}, **changes))
    states: list[tuple[int, str]] = []

    def look(snapshot: dict[str, Any]) -> None:
        nodes = snapshot["nodes"]
        states.append((nodes["world/free"]["rounds"], nodes["world/spent"]["state"]))

    summary = launch.train(plan, on_progress=look).summary
    nodes = summary["nodes"]
    assert nodes["world/free"]["steps"] == 16 * 4
    rounds = nodes["world/spent"]["accepted"]
    assert 0 < rounds < 16
    assert nodes["world/spent"]["epsilon"] <= 2.0
    [row] = spending.statements(plan)
    assert (row.charges, row.rounds_left, row.then) == (rounds, 0, "pause")
    assert spending.unpaid(plan) == []
    assert "paused" in {state for _, state in states}
    found = checkpoint.load(checkpoint.folder(plan.run_dir, "world/spent"))
    assert found is not None
    assert found[0]["link"]["base_version"] > rounds + 1, "it went on taking its parent's model"
    assert all(proof.holds for proof in audit.proofs(plan.run_dir))
