"""Early stopping: a client's model is that of its best round, by its validation text."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from support.worlds import client

from worldlm_ray.client.client import Client
from worldlm_ray.errors import ConfigError
from worldlm_ray.exchange.messages import Model
from worldlm_ray.experiments import evaluate
from worldlm_ray.plan import build, rundir
from worldlm_ray.plan.plan import Plan
from worldlm_ray.simulation.simulator import simulate

Tiny = Callable[..., Plan]
KEPT = {"keep_best": True, "tokens": 64, "final_tokens": 128, "every_rounds": 1}


def trained(plan: Plan, losses: Iterable[float], monkeypatch: pytest.MonkeyPatch) -> tuple[Client, list[np.ndarray]]:
    """A client after a round per loss but the first, which is measured before; and its models."""
    one, given = Client(plan, plan.root.clients[0]), list(losses)
    waiting = iter(given)
    monkeypatch.setattr(one, "validate", lambda tokens: next(waiting))
    values, models = build.initial(plan), [build.initial(plan)]
    for version in range(len(given) - 1):
        model = Model(version=version, progress=0.0, finished=False, tokens=1.0, last_seq=version, values=values)
        one.begin(model, now_s=0.0)
        one.train()
        models.append(one.trainer.read())
        one.update()
    return one, models


def test_the_round_with_the_lowest_loss_is_kept(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = tiny(evaluation=KEPT, budget={"rounds": 9})
    one, models = trained(plan, [4.0, 3.0, 2.0, 2.5, 2.0, math.nan], monkeypatch)
    assert one.best is not None
    assert (one.best.round, one.best.loss) == (2, 2.0)
    assert one.best.values.tobytes() == models[2].tobytes()
    assert one.report(128) == one.measure(128, parameters=models[2])
    assert one.measure(128) != one.report(128), "the curve goes on with the model that is trained"
    record = one.round_record(now_s=1.0, train_s=1.0, busy_fraction=1.0, measure=None)
    assert record.best_round == 2
    back = Client(plan, plan.root.clients[0])
    back.restore(*one.state())
    assert back.best is not None
    assert (back.best.round, back.best.loss) == (2, 2.0)
    assert back.best.values.tobytes() == models[2].tobytes()


def test_the_model_before_the_first_round_may_be_the_best(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    one, models = trained(tiny(evaluation=KEPT), [1.0, 2.0, 3.0], monkeypatch)
    assert one.best is not None
    assert one.best.round == 0
    assert one.best.values.tobytes() == models[0].tobytes()


def test_only_measured_rounds_are_judged(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = tiny(evaluation=KEPT | {"every_rounds": 2}, budget={"rounds": 9})
    one = Client(plan, plan.root.clients[0])
    measured = list[int]()
    monkeypatch.setattr(one, "validate", lambda tokens: measured.append(one.round) or 9.0 - one.round)
    for version in range(5):
        values = build.initial(plan)
        model = Model(version=version, progress=0.0, finished=False, tokens=1.0, last_seq=version, values=values)
        one.begin(model, now_s=0.0)
        one.train()
        one.update()
    assert measured == [0, 2, 4]
    with pytest.raises(ConfigError, match=r"evaluation\.keep_best: no round is measured"):
        tiny(evaluation=KEPT | {"every_rounds": 0})


@pytest.mark.parametrize("settings", [{"validation_fraction": 0.0}, {}])
def test_a_run_says_which_round_is_each_clients(tiny: Tiny, tmp_path: Path, settings: dict[str, float]) -> None:
    one = client("a", tmp_path, 1)
    one["data"] |= settings
    plan = rundir.create(tiny([one], evaluation=KEPT, budget={"rounds": 3}, training={"lr": 0.3, "local_steps": 4}))
    simulate(plan)
    summary = json.loads((plan.run_dir / "summary.json").read_text(encoding="utf-8"))
    node = summary["nodes"]["world/a"]
    assert (node["best_round"] is None) == bool(settings)
    # The checkpoint holds the same model: the run folder's measure is the summary's.
    assert evaluate.evaluate(str(plan.run_dir), tokens=128)["world/a"].loss == node["loss"]
