"""Simulations without training: what they say is what the run with training does."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.worlds import client, write_text

from worldlm_ray.errors import ConfigError
from worldlm_ray.experiments import compare
from worldlm_ray.plan import rundir
from worldlm_ray.plan.plan import Plan
from worldlm_ray.records import (
    AggregationRecord,
    LifeRecord,
    PullRecord,
    PushRecord,
    Record,
    RoundRecord,
    StartRecord,
    VerdictRecord,
)
from worldlm_ray.reports.tables import cost_table
from worldlm_ray.simulation.cost_model import CostClient, cost_plan
from worldlm_ray.simulation.simulator import Simulation, simulate
from worldlm_ray.tracking import curves
from worldlm_ray.tracking.audit import proofs
from worldlm_ray.tracking.charts import BEST, MEAN, WORST
from worldlm_ray.tracking.drawing import MANY_CLIENTS, SHOWN_CLIENTS

Tiny = Callable[..., Plan]


class Records:
    """Stands for the tracker where files are not of interest."""

    def __init__(self) -> None:
        self.all: list[Record] = []

    def record(self, *records: Record) -> None:
        self.all += records


def events(plan: Plan, **options: Any) -> list[Record]:
    records = Records()
    assert Simulation(plan, records, **options).run() == "finished"  # type: ignore[arg-type]
    return records.all


def without_values(records: list[Record]) -> list[Record]:
    """Records without what only a trained model can know."""
    kept: list[Record] = []
    for record in records:
        if isinstance(record, RoundRecord):
            kept.append(replace(record, train_loss=None, loss=None, perplexity_per_token=None, learning_rate=None))
        elif isinstance(record, StartRecord):
            kept.append(replace(record, loss=None, perplexity_per_token=None, heldout_bytes=0))
        elif isinstance(record, AggregationRecord):
            kept.append(replace(record, step_norm=0.0))
        elif isinstance(record, VerdictRecord | PushRecord | PullRecord | LifeRecord):
            kept.append(record)
    return kept


def uneven(folder: Path) -> list[dict[str, Any]]:
    """Two federations and a single client, of different speeds, codecs and links."""
    slow, thin = {"tokens_per_s": 40.0}, {"bandwidth_gbps": 1e-5}
    phones = client("phone", folder, 1) | {"copies": 4}
    write_text(folder / "phone.txt", seed=1, size=80_000)
    return [
        {
            "federation": "north",
            "exchange": {"codec": "int8"},
            "simulation": {"speed_spread": 0.5},
            "children": [phones, client("b", folder, 2, simulation=slow)],
        },
        {
            "federation": "south",
            "simulation": thin,
            "aggregation": {"buffer_size": 2, "push_every": 2, "max_staleness": 3},
            "children": [client("c", folder, 3), client("d", folder, 4, training={"local_steps": 2})],
        },
        client("e", folder, 5),
    ]


@pytest.mark.parametrize("trigger", ["goal_achieved", "synchronous", "time_up"])
@pytest.mark.parametrize("budget", [{"rounds": 3}, {"tokens": 8000}, {"seconds": 20}])
def test_the_same_happens_at_the_same_times_as_with_training(
    tiny: Tiny, tmp_path: Path, trigger: str, budget: dict[str, Any]
) -> None:
    rules = {"trigger": trigger, "time_up_s": 3.0}
    plan = tiny(uneven(tmp_path), aggregation=rules, budget=budget, simulation={"tokens_per_s": 100.0})
    trained = without_values(events(plan))
    counted = without_values(events(cost_plan(plan), make_client=CostClient))
    assert sum(isinstance(record, VerdictRecord) for record in trained) > 10
    assert counted == trained


def test_faults_are_those_of_the_run_with_training(tiny: Tiny, tmp_path: Path) -> None:
    faults = ["5s kill world/north", "8s kill world/north/phone-2", "11s cut world/south for 4s", "20s kill world"]
    plan = tiny(uneven(tmp_path), budget={"rounds": 6}, simulation={"tokens_per_s": 100.0}, faults=faults)
    trained = without_values(events(plan))
    counted = without_values(events(cost_plan(plan), make_client=CostClient))
    assert sum(isinstance(r, LifeRecord) and r.event == "killed" for r in counted) == 3
    assert counted == trained


def test_a_run_without_training_says_that_there_are_no_losses(tiny: Tiny, tmp_path: Path) -> None:
    plan = rundir.create(tiny(uneven(tmp_path), budget={"rounds": 2}, simulation={"train": False}))
    summary = simulate(plan).summary
    assert summary["trained"] is False
    assert summary["params_sha256"] is None
    assert {node["loss"] for node in summary["nodes"].values()} == {None}
    assert summary == json.loads((plan.run_dir / "summary.json").read_text())
    assert summary["nodes"]["world/north/phone-1"]["steps"] == 2 * 4
    assert not (plan.run_dir / "checkpoints").exists()
    found = proofs(plan.run_dir)
    assert len(found) == 10
    assert all(proof.holds for proof in found)
    assert len(cost_table(summary).rows) == 11


def test_no_text_is_read(tiny: Tiny, tmp_path: Path) -> None:
    nowhere = {"client": "phone", "copies": 3, "data": {"files": [str(tmp_path / "missing.txt")]}}
    plan = rundir.create(tiny([nowhere], simulation={"train": False}))
    assert simulate(plan).summary["nodes"]["world/phone-3"]["accepted"] == 2


def test_charts_show_a_sample_of_very_many_clients(tiny: Tiny, tmp_path: Path) -> None:
    many = {"client": "phone", "copies": MANY_CLIENTS + 128}
    plan = rundir.create(tiny([many], budget={"rounds": 1}, simulation={"train": False}))
    summary = simulate(plan).summary
    assert len(summary["nodes"]) == 1 + MANY_CLIENTS + 128
    nodes = {line["node"] for line in curves.read(plan.run_dir)} - {MEAN, BEST, WORST}
    assert len(nodes - {"world"}) == SHOWN_CLIENTS
    assert {path.name for path in (plan.run_dir / "tensorboard").iterdir()} == {"world", MEAN, BEST, WORST}
    status = json.loads((plan.run_dir / "status.json").read_text())
    assert status["nodes"]["world"]["tokens"] == summary["tokens"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"world": {"children": [{"client": "a", "data": {"corpus": "licenses"}, "simulation": {"train": False}}]}},
            r"world\.children\[0\]\.simulation\.train: false, and true at the world",
        ),
        (
            {
                "simulation": {"train": False},
                "privacy": {"unit": "record", "target_epsilon": 8},
                "world": {"children": [{"client": "a", "data": {"corpus": "licenses"}}]},
            },
            r"world\.privacy\.unit: record, but simulation\.train is false",
        ),
        ({"simulation": {"speed_spread": -1}}, r"simulation\.speed_spread: got -1"),
    ],
)
def test_what_cannot_be_simulated_without_training(tiny: Tiny, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(**changes)


def test_methods_cannot_be_compared_without_training(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"simulation\.train: false: there are no losses to compare"):
        compare.compare(tiny(simulation={"train": False}).config, ["fedavg"], [0], out=tmp_path / "out")


def test_clients_may_be_unlike_each_other(tiny: Tiny, tmp_path: Path) -> None:
    many = {"client": "phone", "copies": 300}
    plan = tiny([many], simulation={"train": False, "speed_spread": 0.5, "tokens_per_s": 1000.0})
    speeds = sorted(Simulation(cost_plan(plan), Records(), make_client=CostClient).speeds.values())  # type: ignore[arg-type]
    assert 800 < speeds[150] < 1250
    assert speeds[-1] > 2.5 * 1000
    assert len(set(speeds)) == 300
