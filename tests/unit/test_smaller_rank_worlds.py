"""Worlds of unlike ranks: what they train, export and resume, and which settings are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import worlds
from support.pretrained import computed_here, logits
from support.ranks import SMALL, WORLD, plan_of, raw, record, small_of

from worldlm_ray.client.client import Client
from worldlm_ray.config.loading import from_mapping
from worldlm_ray.errors import ConfigError
from worldlm_ray.exchange.compression import nbytes
from worldlm_ray.experiments.evaluate import evaluate, sound_theta
from worldlm_ray.experiments.export import export
from worldlm_ray.experiments.methods import configure
from worldlm_ray.plan import build, rundir
from worldlm_ray.plan.plan import make_plan
from worldlm_ray.reports.describe import describe
from worldlm_ray.reports.outcome import combine
from worldlm_ray.simulation.simulator import simulate
from worldlm_ray.tensors.buffers import params_sha256
from worldlm_ray.training.making import trainer_of
from worldlm_ray.training.smaller_rank import SmallerRankTrainer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")


# ---- a world ---------------------------------------------------------------------------------------------------------


def test_two_ranks_train_one_model_of_the_world(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = record(monkeypatch)
    plan = rundir.create(plan_of(tmp_path, base, budget={"rounds": 1}))
    simulate(plan)
    client, rank = small_of(plan)
    [wide], [narrow] = made["world/north/a"], made["world/south/b"]
    assert not rank.holds(wide.values)
    assert rank.holds(narrow.values)
    assert rank.cut(narrow.values).all()
    # The mean of both changes: what is beyond rank 2 has moved by half of what the other client has changed.
    mean = build.initial(plan) + (wide.values + narrow.values) / 2
    theta = sound_theta(plan, plan.root)
    np.testing.assert_allclose(theta, mean, atol=1e-6)
    assert not rank.holds(theta)
    # The small client serves its rank; the world's model is measured whole, on its text too.
    measures = evaluate(str(plan.run_dir), tokens=256)
    both = combine(Client(plan, spec).measure(256, parameters=theta) for spec in plan.root.clients)
    assert both is not None
    assert measures["world"].loss == pytest.approx(both.loss, abs=1e-6)
    client.trainer.write(sound_theta(plan, client.spec))
    assert measures["world/south/b"].loss == pytest.approx(client.measure(256).loss, abs=1e-6)


def test_an_export_of_a_client_has_its_rank_and_that_of_the_world_the_worlds(tmp_path: Path, base: Path) -> None:
    plan = rundir.create(plan_of(tmp_path, base))
    simulate(plan)
    for node, r in (("world/south/b", SMALL), ("world/south", WORLD), ("world", WORLD)):
        folder = tmp_path / node
        export(str(plan.run_dir), node, folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"] / config["r"]) == (r, 16 / WORLD)
        assert f"LoRA adapters of rank {r}, alpha {16 * r / WORLD:g}" in (folder / "README.md").read_text()
        whole = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        adapted = logits(peft.PeftModel.from_pretrained(whole, folder))
        expected = computed_here(plan, sound_theta(plan, plan.node(node)))
        np.testing.assert_allclose(adapted, expected, atol=1e-5)
        export(str(plan.run_dir), node, folder / "whole", merge=True)
        merged = transformers.AutoModelForCausalLM.from_pretrained(folder / "whole", dtype=torch.float32)
        np.testing.assert_allclose(logits(merged), expected, atol=1e-5)


@pytest.mark.parametrize("method", ["fedit", "ffa_lora", "fedsa_lora", "worldlm", "local", "pooled+ft"])
def test_methods_keep_the_rank_of_a_client(tmp_path: Path, base: Path, method: str) -> None:
    from worldlm_ray.experiments.comparison_run import run_one

    found = run_one(raw(tmp_path, base), method, 0, str(tmp_path / "out"))
    assert all(np.isfinite(row["own"]) for row in found["clients"])
    plan = rundir.reopen(str(tmp_path / "out" / "runs" / f"{method}-0"), check_data=False)
    ranks = {spec.name: plan.smaller_rank(spec) for spec in plan.root.clients}
    assert sorted(rank is None for rank in ranks.values()) == [False, True]
    for spec in plan.root.clients:
        rank = ranks[spec.name]
        assert rank is None or rank.holds(sound_theta(plan, spec))


def test_a_killed_client_goes_on_to_the_same_bits(tmp_path: Path, base: Path) -> None:
    slow = {"tokens_per_s": 256.0, "latency_s": 0.01}
    hashes = []
    for name, at in (("whole", 90), ("killed", 2.5)):
        (tmp_path / name).mkdir()
        faults = [f"{at}s kill world/south/b"]
        more = {"simulation": slow, "checkpoint": {"every_s": 0.5}, "budget": {"rounds": 4}}
        plan = rundir.create(plan_of(tmp_path / name, base, faults=faults, **more))
        simulate(plan)
        hashes.append([params_sha256(sound_theta(plan, node)) for node in plan.root.walk()])
    assert hashes[0] == hashes[1]


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"training": {"lora_rank": 9}}, r"training\.lora_rank: got 9, but model\.lora\.r is 8.*at most 8"),
        ({"training": {"lora_rank": 0}}, r"training\.lora_rank: got 0; give a number above 0"),
        ({"training": {"lora_rank": 1.5}}, r"training\.lora_rank: .*whole number"),
        ({"model": {"trainable": "all"}}, r"world\.children\[1\]\.training\.lora_rank: .*there are no adapters"),
        ({"model": {"lora": {"r": 1}}}, r"world\.children\[1\]\.training\.lora_rank: got 2, but model\.lora\.r is 1"),
        ({"resources": {"workers": 2}}, r"world\.children\[1\]\.children\[0\]\.training\.lora_rank: .*DeepSpeed"),
    ],
)
def test_a_rank_that_cannot_be_is_refused_by_its_place(
    tmp_path: Path, base: Path, changes: dict[str, Any], said: str
) -> None:
    found = raw(tmp_path, base)
    for section, values in changes.items():
        found[section] = found.get(section, {}) | values
    with pytest.raises(ConfigError, match=said) as caught:
        make_plan(from_mapping(found))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["kin", "fedalt"])
def test_experts_of_unlike_ranks_are_refused(tmp_path: Path, base: Path, method: str) -> None:
    with pytest.raises(ConfigError, match=r"training\.lora_rank: got 2, .* share one A of rank 8"):
        make_plan(configure(from_mapping(raw(tmp_path, base)), method))


def test_the_rank_of_a_client_replaces_that_of_its_federation(tmp_path: Path, base: Path) -> None:
    found = raw(tmp_path, base)
    found["world"]["children"][1]["children"].append(worlds.client("c", tmp_path, 3, training={"lora_rank": 4}))
    plan = make_plan(from_mapping(found))
    ranks = [plan.smaller_rank(spec) for spec in plan.root.clients]
    assert [None if rank is None else rank.shape.lora.r for rank in ranks] == [None, 2, 4]
    assert plan.smaller_rank(plan.node("world/south")) is None, "an aggregator holds the world's rank"


def test_show_says_what_is_trained_and_that_a_push_is_as_long_as_any(tmp_path: Path, base: Path) -> None:
    plan = plan_of(tmp_path, base, exchange={"codec": "int8"})
    nodes = describe(plan)["nodes"]
    wide, narrow = nodes["world/north/a"], nodes["world/south/b"]
    size = plan.layout.nbytes
    assert "rank" not in wide
    assert (narrow["rank"], narrow["trained_parameters"]) == (SMALL, plan.layout.size // 4)
    # Four buffers of its own rank in place of four of the world's, and two to measure the world's model in.
    assert wide["memory_bytes"] - narrow["memory_bytes"] == 4 * (size - size // 4) - 2 * size
    assert narrow["bytes_per_push"] == wide["bytes_per_push"] == nbytes("int8", plan.layout.size)
    assert narrow["bytes_per_pull"] == size


def test_work_counts_frozen_parameters_and_the_client_s_rank(tmp_path: Path, base: Path) -> None:
    from worldlm_ray.experiments.comparison_run import flops

    plan = plan_of(tmp_path, base)
    trained, frozen = plan.layout.size, plan.shape.frozen
    assert frozen > trained
    models = [spec.settings.merge.models_per_token for spec in plan.root.clients]
    of_token = [6 * trained + 4 * frozen, 6 * trained // 4 + 4 * frozen]
    found = flops(plan, {spec.path: {"tokens": 10} for spec in plan.root.clients})
    assert found == sum(10 * each * count for each, count in zip(of_token, models, strict=True))


def test_without_a_rank_the_trainer_is_the_plain_one(tmp_path: Path, base: Path) -> None:
    plan = plan_of(tmp_path, base)
    wide, narrow = (trainer_of(plan.shape, plan.layout, spec.settings, noise=None) for spec in plan.root.clients)
    assert not isinstance(wide, SmallerRankTrainer)
    assert isinstance(narrow, SmallerRankTrainer)
