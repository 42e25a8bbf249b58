"""Faults on purpose: what a script may say, and what a simulated world bears."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.drift import Drift, drifting, whole_run
from support.worlds import client

from worldlm_ray.client.client import Client
from worldlm_ray.plan import build
from worldlm_ray.plan.plan import Plan
from worldlm_ray.records import LifeRecord, MergeRecord, PushRecord, RoundRecord, VerdictRecord
from worldlm_ray.simulation.simulator import Simulation
from worldlm_ray.tensors.buffers import params_sha256
from worldlm_ray.tracking.audit import proofs

Tiny = Callable[..., Plan]
ROUNDS = 10
SPEED = {"tokens_per_s": 256.0, "latency_s": 0.01}
"""A local round of the tiny world takes a virtual second."""
IMPATIENT = {"heartbeat_s": 0.5, "grace_s": 1.5}
SCRIPTS = 8


# ---- what a world bears --------------------------------------------------------------------------------------------


def run(plan: Plan, folder: Path, faults: list[str], make_client: Any = drifting) -> tuple[Simulation, list[Any]]:
    """A whole run with these faults, in its own folder."""
    return whole_run(plan, folder, make_client=make_client, faults=faults)


def world(tiny: Tiny, trigger: str = "goal_achieved", *, children: Any = None, **changes: Any) -> Plan:
    settings = {
        "budget": {"rounds": ROUNDS},
        "simulation": SPEED,
        "checkpoint": {"every_s": 3.0},
        "aggregation": {"trigger": trigger},
        "evaluation": {"every_rounds": 0},
    }
    return tiny(children, **(settings | changes))


def check(simulation: Simulation, records: list[Any], why: str) -> None:
    """Nothing lost, nothing twice, no node left behind."""
    plan = simulation.plan
    for proof in proofs(plan.run_dir):
        assert proof.holds, (why, proof)
    refusals = {"duplicate", "restarted", "superseded", "out_of_turn", "malformed"}
    assert {r.verdict for r in records if isinstance(r, VerdictRecord)} <= refusals | {"accepted"}, why
    trained = 0
    for path, one in simulation.clients.items():
        if path in simulation.absent:
            assert plan.faults.turns(path), (why, path)
            assert one.round <= ROUNDS, (why, path)
        else:
            assert one.round == ROUNDS, (why, path)
        trained += one.round * one.round_tokens
    # Every token of every client has arrived at the world, through whatever died on the way, once.
    assert simulation.nodes["world"].published.tokens == trained, why
    assert np.isfinite(simulation.nodes["world"].theta).all(), why


def a_script(seed: int, plan: Plan) -> list[str]:
    rng = random.Random(seed)
    lines = []
    for _ in range(rng.randint(1, 6)):
        kind = rng.choice(["kill", "kill", "cut", "silence", "drop", "repeat", "corrupt", "delay", "disk"])
        longest_s = 5.0
        if kind == "silence":  # long enough to be given up
            kind, longest_s = rng.choice(["cut", "kill"]), 15.0
        nodes = [path for path in plan.kinds if path != "world" or kind in ("kill", "disk")]
        line = f"{rng.uniform(0, 12):.2f}s {kind} {rng.choice(nodes)}"
        line += f" by {rng.uniform(0, 3):.2f}s" if kind == "delay" else ""
        lines.append(f"{line} for {rng.uniform(0.1, longest_s):.2f}s")
    turning = rng.sample([spec.path for spec in plan.root.clients], rng.randint(0, 2))
    if rng.random() < 0.25:  # no client of a federation is there at first
        late = rng.choice([spec.path for spec in plan.root.inner if spec.kind == "federation"])
        turning = [path for path in turning if not path.startswith(f"{late}/")]
        lines.append(f"{rng.uniform(0, 10):.2f}s join {late}")
    for path in turning:
        turns = ["leave", "join", "leave", "join"][rng.randint(0, 1) :][: rng.randint(1, 3)]
        times = sorted(rng.uniform(0, 14) for _ in turns)
        lines += [f"{at_s:.2f}s {turn} {path}" for at_s, turn in zip(times, turns, strict=True)]
    return lines


@pytest.mark.parametrize(
    ("trigger", "overlap"),
    [("goal_achieved", False), ("goal_achieved", True), ("synchronous", False), ("time_up", False)],
)
def test_random_faults_lose_nothing_and_apply_nothing_twice(
    tiny: Tiny, tmp_path: Path, trigger: str, overlap: bool, request: pytest.FixtureRequest
) -> None:
    scripts = SCRIPTS * (25 if request.config.getoption("--soak") else 1)
    aggregation = {"trigger": trigger, "time_up_s": 2.5}
    plan = world(tiny, aggregation=aggregation, liveness=IMPATIENT, exchange={"overlap": overlap})
    for seed in range(scripts):
        script = a_script(seed, plan)
        simulation, records = run(plan, tmp_path / str(seed), script)
        check(simulation, records, f"{trigger}, overlap {overlap}, script {seed}: {script}")


@pytest.mark.parametrize("overlap", [False, True])
def test_the_same_script_gives_the_same_bits(tiny: Tiny, tmp_path: Path, overlap: bool) -> None:
    plan = world(tiny, liveness=IMPATIENT, exchange={"overlap": overlap})
    for seed in range(3):
        script = a_script(seed, plan)
        first, again = (run(plan, tmp_path / f"{seed}-{turn}", script)[0] for turn in range(2))
        assert params_sha256(first.nodes["world"].theta) == params_sha256(again.nodes["world"].theta)
        assert first.now_s == again.now_s


@pytest.mark.parametrize("victim", ["world", "world/north", "world/north/a"])
def test_a_synchronous_world_ends_with_the_same_bits_whoever_dies(tiny: Tiny, tmp_path: Path, victim: str) -> None:
    plan = world(tiny, "synchronous", checkpoint={"every_s": 0.0})
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


def pushes_between(records: list[Any], node: str, begin_s: float, end_s: float) -> int:
    return sum(isinstance(r, PushRecord) and r.node == node and begin_s < r.now_s < end_s for r in records)


@pytest.mark.parametrize("trigger", ["goal_achieved", "synchronous", "time_up"])
def test_a_federation_sends_nothing_that_it_would_not_know_after_its_death(
    tiny: Tiny, tmp_path: Path, trigger: str
) -> None:
    plan = world(tiny, aggregation={"trigger": trigger, "time_up_s": 2.5}, checkpoint={"patience_s": None})
    script = ["3.30s disk world/north for 3.19s", "5.64s kill world/north for 0.53s"]
    simulation, records = run(plan, tmp_path / "killed", script)
    check(simulation, records, trigger)
    assert pushes_between(records, "world/north", 4.5, 6.49) == 0
    assert pushes_between(records, "world/north", 6.49, 99.0) > 0


def test_clients_go_on_while_the_storage_of_their_federation_refuses(tiny: Tiny, tmp_path: Path) -> None:
    plan = world(tiny, checkpoint={"patience_s": None})
    simulation, records = run(plan, tmp_path / "refuses", ["2.5s disk world/north for 6s"])
    check(simulation, records, "refuses")
    for path in simulation.clients:
        assert rounds_between(records, path, 2.5, 8.5) >= 5, path
    assert pushes_between(records, "world/north", 3.6, 8.5) == 0


def test_storage_that_never_comes_back_does_not_hold_a_run_up_for_ever(tiny: Tiny, tmp_path: Path) -> None:
    plan = world(tiny, "synchronous", checkpoint={"patience_s": 5.0})
    simulation, records = run(plan, tmp_path / "never", ["2.5s disk world/north for 1000s"])
    check(simulation, records, "never")
    assert simulation.now_s < 20.0
    assert rounds_between(records, "world/north/a", 4.5, 7.5) == 0, "they wait for their federation's patience to end"


def test_a_federation_that_has_forgotten_what_it_sent_says_so(tiny: Tiny, tmp_path: Path) -> None:
    script = ["3.30s disk world/north for 3.19s", "5.64s kill world/north for 0.53s"]
    for patience_s, warnings in ((0.0, 1), (None, 0)):
        _, records = run(world(tiny, checkpoint={"patience_s": patience_s}), tmp_path / str(patience_s), script)
        said = [r for r in records if isinstance(r, LifeRecord) and "has forgotten" in r.detail]
        assert [(record.node, record.event) for record in said] == [("world/north", "warning")] * warnings


# ---- silence -------------------------------------------------------------------------------------------------------


def lives(records: list[Any], node: str) -> list[tuple[str, float]]:
    """What happened to a node, and when."""
    return [
        (record.event, record.now_s) for record in records if isinstance(record, LifeRecord) and record.node == node
    ]


def rounds_between(records: list[Any], node: str, begin_s: float, end_s: float) -> int:
    return sum(isinstance(r, RoundRecord) and r.node == node and begin_s < r.now_s < end_s for r in records)


@pytest.mark.parametrize("fault", ["3s cut world/north/a for 12s", "3s kill world/north/a for 12s"])
def test_a_synchronous_world_goes_on_without_a_silent_client_and_takes_it_back(
    tiny: Tiny, tmp_path: Path, fault: str
) -> None:
    plan = world(tiny, "synchronous", liveness=IMPATIENT)
    simulation, records = run(plan, tmp_path / "silent", [fault])
    check(simulation, records, fault)
    said = [(r.event, r.detail) for r in records if isinstance(r, LifeRecord) and r.node == "world/north/a"]
    [lost] = [place for place, (event, _) in enumerate(said) if event == "lost"]
    assert ("training", "is back") in said[lost:], "it was taken back"
    lost_s = next(at_s for event, at_s in lives(records, "world/north/a") if event == "lost")
    heard_s = 3.0 - IMPATIENT["heartbeat_s"]  # the last time, about
    assert heard_s + IMPATIENT["grace_s"] < lost_s <= heard_s + IMPATIENT["grace_s"] + 2 * IMPATIENT["heartbeat_s"]
    for other in ("world/north/b", "world/south/c", "world/south/d"):
        assert rounds_between(records, other, lost_s, 15.0) >= 5, other
    _, records = run(world(tiny, "synchronous", liveness={"grace_s": 60.0}), tmp_path / "patient", [fault])
    assert not any(event == "lost" for event, _ in lives(records, "world/north/a"))
    assert rounds_between(records, "world/north/b", 5.0, 15.0) == 0, "without that, all wait"


def test_a_federation_that_is_cut_off_is_given_up_and_taken_back(tiny: Tiny, tmp_path: Path) -> None:
    plan = world(tiny, "synchronous", liveness=IMPATIENT)
    simulation, records = run(plan, tmp_path / "cut", ["2s cut world/north for 9s"])
    check(simulation, records, "a cut")
    assert [event for event, _ in lives(records, "world/north")] == [
        "lost",
        "waiting",
        "training",
        "training",
        "finished",
    ]
    assert rounds_between(records, "world/south/c", 5.0, 11.0) >= 4


def test_a_parent_that_was_restarted_gives_up_a_child_that_never_speaks_to_it(tiny: Tiny, tmp_path: Path) -> None:
    plan = world(tiny, "synchronous", liveness=IMPATIENT, checkpoint={"every_s": 0.0})
    script = ["3s kill world/north for 1s", "3s kill world/north/a for 20s"]
    simulation, records = run(plan, tmp_path / "both", script)
    check(simulation, records, "both")
    assert "lost" in [event for event, _ in lives(records, "world/north/a")]
    assert rounds_between(records, "world/north/b", 7.0, 22.0) >= 5


def test_a_slow_client_is_not_silent(tiny: Tiny, tmp_path: Path) -> None:
    slow = {"tokens_per_s": 256.0 / 20.0}  # a round takes ten times as long as a silence may
    children = [client("fast", tmp_path, 1), client("slow", tmp_path, 2, simulation=slow)]
    plan = world(tiny, "synchronous", children=children, liveness=IMPATIENT, budget={"rounds": 3})
    _, records = run(plan, tmp_path / "slow", ["1s delay world/fast by 0.1s for 1s"])
    assert not any(isinstance(record, LifeRecord) and record.event == "lost" for record in records)


# ---- who comes and goes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trigger", ["goal_achieved", "synchronous", "time_up"])
def test_one_leaves_and_one_comes_and_nobody_waits(tiny: Tiny, tmp_path: Path, trigger: str) -> None:
    plan = world(tiny, aggregation={"trigger": trigger, "time_up_s": 2.5})
    simulation, records = run(plan, tmp_path / "turns", ["3.5s leave world/north/a", "4.2s join world/south/d"])
    check(simulation, records, "turns")
    assert set(simulation.absent) == {"world/north/a"}
    assert simulation.clients["world/north/a"].round == 4, "it ends the round that is under way"
    assert [event for event, _ in lives(records, "world/north/a")] == ["training", "left"]
    assert [event for event, _ in lives(records, "world/south/d")] == ["started", "training", "finished"]
    for other in ("world/north/b", "world/south/c"):
        assert rounds_between(records, other, 0.0, 9.0) >= 7, other
    summary = json.loads((simulation.plan.run_dir / "summary.json").read_text(encoding="utf-8"))
    assert summary["nodes"]["world/north/a"]["steps"] == 4 * 4
    assert summary["nodes"]["world/south/d"]["steps"] == ROUNDS * 4


def test_a_newcomer_begins_from_its_federations_model(tiny: Tiny, tmp_path: Path) -> None:
    begun: dict[str, Any] = {}

    class Watched(Client):
        def begin(self, model: Any, *, now_s: float) -> Any:
            found = super().begin(model, now_s=now_s)
            begun.setdefault(self.spec.path, (model.version, self.link.anchor.copy(), model.values.copy()))
            return found

    def make(plan: Plan, spec: Any, **settings: Any) -> Client:
        return Watched(plan, spec, make_trainer=lambda _: Drift(plan.layout.size, 1.0), **settings)

    run(world(tiny), tmp_path / "new", ["4.2s join world/south/d"], make_client=make)
    version, base, model = begun["world/south/d"]
    assert version >= 3
    np.testing.assert_array_equal(base, model)
    assert np.abs(base - begun["world/south/c"][1]).max() > 0


@pytest.mark.parametrize("trigger", ["goal_achieved", "synchronous"])
def test_nobody_waits_for_a_federation_that_nobody_has_come_to(tiny: Tiny, tmp_path: Path, trigger: str) -> None:
    plan = world(tiny, trigger)
    begun: dict[str, list[Any]] = {"world/north/a": [], "world/south/c": []}

    class Watched(Client):
        def begin(self, model: Any, *, now_s: float) -> Any:
            found = super().begin(model, now_s=now_s)
            begun.setdefault(self.spec.path, []).append((now_s, self.link.anchor.copy()))
            return found

    def make(plan: Plan, spec: Any, **settings: Any) -> Client:
        return Watched(plan, spec, make_trainer=lambda _: Drift(plan.layout.size, 1.0), **settings)

    script = ["5.3s join world/north/a", "7s join world/north/b"]
    simulation, records = run(plan, tmp_path / "late", script, make_client=make)
    check(simulation, records, trigger)
    assert rounds_between(records, "world/south/c", 0.0, 5.3) >= 4
    at_s, model = begun["world/north/a"][0]
    earlier = [base for begun_s, base in begun["world/south/c"] if begun_s < at_s]
    moved, before = (np.abs(each - build.initial(plan)).max() for each in (model, earlier[-1]))
    assert moved > 0.5 * before, "the world's"
    # Killed before any client has come, a federation still does not join. In its first refresh it asks again.
    for number, at_s in enumerate([2.0, 5.305, 5.315, 5.325, 5.4]):
        faulty, records = run(plan, tmp_path / f"killed-{number}", [*script, f"{at_s}s kill world/north for 1s"])
        check(faulty, records, f"killed at {at_s}")


def test_one_that_left_comes_back_where_it_was(tiny: Tiny, tmp_path: Path) -> None:
    plan = world(tiny, "synchronous")
    simulation, records = run(plan, tmp_path / "back", ["2.5s leave world/north", "6.5s join world/north/a"])
    check(simulation, records, "back")
    assert set(simulation.absent) == {"world/north/b"}
    said = [event for event, _ in lives(records, "world/north/a")]
    assert said == ["training", "left", "continued", "training", "finished"]
    numbers = [r.round for r in records if isinstance(r, RoundRecord) and r.node == "world/north/a"]
    assert numbers == list(range(1, ROUNDS + 1)), "no round twice"
    assert rounds_between(records, "world/south/c", 2.5, 6.5) >= 3, "a federation without clients blocks nothing"
    heard = [r.now_s for r in records if isinstance(r, MergeRecord) and r.node == "world/north"]
    assert any(6.5 <= at_s < 7.0 for at_s in heard), "it begins from what the world has learned meanwhile"


def test_what_a_client_pushed_before_it_left_outlives_its_parent(tiny: Tiny, tmp_path: Path) -> None:
    plan = world(tiny, checkpoint={"every_s": 100.0, "every_updates": 100})
    simulation, records = run(plan, tmp_path / "left", ["2.5s leave world/north/a", "3.3s kill world/north for 0.2s"])
    check(simulation, records, "left")
    assert simulation.clients["world/north/a"].round == 3


def test_a_run_does_not_wait_for_who_comes_too_late(tiny: Tiny, tmp_path: Path) -> None:
    simulation, records = run(world(tiny), tmp_path / "late", ["500s join world/south/d"])
    check(simulation, records, "late")
    assert simulation.now_s < 20.0
    assert simulation.clients["world/south/d"].round == 0


@pytest.mark.parametrize("trigger", ["goal_achieved", "synchronous"])
def test_a_federation_is_filled_as_places_become_free(tiny: Tiny, tmp_path: Path, trigger: str) -> None:
    names = ["a", "b", "c", "d"]
    north = {"federation": "north", "max_clients": 2, "children": [client(n, tmp_path, ord(n)) for n in names]}
    plan = world(tiny, trigger, children=[north, client("e", tmp_path, 9)])
    simulation, records = run(plan, tmp_path / "filled", ["2.5s leave world/north/a"])
    assert set(simulation.absent) == {"world/north/a", "world/north/d"}
    assert simulation.clients["world/north/c"].round == ROUNDS
    assert rounds_between(records, "world/north/c", 0.0, 3.0) == 0
    # Without faults, too: who has no place is not waited for.
    calm, _ = run(plan, tmp_path / "calm", [])
    assert set(calm.absent) == {"world/north/c", "world/north/d"}
    assert calm.clients["world/north/b"].round == ROUNDS


def test_a_federation_begins_once_enough_are_there(tiny: Tiny, tmp_path: Path) -> None:
    children = [client(name, tmp_path, ord(name)) for name in "abc"]
    plan = world(tiny, children=[{"federation": "north", "min_clients": 2, "children": children}])
    late = ["3s join world/north/b", "5s join world/north/c"]
    simulation, records = run(plan, tmp_path / "min", late)
    first = min(r.now_s for r in records if isinstance(r, RoundRecord))
    assert 4.0 < first < 4.5
    assert {c.round for c in simulation.clients.values()} == {ROUNDS}
