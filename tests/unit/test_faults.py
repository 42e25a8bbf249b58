"""Faults on purpose: what a script may say, and what a simulated world bears."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drift import drifting

from worldlm_ray import rundir
from worldlm_ray.audit import proofs
from worldlm_ray.errors import ConfigError
from worldlm_ray.faults import Faults
from worldlm_ray.params import params_sha256
from worldlm_ray.plan import Plan
from worldlm_ray.records import RoundRecord, VerdictRecord
from worldlm_ray.simulate import Simulation
from worldlm_ray.tracking import Tracker

Tiny = Callable[..., Plan]
ROUNDS = 10
SPEED = {"tokens_per_s": 256.0, "latency_s": 0.01}
"""A local round of the tiny world takes a virtual second."""
SCRIPTS = 8
KINDS = {"world": "world", "world/north": "federation", "world/north/a": "client"}


# ---- scripts -----------------------------------------------------------------------------------------------------


def test_a_script_is_read_line_by_line() -> None:
    script = Faults.parse(["20s kill world", "1.5s delay world/north by 2s for 10s"], kinds=KINDS)
    assert script.of("world", kind="kill")[0].at_s == 20.0
    assert script.delay_s("world/north", 11.0) == 2.0
    assert script.delay_s("world/north", 11.6) == 0.0
    assert not script.now("world/north", "cut", 2.0)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("kill world", "is not a fault"),
        ("3s explode world", "there is no fault 'explode'"),
        ("3s kill world/south", "there is no node 'world/south'"),
        ("3s cut world for 2s", "the world has no parent"),
        ("3s cut world/north", "does not say how long"),
        ("3s delay world/north for 2s", "`by` belongs to delay"),
        ("3s cut world/north by 1s for 2s", "`by` belongs to delay"),
        (7, "is not a fault"),
    ],
)
def test_a_line_that_is_no_fault_is_an_error_with_a_cure(line: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=r"^faults\[1\]") as caught:
        Faults.parse(["1s kill world", line], kinds=KINDS)
    assert problem in str(caught.value)
    assert caught.value.cure


# ---- what a world bears --------------------------------------------------------------------------------------------


def run(plan: Plan, folder: Path, faults: list[str]) -> tuple[Simulation, list[Any]]:
    """A whole run with these faults, in a folder of its own."""
    config = replace(plan.config, run_dir=str(folder), faults=faults)
    plan = rundir.create(replace(plan, config=config))
    tracker = Tracker(plan.run_dir, kinds=plan.kinds, hparams={}, budget=plan.config.budget)
    records: list[Any] = []
    simulation = Simulation(plan, tracker, on_record=records.append, make_client=drifting)
    try:
        assert simulation.run() == "finished"
        simulation.conclude("finished")
    finally:
        tracker.close()
    return simulation, records


def world(tiny: Tiny, trigger: str = "goal_achieved", **changes: Any) -> Plan:
    settings = {
        "budget": {"rounds": ROUNDS},
        "simulation": SPEED,
        "checkpoint": {"every_s": 3.0},
        "aggregation": {"trigger": trigger},
        "evaluation": {"every_rounds": 0},
    }
    return tiny(**(settings | changes))


def check(simulation: Simulation, records: list[Any], why: str) -> None:
    """Nothing lost, nothing twice, nobody left behind."""
    plan = simulation.plan
    for proof in proofs(plan.run_dir):
        assert proof.holds, (why, proof)
    refusals = {"duplicate", "restarted", "superseded", "out_of_turn", "malformed"}
    assert {r.verdict for r in records if isinstance(r, VerdictRecord)} <= refusals | {"accepted"}, why
    trained = 0
    for path, client in simulation.clients.items():
        assert client.round == ROUNDS, (why, path)
        trained += client.round * client.round_tokens
    # Every token of every client has arrived at the world, through whatever died on the way, once.
    assert simulation.nodes["world"].tokens == trained, why
    assert np.isfinite(simulation.nodes["world"].theta).all(), why


def a_script(seed: int, plan: Plan) -> list[str]:
    rng = random.Random(seed)
    lines = []
    for _ in range(rng.randint(1, 6)):
        kind = rng.choice(["kill", "kill", "cut", "drop", "repeat", "corrupt", "delay", "disk"])
        nodes = [path for path in plan.kinds if path != "world" or kind in ("kill", "disk")]
        line = f"{rng.uniform(0, 12):.2f}s {kind} {rng.choice(nodes)}"
        line += f" by {rng.uniform(0, 3):.2f}s" if kind == "delay" else ""
        lines.append(f"{line} for {rng.uniform(0.1, 5):.2f}s")
    return lines


@pytest.mark.parametrize("trigger", ["goal_achieved", "synchronous", "time_up"])
def test_random_faults_lose_nothing_and_apply_nothing_twice(
    tiny: Tiny, tmp_path: Path, trigger: str, request: pytest.FixtureRequest
) -> None:
    scripts = SCRIPTS * (25 if request.config.getoption("--soak") else 1)
    aggregation = {"trigger": trigger, "time_up_s": 2.5}
    plans = [world(tiny, aggregation=aggregation, exchange={"fragments": count}) for count in (1, 2)]
    for seed in range(scripts):
        plan = plans[seed % 2]
        script = a_script(seed, plan)
        simulation, records = run(plan, tmp_path / str(seed), script)
        check(simulation, records, f"{trigger}, script {seed}: {script}")


def test_the_same_script_gives_the_same_bits(tiny: Tiny, tmp_path: Path) -> None:
    plan = world(tiny)
    for seed in range(3):
        script = a_script(seed, plan)
        first, again = (run(plan, tmp_path / f"{seed}-{turn}", script)[0] for turn in range(2))
        assert params_sha256(first.nodes["world"].theta) == params_sha256(again.nodes["world"].theta)
        assert first.now_s == again.now_s


@pytest.mark.parametrize("fragments", [1, 3])
@pytest.mark.parametrize("victim", ["world", "world/north", "world/north/a"])
def test_a_synchronous_world_ends_with_the_same_bits_whoever_dies(
    tiny: Tiny, tmp_path: Path, victim: str, fragments: int
) -> None:
    plan = world(tiny, "synchronous", checkpoint={"every_s": 0.0}, exchange={"fragments": fragments})
    calm, _ = run(plan, tmp_path / "calm", [])
    for number, at_s in enumerate([0.5, 3.3, 5.02]):
        faulty, _ = run(plan, tmp_path / f"faulty-{number}", [f"{at_s}s kill {victim} for 2s"])
        assert params_sha256(faulty.nodes["world"].theta) == params_sha256(calm.nodes["world"].theta), at_s


def test_others_go_on_while_a_federation_is_cut_off(tiny: Tiny, tmp_path: Path) -> None:
    _, records = run(world(tiny), tmp_path / "cut", ["2s cut world/north for 5s"])
    rounds = [(r.node, r.now_s) for r in records if isinstance(r, RoundRecord) and 3.0 < r.now_s < 7.0]
    assert sum(node.startswith("world/south/") for node, _ in rounds) >= 6
    assert sum(node.startswith("world/north/") for node, _ in rounds) >= 6, "its own clients do not even notice"


def test_updates_are_sent_again_to_a_parent_that_has_lost_them(tiny: Tiny, tmp_path: Path) -> None:
    plan = world(tiny, checkpoint={"every_s": 100.0, "every_updates": 5})
    simulation, records = run(plan, tmp_path / "again", ["4.5s kill world for 0.2s"])
    check(simulation, records, "one kill")
    assert sum(proof.again for proof in proofs(simulation.plan.run_dir)) > 0
