"""Faults on purpose in real processes: whoever is killed, nothing is lost and nothing applied twice."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from worldlm_ray import launch, rundir
from worldlm_ray.audit import proofs
from worldlm_ray.plan import Plan

pytestmark = [pytest.mark.ray, pytest.mark.slow]
Tiny = Callable[..., Plan]
ROUNDS = 8


def run(tiny: Tiny, folder: Path, faults: list[str], **changes: Any) -> tuple[Plan, dict[str, Any]]:
    """A run of two federations of two clients, whose rounds take about a second each."""
    settings: dict[str, Any] = {
        "budget": {"rounds": ROUNDS},
        "training": {"local_steps": 4, "batch_size": 4, "step_delay_s": 0.25},
        "checkpoint": {"every_s": 3.0, "every_updates": 6},
        "liveness": {"heartbeat_s": 0.5},
        "faults": faults,
    }
    plan = tiny(**(settings | changes))
    plan = rundir.create(replace(plan, config=replace(plan.config, run_dir=str(folder))))
    return plan, launch.train(plan).summary


def check(plan: Plan, summary: dict[str, Any]) -> list[Any]:
    """Every client has trained its budget, and every update is in its parent's model once."""
    found = proofs(plan.run_dir)
    for proof in found:
        assert proof.holds, proof
    applied = {f"{proof.node}/{proof.sender}": len(proof.applied) for proof in found}
    for spec in plan.root.clients:
        assert summary["nodes"][spec.path]["steps"] == ROUNDS * 4, spec.path
        assert applied[spec.path] == ROUNDS, spec.path
    assert summary["status"] == "finished"
    return found


@pytest.mark.parametrize("trigger", ["goal_achieved", "synchronous"])
def test_whoever_is_killed_nothing_is_lost(cluster: None, tiny: Tiny, tmp_path: Path, trigger: str) -> None:
    kills = ["7s kill world", "8s kill world/north", "9s kill world/south/c", "12s kill world", "13s kill world/south"]
    seldom = {"every_s": 60.0, "every_updates": 6}  # so that there is something to be undone
    plan, summary = run(tiny, tmp_path / "run", kills, aggregation={"trigger": trigger}, checkpoint=seldom)
    found = check(plan, summary)
    assert sum(proof.again for proof in found) > 0, "no kill undid anything: the test tests nothing"


def test_links_fail_and_storage_refuses(cluster: None, tiny: Tiny, tmp_path: Path) -> None:
    faults = [
        "1s cut world/north for 4s",
        "2s drop world/south/c for 2s",
        "2s repeat world/south for 3s",
        "3s corrupt world/south/d for 2s",
        "3s delay world/north/a by 0.5s for 3s",
        "1s disk world for 5s",
        "4s disk world/north/b for 3s",
    ]
    plan, summary = run(tiny, tmp_path / "run", faults)
    check(plan, summary)


def test_at_any_moment(cluster: None, tiny: Tiny, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Soak: every kind of actor killed at twenty random moments; a few of them otherwise."""
    rng = random.Random(7)
    moments = 20 if request.config.getoption("--soak") else 1
    for kind in ("world", "world/north", "world/south/d"):
        for number in range(moments):
            at_s = rng.uniform(0.5, 9.0)
            folder = tmp_path / f"{kind.replace('/', '-')}-{number}"
            plan, summary = run(tiny, folder, [f"{at_s:.2f}s kill {kind}"])
            check(plan, summary)
