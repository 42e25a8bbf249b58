"""Whole tiny worlds in the simulator: real training under a virtual clock."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from support.worlds import TINY_MODEL, client

from worldlm_ray.plan import rundir
from worldlm_ray.plan.plan import Plan
from worldlm_ray.records import LifeRecord, MergeRecord, NodeSummary, Record, RoundRecord, VerdictRecord
from worldlm_ray.simulation.simulator import Simulation, simulate
from worldlm_ray.storage import checkpoint
from worldlm_ray.tensors.buffers import params_sha256
from worldlm_ray.tracking import audit

Tiny = Callable[..., Plan]
ROUND_TOKENS = 4 * 4 * 16
"""Of a tiny client: 4 steps of 4 sequences of 16 tokens."""


class Records:
    """Stands for the tracker where files are not of interest."""

    def __init__(self) -> None:
        self.all: list[Record] = []

    def record(self, *records: Record) -> None:
        self.all += records

    def of(self, kind: type[Any], node: str) -> list[Any]:
        return [record for record in self.all if isinstance(record, kind) and record.node == node]


def run(plan: Plan) -> tuple[Simulation, Records]:
    records = Records()
    simulation = Simulation(plan, records)  # type: ignore[arg-type]
    assert simulation.run() == "finished"
    return simulation, records


def pair(folder: Path, *, fast: float = 1.0, slow: float) -> list[dict[str, Any]]:
    """Two clients that take so many seconds for a local round."""
    return [
        client("fast", folder, 1, simulation={"tokens_per_s": ROUND_TOKENS / fast}),
        client("slow", folder, 2, simulation={"tokens_per_s": ROUND_TOKENS / slow}),
    ]


def deep(folder: Path) -> list[dict[str, Any]]:
    """Four levels below the world, and a client at every one of them."""
    inner: list[dict[str, Any]] = [client("leaf", folder, 9)]
    for level in range(3):
        inner = [{"federation": f"f{level}", "children": inner}, client(f"c{level}", folder, level)]
    return inner


def finished_s(records: Records, node: str) -> float:
    [life] = [record for record in records.of(LifeRecord, node) if record.event == "finished"]
    return float(life.now_s)


# ---- worlds of any depth -----------------------------------------------------------------------------------


@pytest.mark.parametrize("trigger", ["goal_achieved", "synchronous"])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_world_of_any_depth_trains_to_the_end(tiny: Tiny, tmp_path: Path, depth: int, trigger: str) -> None:
    children = {
        1: lambda: [client("a", tmp_path, 1), client("b", tmp_path, 2)],
        2: lambda: None,
        4: lambda: deep(tmp_path),
    }[depth]()
    plan = tiny(children, aggregation={"trigger": trigger}, budget={"rounds": 3})
    simulation, records = run(plan)
    assert max(path.count("/") for path in plan.kinds) == depth
    for path, one in simulation.clients.items():
        assert (one.round, one.steps) == (3, 12)
        first, *_, last = records.of(RoundRecord, path)
        assert last.train_loss < first.train_loss
    for path, node in simulation.nodes.items():
        assert node.ended
        assert node.intake.refused == {}
        # Everything that was trained below has arrived: nothing is lost on the way up.
        assert node.published.tokens == sum(simulation.clients[spec.path].tokens for spec in plan.node(path).clients)
        assert finished_s(records, path) > 0
    if trigger == "synchronous":
        assert {node.version for node in simulation.nodes.values()} == {3}


def test_time_up_ends_too(tiny: Tiny) -> None:
    simulation, _ = run(tiny(aggregation={"trigger": "time_up", "time_up_s": 0.2, "quorum": 1}))
    assert all(node.ended for node in simulation.nodes.values())
    assert simulation.nodes["world"].published.tokens == 4 * 2 * ROUND_TOKENS


def uneven(folder: Path, *, order: int) -> list[dict[str, Any]]:
    """Two federations of two clients that take 1 and 3 seconds for a round; the first or the second is the slow one."""
    speeds = [{"tokens_per_s": ROUND_TOKENS / seconds} for seconds in ((1.0, 3.0), (3.0, 1.0))[order]]
    names = ("a", "b"), ("c", "d")
    children = [
        [client(name, folder, ord(name), simulation=s) for name, s in zip(n, speeds, strict=True)] for n in names
    ]
    return [{"federation": f, "children": c} for f, c in zip(("north", "south"), children, strict=True)]


@pytest.mark.parametrize("order", [0, 1])
def test_synchronous_children_begin_every_round_from_the_same_world(tiny: Tiny, tmp_path: Path, order: int) -> None:
    # Those that pull before their last sibling pushed wait for the federation's exchange as well.
    plan = tiny(uneven(tmp_path, order=order), aggregation={"trigger": "synchronous"}, budget={"rounds": 2})
    simulation, _ = run(plan)
    backbone = slice(0, plan.layout.backbone_size)
    assert len({one.link.anchor[backbone].tobytes() for one in simulation.clients.values()}) == 1


# ---- the same again ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("trigger", ["goal_achieved", "synchronous"])
def test_the_seed_decides_the_bits(tiny: Tiny, trigger: str) -> None:
    plan = tiny(aggregation={"trigger": trigger})
    again, other = plan, replace(plan, config=replace(plan.config, seed=1))
    hashes = [run(each)[0].nodes["world"].theta.tobytes() for each in (plan, again, other)]
    assert hashes[0] == hashes[1]
    assert hashes[0] != hashes[2]


def test_the_summaries_of_two_equal_runs_are_equal(tiny: Tiny, tmp_path: Path) -> None:
    plan = tiny()
    one, other = (
        simulate(rundir.create(replace(plan, config=replace(plan.config, run_dir=str(tmp_path / name)))))
        for name in ("one", "other")
    )
    assert one.summary == other.summary
    assert one.samples == other.samples


def test_speeds_do_not_change_the_bits_of_a_synchronous_run(tiny: Tiny, tmp_path: Path) -> None:
    rules = {"trigger": "synchronous"}
    plans = [tiny(uneven(tmp_path, order=order), aggregation=rules) for order in (0, 1)]
    found = {run(plan)[0].nodes["world"].theta.tobytes() for plan in plans}
    assert len(found) == 1


# ---- the run folder ----------------------------------------------------------------------------------------


@pytest.fixture
def outcome(tiny: Tiny) -> tuple[Plan, dict[str, Any]]:
    plan = rundir.create(tiny())
    return plan, simulate(plan).summary


def test_a_run_leaves_its_documented_files(outcome: tuple[Plan, dict[str, Any]]) -> None:
    plan, summary = outcome
    assert json.loads((plan.run_dir / "summary.json").read_text()) == summary
    keys = {"status", "backend", "run", "method", "seed", "wall_s", "tokens", "params_sha256", "nodes", "budget"}
    keys |= {"samples_failed", "warnings"}
    assert set(summary) == keys
    assert summary["backend"] == "simulate"
    assert (summary["status"], summary["run"], summary["method"], summary["seed"]) == ("finished", "tiny", "worldlm", 0)
    assert list(summary["nodes"]) == list(plan.kinds)
    for path, node in summary["nodes"].items():
        assert set(node) == {field.name for field in fields(NodeSummary)} | {"tau_mean"}
        assert node["kind"] == plan.kinds[path]
        assert node["loss"] < node["loss_start"]
    assert summary["tokens"] == 4 * 2 * ROUND_TOKENS
    assert {"config.yaml", "status.json", "audit", "tensorboard"} < {p.name for p in plan.run_dir.iterdir()}

    lines = list(audit.read(plan.run_dir))
    assert {line["verdict"] for line in lines} == {"accepted"}
    from_clients = [line for line in lines if f"{line['node']}/{line['sender']}" in summary["nodes"]]
    by_sender: dict[str, list[int]] = {}
    for line in from_clients:
        by_sender.setdefault(f"{line['node']}/{line['sender']}", []).append(line["seq"])
    for path, node in summary["nodes"].items():
        assert len(by_sender.get(path, [])) == node["accepted"], path
    for spec in plan.root.clients:
        assert by_sender[spec.path] == [1, 2]


def test_every_node_leaves_a_checkpoint_of_its_last_state(tiny: Tiny) -> None:
    plan = rundir.create(tiny())
    summary = simulate(plan).summary
    for path in plan.kinds:
        found = checkpoint.load(checkpoint.folder(plan.run_dir, path))
        assert found is not None
        assert found[0]["layout"] == plan.layout.hash
        if path == "world":
            assert params_sha256(found[1]["theta"]) == summary["params_sha256"]


def test_a_run_that_is_stopped_says_so(tiny: Tiny) -> None:
    events = iter(range(10_000))
    plan = rundir.create(tiny(budget={"rounds": 50}))
    summary = simulate(plan, should_stop=lambda: next(events) > 60).summary
    assert summary["status"] == "stopped"
    assert 0 < summary["tokens"] < 4 * 50 * ROUND_TOKENS


# ---- budgets -----------------------------------------------------------------------------------------------


def test_a_budget_of_rounds_gives_every_client_the_same_steps(tiny: Tiny, tmp_path: Path) -> None:
    simulation, records = run(tiny(pair(tmp_path, slow=7.0), budget={"rounds": 5}))
    for path, one in simulation.clients.items():
        assert one.steps == 5 * 4
        assert [record.round for record in records.of(RoundRecord, path)] == [1, 2, 3, 4, 5]


def test_a_budget_of_tokens_is_kept_and_fast_clients_do_more_of_it(tiny: Tiny, tmp_path: Path) -> None:
    budget = 20 * ROUND_TOKENS
    simulation, _ = run(tiny(pair(tmp_path, fast=1.0, slow=4.0), budget={"tokens": budget}))
    fast, slow = (simulation.clients[f"world/{name}"].tokens for name in ("fast", "slow"))
    assert budget <= fast + slow <= budget + 2 * ROUND_TOKENS
    assert 3.0 <= fast / slow <= 5.0


def test_a_budget_of_tokens_reaches_down_to_federations(tiny: Tiny) -> None:
    budget = 24 * ROUND_TOKENS
    simulation, _ = run(tiny(budget={"tokens": budget}))
    total = sum(one.tokens for one in simulation.clients.values())
    assert simulation.nodes["world"].published.tokens == total
    # What a federation has begun is known to the world an exchange later.
    assert budget <= total <= budget + 2 * 4 * ROUND_TOKENS


def test_a_budget_of_seconds_begins_no_round_after_its_end(tiny: Tiny, tmp_path: Path) -> None:
    simulation, _ = run(tiny(pair(tmp_path, fast=1.0, slow=3.0), budget={"seconds": 10.0}))
    fast, slow = (simulation.clients[f"world/{name}"].round for name in ("fast", "slow"))
    assert 7 <= fast <= 10
    assert 3 <= slow <= 4
    assert simulation.now_s < 10.0 + 3.0 + 1.0


# ---- virtual time ------------------------------------------------------------------------------------------


def test_a_slow_client_does_not_delay_others_when_asynchronous(tiny: Tiny, tmp_path: Path) -> None:
    _, even = run(tiny(pair(tmp_path, slow=1.0), budget={"rounds": 4}))
    _, uneven = run(tiny(pair(tmp_path, slow=20.0), budget={"rounds": 4}))
    assert finished_s(uneven, "world/fast") == pytest.approx(finished_s(even, "world/fast"), abs=0.01)
    assert finished_s(uneven, "world/slow") > 80


def test_a_slow_client_delays_all_when_synchronous(tiny: Tiny, tmp_path: Path) -> None:
    plan = tiny(pair(tmp_path, slow=20.0), budget={"rounds": 4}, aggregation={"trigger": "synchronous"})
    _, records = run(plan)
    assert finished_s(records, "world/fast") > 60  # its last three rounds waited for the slow one's first three


def test_a_slow_federation_does_not_delay_another_when_asynchronous(tiny: Tiny, tmp_path: Path) -> None:
    slow = {"tokens_per_s": ROUND_TOKENS / 20.0}
    children = [
        {"federation": "quick", "children": [client("a", tmp_path, 1)]},
        {"federation": "slow", "simulation": slow, "children": [client("b", tmp_path, 2)]},
    ]
    _, records = run(tiny(children, budget={"rounds": 3}))
    assert finished_s(records, "world/quick") < 5
    assert finished_s(records, "world/slow") > 60


def test_a_round_takes_its_tokens_and_its_bytes(tiny: Tiny, tmp_path: Path) -> None:
    # One round: a pull (0.5 s there and back 0.5 s + the model), 2 s of training, a push, an answer, a goodbye.
    link = {"tokens_per_s": ROUND_TOKENS / 2.0, "latency_s": 0.5, "bandwidth_gbps": 0.001}
    plan = tiny([client("a", tmp_path, 1, simulation=link)], budget={"rounds": 1})
    _, records = run(plan)
    model_s = 8 * plan.layout.nbytes / 1e6
    [verdict] = records.of(VerdictRecord, "world")
    assert verdict.now_s == pytest.approx(0.5 + (0.5 + model_s) + 2.0 + (0.5 + model_s), rel=0.01)


def test_stale_updates_come_from_slow_clients(tiny: Tiny, tmp_path: Path) -> None:
    _, records = run(tiny(pair(tmp_path, slow=5.0), budget={"rounds": 6}))
    taus = {name: [v.tau for v in records.of(VerdictRecord, "world") if v.sender == name] for name in ("fast", "slow")}
    assert max(taus["slow"]) >= 4
    assert max(taus["fast"]) <= 1


def test_a_client_unlike_the_others_ends_with_the_model_of_training_alone(tiny: Tiny, tmp_path: Path) -> None:
    """It trains the world's model all the same, and validation text chooses its own at every pull and at the end."""
    children = [client(name, tmp_path, seed) for seed, name in enumerate("abc", start=1)]
    odd = tmp_path / "odd.txt"
    odd.write_text("\n\n".join("0123456789"[n % 10] * 60 + "~" * (n % 7) for n in range(400)))
    children.append({"client": "odd", "data": {"files": [str(odd)]}})
    plan = tiny(
        children,
        aggregation={"trigger": "synchronous"},
        model=TINY_MODEL | {"key_layers": []},
        merge={"client": "validated"},
        training={"local_steps": 20, "batch_size": 8},
        budget={"rounds": 4},
    )
    simulation, records = run(plan)
    assert [record.m for record in records.of(MergeRecord, "world/odd")] == [0.0, 0.0, 0.0]
    alone, _ = run(
        tiny(
            [{"client": "odd", "data": {"files": [str(odd)]}}],
            aggregation={"trigger": "synchronous"},
            model=TINY_MODEL | {"key_layers": []},
            merge={"client": 0.0},
            training={"local_steps": 20, "batch_size": 8},
            budget={"rounds": 4},
        )
    )
    mine, its = (s.clients["world/odd"].trainer.read() for s in (simulation, alone))
    assert params_sha256(mine) == params_sha256(its) != params_sha256(simulation.nodes["world"].theta)


def test_a_budget_in_tokens_is_spent_to_the_round(tiny: Tiny, tmp_path: Path) -> None:
    plan = tiny(pair(tmp_path, fast=1.0, slow=3.0), budget={"tokens": 10 * ROUND_TOKENS + 1})
    simulation, _ = run(plan)
    assert sum(each.tokens for each in simulation.clients.values()) == 11 * ROUND_TOKENS
    assert simulation.clients["world/fast"].tokens > 2 * simulation.clients["world/slow"].tokens
