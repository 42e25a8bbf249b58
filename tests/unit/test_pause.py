"""Private clients whose budget is spent and that stay: they train and push no more, and follow their parent."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from support.drift import drifting
from support.drift import whole_run as run
from support.worlds import client

from worldlm_ray.errors import ConfigError
from worldlm_ray.exchange.messages import Model
from worldlm_ray.plan.plan import Plan
from worldlm_ray.records import LifeRecord, MergeRecord, RoundRecord
from worldlm_ray.reports import spending
from worldlm_ray.reports.tables import live_table
from worldlm_ray.tracking.audit import proofs
from worldlm_ray.tracking.status import read_status

Tiny = Callable[..., Plan]
ROUNDS = 30
PRIVATE = {"unit": "record", "noise_multiplier": 1.0, "target_epsilon": 3.0, "on_exhausted": "pause"}


def world(tiny: Tiny, folder: Path, privacy: dict[str, Any] | None = None, **changes: Any) -> Plan:
    """A private client whose budget holds a few rounds, beside one without."""
    fast = {"tokens_per_s": 2560.0}  # so that a round of either takes a second
    spent = client("spent", folder, 1, privacy=PRIVATE | (privacy or {}), training={"batch_size": 40}, simulation=fast)
    speed = {"tokens_per_s": 256.0, "latency_s": 0.01}
    settings: dict[str, Any] = {"budget": {"rounds": ROUNDS}, "simulation": speed, "evaluation": {"every_rounds": 0}}
    return tiny([{"federation": "north", "children": [spent, client("free", folder, 2)]}], **(settings | changes))


def paused_s(records: list[Any]) -> list[float]:
    lives = [r for r in records if isinstance(r, LifeRecord) and r.node == "world/north/spent"]
    assert all(r.detail == "its privacy budget is spent" for r in lives if r.event == "paused")
    return [r.now_s for r in lives if r.event == "paused"]


@pytest.mark.parametrize("trigger", ["goal_achieved", "synchronous", "time_up"])
def test_a_paused_client_follows_and_nobody_waits_for_it(tiny: Tiny, tmp_path: Path, trigger: str) -> None:
    rules = {"trigger": trigger, "time_up_s": 2.5}
    simulation, records = run(world(tiny, tmp_path, aggregation=rules), tmp_path / "pause")
    spent, free = (simulation.clients[f"world/north/{name}"] for name in ("spent", "free"))
    assert free.round == ROUNDS
    assert 3 < spent.round < ROUNDS
    assert spent.account is not None
    assert spent.account.epsilon() <= 3.0 < spent.account.epsilon(rounds=1)
    assert len(spent.account.ledger.entries()) == spent.round
    [since_s] = paused_s(records)
    merges = [r for r in records if isinstance(r, MergeRecord) and r.node == spent.spec.path and r.now_s > since_s]
    assert len(merges) >= 3, "it heard of its parent while the other went on"
    # With a merge of 1 its model is its parent's, as of a moment ago.
    north = simulation.nodes["world/north"]
    part = slice(0, simulation.plan.layout.backbone_size)
    np.testing.assert_array_equal(spent.trainer.read()[part], north.theta[part])
    for proof in proofs(simulation.plan.run_dir):
        assert proof.holds
    stop, records = run(world(tiny, tmp_path, {"on_exhausted": "stop"}, aggregation=rules), tmp_path / "stop")
    assert paused_s(records) == []
    assert stop.clients["world/north/spent"].round == spent.round
    if trigger == "goal_achieved":
        # The others learn the same, whether it stays or not.
        np.testing.assert_array_equal(stop.nodes["world"].theta, simulation.nodes["world"].theta)
    assert np.abs(stop.clients["world/north/spent"].trainer.read() - spent.trainer.read()).max() > 0


def test_a_paused_client_outlives_kills_and_cuts(tiny: Tiny, tmp_path: Path) -> None:
    plan = world(tiny, tmp_path, checkpoint={"every_s": 3.0})
    _, records = run(plan, tmp_path / "calm")
    [since_s] = paused_s(records)
    times = [since_s + wait_s for wait_s in (2.3, 5.0, 8.0)]
    events = ["kill world/north/spent for 1s", "kill world/north for 1s", "cut world/north/spent for 2s"]
    faults = [f"{at_s:.2f}s {what}" for at_s, what in zip(times, events, strict=True)]
    simulation, records = run(plan, tmp_path / "faulty", faults=faults)
    spent = simulation.clients["world/north/spent"]
    assert spent.account is not None
    assert spent.account.epsilon() <= 3.0
    assert len(paused_s(records)) >= 2, "it found its budget spent again"
    assert spent.round == len([r for r in records if isinstance(r, RoundRecord) and r.node == spent.spec.path])
    late = [r for r in records if isinstance(r, MergeRecord) and r.node == spent.spec.path and r.now_s > times[-1] + 4]
    assert late
    for proof in proofs(simulation.plan.run_dir):
        assert proof.holds


def parent_at(plan: Plan, version: int, value: float) -> Model:
    return Model(
        version=version,
        progress=0.0,
        finished=False,
        tokens=100.0,
        last_seq=0,
        residuals=(),
        values=np.full(plan.layout.size, value, np.float32),
    )


@pytest.mark.parametrize(("merge", "m"), [(0.0, 0.0), (0.5, 0.5), ("validated", 1.0)])
def test_a_paused_client_goes_on_by_its_merge_rule(tiny: Tiny, tmp_path: Path, merge: Any, m: float) -> None:
    plan = world(tiny, tmp_path, merge={"client": merge})
    one = drifting(plan, plan.node("world/north/spent"))
    start = parent_at(plan, 1, 0.0)
    one.begin(start, now_s=0.0)
    one.train()
    one.update()
    one.paused, part = True, slice(0, plan.layout.backbone_size)
    for version in (2, 3, 4):
        expected = (1.0 - m) * one.trainer.read()[part] + m * version
        [followed, *_] = one.follow(parent_at(plan, version, version), now_s=1.0)
        assert isinstance(followed, MergeRecord)
        assert (followed.version, followed.m) == (version, m)
        np.testing.assert_allclose(one.trainer.read()[part], expected, rtol=1e-6)
        assert one.follow(parent_at(plan, version, 7.0), now_s=1.0) == [], "no newer model"
    again = drifting(plan, plan.node("world/north/spent"))
    again.restore(*one.state())
    again.paused = True
    for life in (one, again):
        life.follow(parent_at(plan, 5, 5.0), now_s=1.0)
    assert again.trainer.read().tobytes() == one.trainer.read().tobytes(), "a restart changes nothing"


def test_a_larger_budget_lets_it_train_again(tiny: Tiny, tmp_path: Path) -> None:
    simulation, _ = run(world(tiny, tmp_path), tmp_path / "pause")
    state = simulation.clients["world/north/spent"].state()
    larger = world(tiny, tmp_path, {"target_epsilon": 9.0})
    larger = replace(larger, config=replace(larger.config, run_dir=str(tmp_path / "pause")))
    one = drifting(larger, larger.node("world/north/spent"))
    one.restore(*state)
    assert not one.is_done
    assert not one.may_pause
    rounds = one.round
    one.begin(parent_at(larger, 99, 0.5), now_s=0.0)
    assert one.began
    one.train()
    assert one.update().tokens == one.round_tokens
    assert one.round == rounds + 1


def test_an_operator_is_told(tiny: Tiny, tmp_path: Path) -> None:
    simulation, _ = run(world(tiny, tmp_path), tmp_path / "pause")
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(live_table(read_status(simulation.plan.run_dir)))
    [row] = spending.statements(simulation.plan)
    console.print(spending.statement_table([row]))
    said = console.export_text()
    assert "paused: its privacy budget is spent" in said
    assert "pause (now)" in said
    assert spending.unpaid(simulation.plan) == []


@pytest.mark.parametrize("unit", ["none", "client"])
def test_who_keeps_no_budget_cannot_pause(tiny: Tiny, tmp_path: Path, unit: str) -> None:
    promise = {"unit": unit, "on_exhausted": "pause"} | ({"noise_multiplier": 1.0} if unit == "client" else {})
    children = [{"federation": "f", "privacy": promise, "children": [client("a", tmp_path, 1)]}]
    with pytest.raises(ConfigError, match=r"^world.children\[0\].privacy.on_exhausted: pause, but privacy.unit is"):
        tiny(children)


def test_pausing_weakens_no_promise(tiny: Tiny, tmp_path: Path) -> None:
    above = {"unit": "record", "noise_multiplier": 1.5, "target_epsilon": 3.0}
    for first, second in (("stop", "pause"), ("pause", "stop")):
        below = client("a", tmp_path, 1, privacy={"on_exhausted": second})
        children = [{"federation": "f", "privacy": above | {"on_exhausted": first}, "children": [below]}]
        assert tiny(children).root.clients[0].settings.privacy.on_exhausted == second
