"""Losses of inner nodes' own models: measured during the run by the clients below, under one name everywhere."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.worlds import client

from worldlm_ray.client import above
from worldlm_ray.client.above import SHARE, Turns
from worldlm_ray.config.schema import BudgetConfig
from worldlm_ray.errors import RunError
from worldlm_ray.experiments.evaluate import evaluate, values
from worldlm_ray.plan import rundir
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.rundir import SUMMARY
from worldlm_ray.records import LifeRecord, OwnModelRecord, Record, RoundRecord, StartRecord
from worldlm_ray.reports.outcome import finish
from worldlm_ray.reports.tables import final_table, live_table
from worldlm_ray.simulation.simulator import Simulation, simulate
from worldlm_ray.tracking.run_state import RunState
from worldlm_ray.tracking.status import read_status
from worldlm_ray.tracking.tracker import Tracker

Tiny = Callable[..., Plan]
A, B = "world/north/a", "world/north/b"
KINDS = {"world": "world", "world/north": "federation", A: "client", B: "client"}


# ---- whose turn it is ----------------------------------------------------------------------------------------------


def test_the_nodes_above_take_turns_and_the_nearest_is_first() -> None:
    turns = Turns("world/north/oslo/a")
    seen = []
    for _ in range(4):
        seen.append(turns.due(100.0))
        turns.done(0.1, measured=True)
    assert seen == ["world/north/oslo", "world/north", "world", "world/north/oslo"]


def test_no_more_than_a_share_of_the_time_goes_into_it() -> None:
    turns, busy_s, measured = Turns("world/a"), 0.0, 0
    turns.expect(0.5)
    costs = iter([0.5, 0.5, 2.0, 0.5, *[0.1] * 1000])
    for _ in range(500):
        busy_s += 1.0
        if turns.due(busy_s) is not None:
            cost_s = next(costs)
            turns.done(cost_s, measured=True)
            busy_s, measured = busy_s + cost_s, measured + 1
            assert turns.spent_s <= SHARE * busy_s + max(cost_s - 0.5, 0.0), "one that took longer than the last"
    assert measured > 50
    assert turns.spent_s <= SHARE * busy_s


def test_a_node_that_cannot_be_asked_costs_its_turn_and_the_time_that_was_waited() -> None:
    turns = Turns("world/north/a")
    turns.expect(0.1)
    turns.done(5.0, measured=False)
    assert turns.due(5.0 / SHARE) is None
    assert turns.due(5.11 / SHARE) == "world"
    assert turns.cost_s == 0.1


# ---- many texts, one number ----------------------------------------------------------------------------------------


def start(node: str, *, loss: float, heldout_bytes: int) -> StartRecord:
    return StartRecord(node=node, now_s=0.0, loss=loss, perplexity_per_token=None, heldout_bytes=heldout_bytes)


def round_of(node: str, *, loss: float, now_s: float) -> RoundRecord:
    counts = {"round": 1, "steps": 1, "tokens": 100, "learning_rate": 0.1, "tokens_per_s": 100.0 / now_s}
    lossy = {"train_loss": loss, "loss": loss, "perplexity_per_token": None}
    return RoundRecord(node=node, now_s=now_s, busy_fraction=1.0, **counts, **lossy)  # type: ignore[arg-type]


def own(
    node: str, by: str, *, loss: float, version: int, now_s: float, per_token: float | None = None
) -> OwnModelRecord:
    heldout_bytes = {A: 300, B: 100}[by]
    return OwnModelRecord(
        node=node,
        now_s=now_s,
        by=by,
        version=version,
        loss=loss,
        perplexity_per_token=per_token,
        heldout_bytes=heldout_bytes,
    )


def begun() -> RunState:
    """Two clients after a round: losses of 2 and 4 on 300 and 100 bytes, a mean of 2.5."""
    state = RunState(KINDS, budget=BudgetConfig(tokens=1_000))
    for record in (start(A, loss=5.0, heldout_bytes=300), start(B, loss=6.0, heldout_bytes=100)):
        state.apply(record)
    for record in (round_of(A, loss=2.0, now_s=10.0), round_of(B, loss=4.0, now_s=10.0)):
        state.apply(record)
    return state


def test_own_model_and_mean_of_the_clients_by_hand() -> None:
    state = begun()
    node = state.nodes["world/north"]
    assert (node.clients_loss, node.loss, node.loss_version) == (2.5, 5.25, 0)
    state.apply(own("world/north", A, loss=3.0, version=2, now_s=11.0))
    assert (node.loss, node.loss_version) == (5.25, 0), "on half of the texts it is of something else"
    state.apply(own("world/north", B, loss=7.0, version=3, now_s=12.0))
    assert (node.loss, node.loss_version, node.loss_measured_s) == ((300 * 3.0 + 100 * 7.0) / 400, 2, 12.0)
    shown = state.snapshot()["nodes"]["world/north"]
    assert shown["perplexity"] == pytest.approx(math.exp(4.0))
    assert shown["clients_perplexity"] == pytest.approx(math.exp(2.5))
    state.apply(own("world/north", A, loss=1.0, version=5, now_s=13.0))
    assert (node.loss, node.loss_version, node.clients_loss) == ((300 * 1.0 + 100 * 7.0) / 400, 3, 2.5)
    assert state.nodes["world"].loss == 5.25, "another node's model"


def test_perplexity_per_token_is_the_geometric_mean_where_tokens_are_not_bytes() -> None:
    state = begun()
    state.apply(own("world", A, loss=3.0, version=2, now_s=11.0, per_token=math.exp(9.0)))
    state.apply(own("world", B, loss=7.0, version=2, now_s=12.0, per_token=math.exp(21.0)))
    assert state.nodes["world"].perplexity_per_token == pytest.approx(math.exp((300 * 9.0 + 100 * 21.0) / 400))
    assert state.snapshot()["nodes"]["world"]["perplexity"] == pytest.approx(math.exp(4.0))


def test_a_client_that_is_silent_or_has_left_is_not_waited_for() -> None:
    state = begun()
    node = state.nodes["world"]
    state.apply(own("world", B, loss=7.0, version=1, now_s=11.0))
    state.apply(own("world", A, loss=3.0, version=1, now_s=12.0))
    state.apply(LifeRecord(node=B, now_s=13.0, event="left"))
    state.apply(own("world", A, loss=2.0, version=4, now_s=100.0))  # B's last round took ten seconds
    assert (node.loss, node.loss_version) == (2.0, 4)


def test_only_a_client_below_measures_a_node() -> None:
    with pytest.raises(RunError, match="which is not above it"):
        begun().apply(own(A, A, loss=1.0, version=1, now_s=1.0))


# ---- during a simulation -------------------------------------------------------------------------------------------


def heard(plan: Plan) -> tuple[dict[str, Any], list[Record]]:
    records: list[Record] = []
    return simulate(rundir.create(plan), on_record=records.append).summary, records


def in_folder(plan: Plan, folder: Path) -> Plan:
    return replace(plan, config=replace(plan.config, run_dir=str(folder)))


@pytest.mark.parametrize("trigger", ["synchronous", "goal_achieved"])
def test_clients_measure_the_models_above_and_the_bits_stay(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trigger: str
) -> None:
    plan = tiny(aggregation={"trigger": trigger}, budget={"rounds": 10})
    summary, records = heard(in_folder(plan, tmp_path / "with"))
    monkeypatch.setattr(above, "SHARE", -1.0)
    without, others = heard(in_folder(plan, tmp_path / "without"))
    assert not any(isinstance(record, OwnModelRecord) for record in others)
    assert summary["params_sha256"] == without["params_sha256"]
    assert {path: node["loss"] for path, node in summary["nodes"].items()} == {
        path: node["loss"] for path, node in without["nodes"].items()
    }
    found = [record for record in records if isinstance(record, OwnModelRecord)]
    assert {(record.node, record.by) for record in found} == {
        (spec.path, below.path) for spec in plan.root.inner for below in spec.clients
    }
    cost_tokens = plan.config.evaluation.tokens / above.FORWARD
    for spec in plan.root.clients:
        measured = sum(record.by == spec.path for record in found)
        assert measured * cost_tokens <= SHARE * 10 * plan.round_tokens(spec)


def test_what_is_told_is_the_loss_of_the_published_model(tiny: Tiny) -> None:
    plan = rundir.create(tiny(aggregation={"trigger": "synchronous"}, budget={"rounds": 12}))
    checked = []

    def check(record: Record) -> None:
        if isinstance(record, OwnModelRecord):
            node = simulation.nodes[record.node]
            measure = simulation.clients[record.by].measure(64, parameters=node.theta)
            assert (record.loss, record.version) == (measure.loss, node.version)
            checked.append(record.node)

    tracker = Tracker(plan.run_dir, kinds=plan.kinds, hparams={}, budget=plan.config.budget)
    simulation = Simulation(plan, tracker, on_record=check)
    simulation.run()
    status = tracker.snapshot()["nodes"]
    tracker.close()
    assert set(checked) == {spec.path for spec in plan.root.inner}
    for spec in plan.root.inner:
        node = status[spec.path]
        assert 0 < node["loss_version"] <= node["version"]
        assert node["loss"] != pytest.approx(node["clients_loss"], abs=1e-6)
        assert node["loss"] < node["loss_start"]


def test_every_place_says_what_evaluate_says_of_the_same_checkpoints(tiny: Tiny, tmp_path: Path) -> None:
    children = [{"federation": "north", "merge": {"client": 0.1}, "children": [client("a", tmp_path, 1)]}]
    children[0]["children"].append(client("b", tmp_path, 2, training={"lr": 0.02}))  # type: ignore[attr-defined]
    plan = rundir.create(tiny(children, budget={"rounds": 4}))
    outcome = simulate(plan)
    truth = values(evaluate(str(plan.run_dir), tokens=plan.config.evaluation.final_tokens))
    status = read_status(plan.run_dir)
    summary = json.loads((plan.run_dir / SUMMARY).read_text())
    assert set(truth) == set(KINDS)
    for path, expected in truth.items():
        for place in (status, summary, outcome.summary):
            node = place["nodes"][path]
            for name in ("loss", "perplexity", "clients_loss", "clients_perplexity"):
                assert node[name] == pytest.approx(expected[name], abs=1e-6), (path, name)
    north = truth["world/north"]
    assert north["loss"] is not None
    assert abs(north["loss"] - (north["clients_loss"] or 0.0)) > 0.01, "two numbers by construction"
    shown = {
        f"{north[name]:.{1 if (north[name] or 0.0) >= 99.95 else 2}f}" for name in ("perplexity", "clients_perplexity")
    }
    for table in (final_table(summary, outcome.samples), live_table(status)):
        console = Console(width=120)
        with console.capture() as captured:
            console.print(table)
        [row] = [line.split() for line in captured.get().splitlines() if line.lstrip().startswith("north")]
        assert shown < set(row)


def test_a_private_client_measures_nothing_for_others(tiny: Tiny, tmp_path: Path) -> None:
    silent = client("a", tmp_path, 1, privacy={"unit": "record", "noise_multiplier": 1.0, "grad_sample_mode": "hooks"})
    plan = tiny([{"federation": "north", "children": [silent]}, client("b", tmp_path, 2)], budget={"rounds": 10})
    summary, records = heard(plan)
    found = [record for record in records if isinstance(record, OwnModelRecord)]
    assert {(record.node, record.by) for record in found} == {("world", "world/b")}
    north = summary["nodes"]["world/north"]
    assert (north["private"], north["loss"], north["clients_loss"]) == (True, None, None)
    console = Console(width=100)
    with console.capture() as captured:
        console.print(final_table(summary, {}), live_table(read_status(plan.run_dir)))
    lines = [line.split() for line in captured.get().splitlines()]
    assert sum(line[0] in ("north", "a") and "private" in line for line in lines if line) == 4


def test_a_run_that_was_left_early_keeps_what_was_measured_with_its_version(tiny: Tiny) -> None:
    plan = rundir.create(tiny([{"federation": "north", "children": [{"client": "a", "data": {"corpus": "licenses"}}]}]))
    tracker = Tracker(plan.run_dir, kinds=plan.kinds, hparams={}, budget=plan.config.budget)
    tracker.record(start(A, loss=5.0, heldout_bytes=300), round_of(A, loss=2.0, now_s=10.0))
    tracker.record(own("world/north", A, loss=3.0, version=2, now_s=11.0))
    named: dict[str, Any] = {"world": None, "samples": {}, "wall_s": 20.0, "status": "stopped", "backend": "ray"}
    summary = finish(plan, tracker, measures={}, **named).summary
    tracker.close()
    north = summary["nodes"]["world/north"]
    assert (north["loss"], north["loss_version"], north["loss_measured_s"], north["clients_loss"]) == (
        3.0,
        2,
        11.0,
        2.0,
    )
    summary["nodes"]["world/north"]["version"] = 4
    summary["nodes"]["world"] |= {"loss": None, "perplexity": None}
    console = Console(width=100)
    with console.capture() as captured:
        console.print(final_table(summary, {}))
    rows = {line.split()[0]: line.split() for line in captured.get().splitlines() if line.strip()}
    assert rows["north"][-3:] == ["20.09", "v2", "7.39"]
    assert rows["world"][-2:] == ["–", "7.39"]  # noqa: RUF001 - the dash that the table shows
