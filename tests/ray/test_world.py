"""Whole worlds on Ray, held against the simulator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.worlds import client

from worldlm_ray import launch
from worldlm_ray.plan import rundir
from worldlm_ray.plan.plan import Plan
from worldlm_ray.records import MergeRecord, Record
from worldlm_ray.simulation.simulator import simulate
from worldlm_ray.tracking.audit import proofs

pytestmark = [pytest.mark.ray, pytest.mark.slow]
Tiny = Callable[..., Plan]


def in_folder(plan: Plan, folder: Path) -> Plan:
    return rundir.create(replace(plan, config=replace(plan.config, run_dir=str(folder))))


def deep(folder: Path) -> list[dict[str, Any]]:
    """Four levels below the world, and a client at every one of them."""
    inner: list[dict[str, Any]] = [client("leaf", folder, 9)]
    for level in range(3):
        inner = [{"federation": f"f{level}", "children": inner}, client(f"c{level}", folder, level)]
    return inner


VALIDATED = {"client": "validated", "federation": 0.5}
RESIDUALS = {"residuals": {"per_round": 2, "threshold": 0.99, "max_age": 2}}


INT8 = {"codec": "int8"}


@pytest.mark.parametrize(
    ("merge", "rules", "exchanged"),
    [({}, {}, {}), (VALIDATED, RESIDUALS, {}), ({"client": 0.5}, RESIDUALS, INT8)],
    ids=["plain", "validated", "int8"],
)
def test_synchronous_mode_gives_the_same_bits_in_both_shells(
    cluster: None, tiny: Tiny, tmp_path: Path, merge: dict[str, Any], rules: dict[str, Any], exchanged: dict[str, Any]
) -> None:
    plan = tiny(aggregation={"trigger": "synchronous", **rules}, merge=merge, exchange=exchanged, budget={"rounds": 3})
    records: list[Record] = []
    simulated = simulate(in_folder(plan, tmp_path / "simulated"), on_record=records.append).summary
    if merge == VALIDATED:  # else the test would compare nothing new
        assert {record.m for record in records if isinstance(record, MergeRecord)} == {0.0, 0.5, 1.0}
    real = launch.train(in_folder(plan, tmp_path / "real")).summary
    assert real["params_sha256"] == simulated["params_sha256"]
    for path, node in simulated["nodes"].items():
        assert real["nodes"][path]["loss"] == node["loss"], path
        assert real["nodes"][path]["steps"] == node["steps"], path
        assert real["nodes"][path]["bytes_up"] == node["bytes_up"], path
        assert real["nodes"][path]["bytes_down"] == pytest.approx(node["bytes_down"], rel=0.01), path


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_world_of_any_depth_trains_asynchronously(cluster: None, tiny: Tiny, tmp_path: Path, depth: int) -> None:
    children = {
        1: lambda: [client("a", tmp_path, 1), client("b", tmp_path, 2)],
        2: lambda: None,
        4: lambda: deep(tmp_path),
    }[depth]()
    plan = tiny(children, budget={"rounds": 3})
    summary = launch.train(in_folder(plan, tmp_path / "run")).summary
    steps = 3 * plan.root.settings.training.local_steps
    for spec in plan.root.clients:
        node = summary["nodes"][spec.path]
        assert node["steps"] == steps
        assert node["accepted"] == 3
        assert node["loss"] < node["loss_start"]
    assert summary["status"] == "finished"
    assert summary["nodes"]["world"]["version"] > 0


def test_the_audit_has_a_line_for_every_update(cluster: None, tiny: Tiny, tmp_path: Path) -> None:
    plan = in_folder(tiny(), tmp_path / "run")
    summary = launch.train(plan).summary
    found = proofs(plan.run_dir)
    assert sum(len(proof.applied) for proof in found) == sum(node["accepted"] for node in summary["nodes"].values())
    for proof in found:
        assert proof.holds
        assert proof.applied == sorted(set(proof.applied))


@pytest.mark.parametrize("overlap", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_stopped_run_continues_to_its_full_budget(cluster: None, tiny: Tiny, tmp_path: Path, overlap: bool) -> None:
    # Steps that sleep leave time to stop the run before it has ended by itself.
    settings: dict[str, Any] = {
        "budget": {"rounds": 6},
        "training": {"local_steps": 4, "batch_size": 4, "step_delay_s": 0.25},
        "checkpoint": {"every_s": 0.0},
        "exchange": {"overlap": overlap},
        "faults": ["0s delay world/north/a by 0.2s for 1000s"],
    }
    plan = in_folder(tiny(**settings), tmp_path / "run")
    seen: list[dict[str, Any]] = []
    first = launch.train(plan, on_progress=seen.append, should_stop=lambda: bool(seen and seen[-1]["tokens"])).summary
    assert first["status"] == "stopped"
    second = launch.train(plan).summary
    assert second["status"] == "finished"
    steps = 6 * plan.root.settings.training.local_steps
    assert {second["nodes"][spec.path]["steps"] for spec in plan.root.clients} == {steps}
    assert second["nodes"]["world"]["version"] > first["nodes"]["world"]["version"]
    assert {len(proof.applied) for proof in proofs(plan.run_dir) if proof.node != "world"} == {6}


def test_an_actor_that_cannot_start_says_why_in_one_line(cluster: None, tiny: Tiny, tmp_path: Path) -> None:
    plan = in_folder(tiny(), tmp_path / "run")
    victim = plan.root.clients[1].settings.data.files[0]
    Path(victim).write_text("too short", encoding="utf-8")
    with pytest.raises(Exception, match="tokens") as caught:
        launch.train(plan)
    assert type(caught.value).__name__ == "DataError"
    assert "\n" not in str(caught.value)
