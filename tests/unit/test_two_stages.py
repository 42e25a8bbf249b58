"""Pooled text with fine-tuning: a common model first, then every client's fine-tuning of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from worldlm_ray.client.best import own_model
from worldlm_ray.config.loading import to_mapping
from worldlm_ray.config.schema import BudgetConfig
from worldlm_ray.errors import ConfigError, RunError
from worldlm_ray.experiments import comparison_run
from worldlm_ray.experiments.comparison_run import flops, levels, progress_of, run_one
from worldlm_ray.experiments.methods import ALL
from worldlm_ray.experiments.stages import shared_out, stages
from worldlm_ray.plan import build
from worldlm_ray.plan.plan import Plan, make_plan
from worldlm_ray.storage import checkpoint

Tiny = Callable[..., Plan]


def test_both_stages_together_have_the_budget() -> None:
    for rounds, expected in [(20, (16, 4)), (2, (1, 1)), (8, (6, 2))]:
        before, after = shared_out(BudgetConfig(rounds=rounds))
        assert (before.rounds, after.rounds) == expected
    before, after = shared_out(BudgetConfig(tokens=1_000))
    assert (before.tokens, after.tokens) == (800, 200)
    with pytest.raises(ConfigError, match=r"budget\.rounds: got 1; fine-tuning needs two rounds"):
        shared_out(BudgetConfig(rounds=1))


def test_the_second_stage_is_every_client_alone_with_a_third_of_the_learning_rate(tiny: Tiny) -> None:
    config = tiny(budget={"rounds": 5}, training={"lr": 0.3}).config
    first, second = stages(config, "pooled+bf16+ft")
    assert (first.method, first.budget.rounds, first.evaluation.keep_best) == ("pooled+bf16", 4, True)
    assert (second.method, second.budget.rounds, second.evaluation.keep_best) == ("pooled+bf16+ft", 1, True)
    after = make_plan(second)
    assert [spec.settings.training.lr for spec in after.root.clients] == pytest.approx([0.1] * 4)
    assert [spec.settings.merge.client for spec in after.root.clients] == [0.0] * 4
    orders = [spec.settings.data.order for spec in make_plan(stages(config, "fedavg")[0]).root.clients]
    assert [spec.settings.data.order for spec in after.root.clients] == [f"{order}/ft" for order in orders]
    assert [stage.budget.rounds for stage in stages(config, "fedavg+ft")] == [5], "it fine-tunes within one run"


def test_a_client_of_two_models_computes_twice_as_much(tiny: Tiny) -> None:
    found = []
    apfl = {"client": "apart", "mixture": 0.5}
    for merge in ({"client": 1.0}, {"client": "validated"}, {"client": "apart"}, apfl):
        plan = tiny(merge=merge)
        found.append(flops(plan, {spec.path: {"tokens": 10} for spec in plan.root.clients}) / plan.layout.size)
    assert found == [6 * 10 * 4, *[2 * 6 * 10 * 4] * 3]


def test_a_run_of_two_stages_counts_both(tiny: Tiny, tmp_path: Path) -> None:
    method = "pooled+ft"
    evaluation = {"tokens": 64, "final_tokens": 128, "every_rounds": 1}
    config = tiny(budget={"rounds": 3}, evaluation=evaluation).config
    made = make_plan(config)
    found = run_one(to_mapping(config), method, 7, str(tmp_path))
    assert found["tokens"] == 3 * sum(map(made.round_tokens, made.root.clients))
    assert found["flops"] == 6 * made.layout.size * found["tokens"]
    assert {each["steps"] for each in found["clients"]} == {3 * config.training.local_steps}
    tokens = [point["tokens"] for point in found["curve"]]
    assert tokens == sorted(tokens)
    assert tokens[-1] == found["tokens"]
    assert found["world_curve"][-1]["tokens"] <= 2 / 3 * found["tokens"], "the world's model is that of the first stage"
    # A client that is best before its first round of fine-tuning has the best model of the first stage, to the bit.
    run = tmp_path / "runs" / f"{method}-7"
    pooled = checkpoint.load(checkpoint.folder(run / "base", ALL))
    assert pooled is not None
    second = make_plan(comparison_run.from_model(stages(config, method)[1], str(run / "base" / "model")))
    assert np.array_equal(build.initial(second), own_model(pooled[1]))
    for each in found["clients"]:
        assert each["validation"] is None, "only settings of training alone are chosen by it"
        if each["best_round"] == 0:
            assert each["own"] == each["world"]
    again = json.loads((run / "measures.json").read_text(encoding="utf-8"))
    assert again == found == run_one(to_mapping(config), method, 7, str(tmp_path))


def test_progress_of_two_stages_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(place: Path) -> dict[str, float]:
        if not (place / "status.json").is_file():
            raise RunError("there is no run")
        found: dict[str, float] = json.loads((place / "status.json").read_text())
        return found

    base, run = (tmp_path / "runs" / "pooled+ft-0" / "base"), tmp_path / "runs" / "pooled+ft-0"
    base.mkdir(parents=True)
    status = {"updated_at": time.time() + 60, "progress": 0.5}
    monkeypatch.setattr(comparison_run, "read_status", read)
    (base / "status.json").write_text(json.dumps(status))
    assert progress_of(tmp_path, "pooled+ft", 0, since=0.0).trained == pytest.approx(0.4)
    (run / "status.json").write_text(json.dumps(status))
    assert progress_of(tmp_path, "pooled+ft", 0, since=0.0).trained == pytest.approx(0.9)


def test_bytes_of_both_stages_are_added_level_by_level() -> None:
    def summary(**up: int) -> dict[str, object]:
        return {"nodes": {path.replace("_", "/"): {"bytes_up": n, "bytes_down": 2 * n} for path, n in up.items()}}

    found = levels([summary(world=9, world_a=1, world_f=2, world_f_b=4), summary(world=9, world_a=8, world_c=16)])
    assert found == [
        {"level": 1, "bytes_up": 27, "bytes_down": 54},
        {"level": 2, "bytes_up": 4, "bytes_down": 8},
    ]
