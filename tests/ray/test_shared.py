"""Clients that share a process: each is a whole client to its parent, whichever dies."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.killing import Killer, check
from support.worlds import client, crowd

from worldlm_ray import launch
from worldlm_ray.launch.pools import Member, Pool
from worldlm_ray.plan import membership, rundir
from worldlm_ray.plan.plan import Plan
from worldlm_ray.simulation.simulator import simulate
from worldlm_ray.tracking.audit import proofs

pytestmark = [pytest.mark.ray, pytest.mark.slow]
Tiny = Callable[..., Plan]


def in_folder(plan: Plan, folder: Path) -> Plan:
    return rundir.create(replace(plan, config=replace(plan.config, run_dir=str(folder))))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"merge": {"client": "apart"}},
        {"faults": ["900s join world/north/phone-2", "900s leave world/north/phone-1"]},
    ],
    ids=["plain", "two models", "elastic membership"],
)
def test_synchronous_mode_gives_the_bits_of_clients_with_a_process_each(
    cluster: None, tiny: Tiny, tmp_path: Path, changes: dict[str, Any]
) -> None:
    children = [
        {
            "federation": "north",
            "resources": {"clients_per_process": 3},
            "children": [crowd("phone", tmp_path, copies=5)],
        },
        client("alone", tmp_path, 7),
    ]
    settings = {
        "aggregation": {"trigger": "synchronous"},
        "merge": {"client": 0.5, "federation": 0.5},
        "budget": {"rounds": 3},
        "exchange": {"codec": "int8"},
    }
    plan = tiny(children, **(settings | changes))
    simulated = simulate(in_folder(plan, tmp_path / "simulated")).summary
    real = launch.train(in_folder(plan, tmp_path / "real")).summary
    assert real["params_sha256"] == simulated["params_sha256"]
    for path, node in simulated["nodes"].items():
        assert real["nodes"][path]["loss"] == node["loss"], path
        assert real["nodes"][path]["steps"] == node["steps"], path


@pytest.mark.long
@pytest.mark.parametrize("trigger", ["goal_achieved", "synchronous"])
def test_a_host_that_is_killed_costs_nothing(cluster: None, tiny: Tiny, tmp_path: Path, trigger: str) -> None:
    rounds, copies = 4, 30
    children = [
        {"federation": "north", "children": [crowd("phone", tmp_path, copies=copies)]},
        {"federation": "south", "children": [crowd("phone", tmp_path, copies=copies)]},
    ]
    plan = in_folder(
        tiny(
            children,
            aggregation={"trigger": trigger},
            budget={"rounds": rounds},
            resources={"clients_per_process": copies},
            checkpoint={"every_s": 2.0, "every_updates": 2},
            evaluation={"every_rounds": 0, "tokens": 16, "final_tokens": 16},
        ),
        tmp_path / "run",
    )
    check(plan, Killer(plan, [(2 * copies, 0.0, "world/north/phone-01")]).train())


@pytest.mark.long
def test_clients_of_a_host_stop_and_go_on(cluster: None, tiny: Tiny, tmp_path: Path) -> None:
    settings = {"local_steps": 4, "batch_size": 4, "step_delay_s": 0.05}
    plan = in_folder(
        tiny(
            [crowd("phone", tmp_path, copies=6)],
            budget={"rounds": 4},
            resources={"clients_per_process": 3},
            training=settings,
        ),
        tmp_path / "run",
    )
    seen: dict[str, Any] = {}
    stopped = launch.train(plan, on_progress=seen.update, should_stop=lambda: seen.get("accepted", 0) >= 8).summary
    assert stopped["status"] == "stopped"
    assert any(node["steps"] for path, node in stopped["nodes"].items() if path != "world")
    finished = launch.train(rundir.resume(str(plan.run_dir), [])).summary
    assert finished["status"] == "finished"
    assert {finished["nodes"][spec.path]["steps"] for spec in plan.root.clients} == {16}
    assert all(proof.holds for proof in proofs(plan.run_dir))


def test_a_client_of_a_host_leaves_and_the_others_go_on(cluster: None, tiny: Tiny, tmp_path: Path) -> None:
    settings = {"local_steps": 4, "batch_size": 4, "step_delay_s": 0.1}
    plan = in_folder(
        tiny(
            [crowd("phone", tmp_path, copies=3)],
            budget={"rounds": 8},
            resources={"clients_per_process": 3},
            training=settings,
            evaluation={"every_rounds": 0, "tokens": 16, "final_tokens": 16},
        ),
        tmp_path / "run",
    )
    gone = "world/phone-2"
    seen: dict[str, Any] = {"accepted": 0}

    def leave() -> None:
        while seen["accepted"] < 4:
            time.sleep(0.1)
        launch.leave(plan, membership.without(plan, gone), gone)

    leaver = threading.Thread(target=leave)
    leaver.start()
    summary = launch.train(plan, on_progress=seen.update).summary
    leaver.join()
    assert summary["status"] == "finished"
    steps = {path: node["steps"] for path, node in summary["nodes"].items() if path != "world"}
    assert steps["world/phone-1"] == steps["world/phone-3"] == 8 * 4
    assert 0 < steps.get(gone, 4) < 8 * 4
    found = {proof.sender: proof for proof in proofs(plan.run_dir)}
    assert all(proof.holds for proof in found.values())
    assert len(found["phone-1"].applied) == 8
    assert 0 < len(found["phone-2"].applied) < 8


def test_a_member_speaks_like_an_actor() -> None:
    class Method:
        def remote(self, *arguments: Any, **named: Any) -> Any:
            return arguments, named

    class Actor:
        measure = Method()

    member: Any = Member(Pool("world/@a", Actor(), None), "world/a")
    assert member.measure.remote([1], tokens=2) == (("world/a", [1]), {"tokens": 2})


PAUSES = {"unit": "record", "noise_multiplier": 1.0, "target_epsilon": 3.0, "on_exhausted": "pause"}


@pytest.mark.parametrize(
    ("rounds", "settings"),
    [
        (4, {"exchange": {"overlap": True}}),
        (30, {"privacy": PAUSES, "training": {"local_steps": 2, "batch_size": 40}}),
    ],
    ids=["overlap", "private and paused"],
)
def test_clients_of_a_process_overlap_and_pause(
    cluster: None, tiny: Tiny, tmp_path: Path, rounds: int, settings: dict[str, Any]
) -> None:
    phones = crowd("phone", tmp_path, copies=3) | {"resources": {"clients_per_process": 3}} | settings
    plan = in_folder(tiny([phones, client("free", tmp_path, 2)], budget={"rounds": rounds}), tmp_path / "run")
    summary = launch.train(plan).summary
    assert summary["status"] == "finished"
    found = {proof.sender: proof for proof in proofs(plan.run_dir)}
    assert all(proof.holds for proof in found.values())
    done = [len(found[f"phone-{number}"].applied) for number in (1, 2, 3)]
    assert done == [rounds] * 3 if "exchange" in settings else all(0 < each < rounds for each in done)
    assert len(found["free"].applied) == rounds
