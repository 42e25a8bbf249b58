"""Adapters that another run begins from, or that a council holds: whole weights, and the logits are equal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.pretrained import computed_here, logits, save_pretrained, world

from worldlm_ray.client.best import own_model
from worldlm_ray.client.measure import MeasuredModel
from worldlm_ray.config.loading import from_mapping, to_mapping
from worldlm_ray.experiments import comparison_run, newcomer
from worldlm_ray.experiments.comparison_run import BASE, run_one
from worldlm_ray.experiments.council_folder import export_council
from worldlm_ray.experiments.council_serving import load, of_run
from worldlm_ray.experiments.evaluate import evaluate
from worldlm_ray.experiments.export import export
from worldlm_ray.experiments.methods import ALL
from worldlm_ray.experiments.stages import from_model, stages
from worldlm_ray.plan import build, rundir
from worldlm_ray.plan.plan import Plan, make_plan
from worldlm_ray.simulation.simulator import simulate
from worldlm_ray.storage import checkpoint

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")


def own_parameters(run_dir: Path, node: str) -> np.ndarray:
    found = checkpoint.load(checkpoint.folder(run_dir, node))
    assert found is not None
    return own_model(found[1])


def logits_of(plan: Plan, node: str) -> np.ndarray:
    return computed_here(plan, own_parameters(plan.run_dir, node))


def test_the_second_stage_begins_from_what_the_first_has_trained(tmp_path: Path) -> None:
    config = world(tmp_path, save_pretrained(tmp_path / "base"), trainable="lora").config
    found = run_one(to_mapping(config), "pooled+ft", 0, str(tmp_path / "out"))
    run = tmp_path / "out" / "runs" / "pooled+ft-0"
    first, second = stages(config, "pooled+ft")
    pooled = rundir.reopen(str(run / BASE), check_data=False)
    tuned = make_plan(from_model(second, str(run / BASE / comparison_run.MODEL)))
    before = logits_of(pooled, ALL)
    assert np.abs(before - computed_here(pooled, build.initial(pooled))).max() > 1e-3
    np.testing.assert_allclose(computed_here(tuned, build.initial(tuned)), before, atol=1e-5)
    assert first.budget.rounds == 1
    reopened = rundir.reopen(str(run), check_data=False)
    assert reopened.config.model.initial_from == tuned.config.model.initial_from
    # Each stage's adapters are measured on the model that they were trained on.
    owns = evaluate(str(run), tokens=config.evaluation.final_tokens)
    for each, spec in zip(found["clients"], tuned.root.clients, strict=True):
        measured = MeasuredModel(tuned, spec).measure(config.evaluation.final_tokens, parameters=build.initial(tuned))
        assert each["world"] == pytest.approx(measured.loss, abs=1e-5)
        assert each["own"] == pytest.approx(owns[spec.path].loss, abs=1e-5)


def test_a_newcomer_begins_from_the_worlds_adapters_and_model(tmp_path: Path) -> None:
    config = world(tmp_path, save_pretrained(tmp_path / "base"), trainable="lora").config
    raw = to_mapping(config) | {"training": to_mapping(config)["training"] | {"local_steps": 5}}
    rules = newcomer.Rules(steps=10, alone_steps=5)
    newcomer.newcomers(from_mapping(raw), [0], out=tmp_path / "out", rules=rules)
    old = rundir.reopen(str(tmp_path / "out" / "world" / "runs" / "worldlm-0"), check_data=False)
    few = rundir.reopen(str(tmp_path / "out" / "newcomers" / "0" / "runs" / "local-0"), check_data=False)
    np.testing.assert_allclose(computed_here(few, build.initial(few)), logits_of(old, "world"), atol=1e-5)


@pytest.mark.parametrize(("kind", "trainable"), [("llama_tied_gqa", "lora"), ("gpt2", "lora"), ("qwen3", "all")])
def test_a_council_of_a_pretrained_model_is_read_again(tmp_path: Path, kind: str, trainable: str) -> None:
    plan = rundir.create(world(tmp_path, save_pretrained(tmp_path / "base", kind), trainable=trainable))
    simulate(plan)
    nodes, _ = export_council(str(plan.run_dir), tmp_path / "council")
    assert len(nodes) > 1
    saved, council = of_run(str(plan.run_dir))[0], load(tmp_path / "council")
    assert saved.names == council.names == nodes
    for own, read in zip(saved.models, council.models, strict=True):
        np.testing.assert_allclose(logits(read.root), logits(own.root), atol=1e-5)
    assert council.text("The river", tokens=8, temperature=0.0) == saved.text("The river", tokens=8, temperature=0.0)


def test_whole_weights_replace_an_adapter_in_the_same_folder(tmp_path: Path) -> None:
    plan = rundir.create(world(tmp_path, save_pretrained(tmp_path / "base"), trainable="lora"))
    simulate(plan)
    export(str(plan.run_dir), "world", tmp_path / "out")
    export(str(plan.run_dir), "world", tmp_path / "out", merge=True)
    assert not list((tmp_path / "out").glob("adapter*"))
