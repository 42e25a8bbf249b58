"""The virtual clock takes the steps of a client's life: what a kill ends, and from what the next life goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.drift import drifting, whole_run
from support.worlds import client

from worldlm_ray.plan.plan import Plan
from worldlm_ray.records import LifeRecord, OwnModelRecord, PushRecord, RoundRecord
from worldlm_ray.simulation.clients import VirtualLife

Tiny = Callable[..., Plan]
ROUNDS = 5


@pytest.fixture
def plan(tiny: Tiny, tmp_path: Path) -> Plan:
    """A client whose rounds take a virtual second each, and one that takes four times as long."""
    slow = {"tokens_per_s": 64.0, "latency_s": 0.25}
    children = [client("quick", tmp_path, 1), client("slow", tmp_path, 2, simulation=slow)]
    speed = {"tokens_per_s": 256.0, "latency_s": 0.25}
    return tiny(
        children,
        budget={"rounds": ROUNDS},
        simulation=speed,
        checkpoint={"every_s": 100.0},
        aggregation={"trigger": "goal_achieved"},
        evaluation={"every_rounds": 1, "tokens": 16},
    )


def test_a_kill_ends_a_life_where_it_is(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, ended = VirtualLife.run, []

    def run(life: VirtualLife) -> Any:
        try:
            return (yield from real(life))
        except GeneratorExit:
            ended.append(life)
            raise

    monkeypatch.setattr(VirtualLife, "run", run)
    _, records = whole_run(plan, tmp_path / "killed", make_client=drifting, faults=["2s kill world/slow for 1s"])
    assert len(ended) == 1, "the life that was killed; all others have come to their end"
    killed, back = (
        i for i, r in enumerate(records) if isinstance(r, LifeRecord) and r.event in ("killed", "continued")
    )
    assert not any(r.node == "world/slow" for r in records[killed + 1 : back]), "a dead client does nothing"
    numbers = [r.round for r in records if isinstance(r, RoundRecord) and r.node == "world/slow"]
    assert numbers == list(range(1, ROUNDS + 1))


def test_a_client_that_dies_after_its_end_keeps_its_last_round(plan: Plan, tmp_path: Path) -> None:
    before, records = whole_run(
        plan, tmp_path / "alive", make_client=drifting, faults=["1s delay world/slow by 0s for 1s"]
    )
    [end_s] = [
        r.now_s for r in records if isinstance(r, LifeRecord) and (r.node, r.event) == ("world/quick", "finished")
    ]
    fault = f"{end_s + 0.5}s kill world/quick for 1s"
    after, records = whole_run(plan, tmp_path / "killed", make_client=drifting, faults=[fault])
    said = [r.event for r in records if isinstance(r, LifeRecord) and r.node == "world/quick"]
    assert said == ["training", "finished", "killed", "continued", "training", "finished"]
    assert sum(isinstance(r, PushRecord) and r.node == "world/quick" for r in records) == ROUNDS, "it trains no more"
    models = [simulation.clients["world/quick"].trainer.read() for simulation in (before, after)]
    np.testing.assert_array_equal(*models)


def test_a_client_measures_above_once_its_update_has_arrived(plan: Plan, tmp_path: Path) -> None:
    _, records = whole_run(plan, tmp_path / "run", make_client=drifting, faults=[])
    looked = {r.now_s for r in records if isinstance(r, OwnModelRecord) and r.by == "world/quick"}
    pushed = [r.now_s for r in records if isinstance(r, PushRecord) and r.node == "world/quick"]
    assert looked
    assert all(any(at_s == pytest.approx(push_s + 0.5, abs=0.01) for push_s in pushed) for at_s in looked)
