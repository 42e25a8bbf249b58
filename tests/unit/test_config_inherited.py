"""Configurations: what is inherited, overridden and written back."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.configs import ITALY, italy, planned, problem, starts
from support.pretrained import save_pretrained

from worldlm_ray.config.loading import find, from_mapping, load, presets, save, to_mapping
from worldlm_ray.config.schema import RunConfig
from worldlm_ray.plan import plan, tree

# ---- inheritance -------------------------------------------------------------------------------------------


def test_settings_are_inherited_down_the_tree_and_overridden_anywhere(tmp_path: Path, raw: dict[str, Any]) -> None:
    raw["training"] = {"local_steps": 5, "batch_size": 3}
    raw["world"]["training"] = {"lr": 0.25}
    raw["world"]["children"][0]["training"] = {"local_steps": 7}
    italy(raw)["training"] = {"batch_size": 9}
    made = planned(tmp_path, raw)

    def at(path: str) -> tuple[int, int, float]:
        training = made.node(path).settings.training
        return training.local_steps, training.batch_size, training.lr

    assert at("world") == (5, 3, 0.25)
    assert at("world/europe") == (7, 3, 0.25)
    assert at("world/europe/italy") == (7, 9, 0.25)
    assert at("world/europe/germany") == (7, 3, 0.25)
    assert at("world/japan") == (5, 3, 0.25)


def test_every_section_can_be_overridden_at_a_node(tmp_path: Path, raw: dict[str, Any]) -> None:
    raw["world"]["children"][0] |= {
        "aggregation": {"buffer_size": 3, "staleness": {"fn": "hinge"}},
        "merge": {"client": 0.5},
        "resources": {"cpus": 2},
        "placement": {"labels": {"region": "eu"}},
        "simulation": {"tokens_per_s": 5.0},
    }
    made = planned(tmp_path, raw)
    ours, theirs = made.node("world/europe/italy").settings, made.node("world/japan").settings
    assert (ours.aggregation.buffer_size, theirs.aggregation.buffer_size) == (3, 1)
    assert (ours.aggregation.staleness.fn, theirs.aggregation.staleness.fn) == ("hinge", "constant")
    assert (ours.merge.client, theirs.merge.client) == (0.5, "validated")
    assert (ours.resources.cpus, theirs.resources.cpus) == (2, 1)
    assert (ours.placement.labels, theirs.placement.labels) == ({"region": "eu"}, {})
    assert (ours.simulation.tokens_per_s, theirs.simulation.tokens_per_s) == (5.0, 20_000.0)


def test_files_of_a_node_replace_an_inherited_corpus(tmp_path: Path, raw: dict[str, Any], text: str) -> None:
    raw["data"] = {"corpus": "licenses", "max_bytes": 99_000}
    italy(raw)["data"] = {"files": [text]}
    made = planned(tmp_path, raw)
    ours, theirs = made.node("world/europe/italy").settings.data, made.node("world/japan").settings.data
    assert (ours.files, ours.corpus, ours.max_bytes) == ([text], None, 99_000)
    assert (theirs.files, theirs.corpus) == ([], "licenses")


def test_a_corpus_of_a_node_replaces_inherited_files(tmp_path: Path, raw: dict[str, Any]) -> None:
    italy(raw)["data"] = {"corpus": "licenses"}
    data = planned(tmp_path, raw).node("world/europe/italy").settings.data
    assert (data.files, data.corpus) == ([], "licenses")


def test_files_and_a_corpus_in_one_node_are_refused(tmp_path: Path, raw: dict[str, Any], text: str) -> None:
    italy(raw)["data"] = {"files": [text], "corpus": "licenses"}
    assert starts(problem(tmp_path, raw), f"{ITALY}.data.corpus")


def test_a_world_of_four_levels_keeps_its_paths_and_keys(tmp_path: Path, raw: dict[str, Any]) -> None:
    deep: dict[str, Any] = {"client": "rome"}
    for name in ("lazio", "italy", "europe"):
        deep = {"federation": name, "children": [deep]}
    raw["world"]["children"] = [deep]
    client = planned(tmp_path, raw).root.clients[0]
    assert client.path == "world/europe/italy/lazio/rome"
    assert client.key == "world.children[0].children[0].children[0].children[0]"
    assert tree.parent_path(client.path) == "world/europe/italy/lazio"
    assert tree.parent_path("world") is None


# ---- overrides ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("training.lr=1e-4", "world/japan", 1e-4),
        ("world.training.lr=2e-4", "world/europe/italy", 2e-4),
        ("world.children[0].training.lr=1e-4", "world/europe/germany", 1e-4),
        ("world.children[0].children[0].training.lr=0.5", "world/europe/italy", 0.5),
        ("world.children[1].training={lr: 0.125}", "world/japan", 0.125),
    ],
)
def test_an_override_reaches_any_node(
    tmp_path: Path, raw: dict[str, Any], override: str, path: str, value: float
) -> None:
    assert planned(tmp_path, raw, [override]).node(path).settings.training.lr == value


def test_an_override_touches_nothing_else(tmp_path: Path, raw: dict[str, Any]) -> None:
    italy(raw)["training"] = {"batch_size": 9}
    made = planned(tmp_path, raw, ["world.children[0].children[0].training.lr=0.5"])
    assert made.node("world/europe/italy").settings.training.batch_size == 9
    assert made.node("world/europe/germany").settings.training.lr == 3e-3


def test_later_overrides_win(tmp_path: Path, raw: dict[str, Any]) -> None:
    assert planned(tmp_path, raw, ["seed=1", "seed=2"]).config.seed == 2


def test_an_override_may_change_the_kind_of_budget(tmp_path: Path, raw: dict[str, Any]) -> None:
    budget = planned(tmp_path, raw, ["budget.rounds=null", "budget.tokens=4_000"]).config.budget
    assert (budget.rounds, budget.tokens) == (None, 4_000)


def test_an_override_may_hold_an_equals_sign_and_a_list(tmp_path: Path, raw: dict[str, Any]) -> None:
    assert planned(tmp_path, raw, ["name=a=b"]).config.name == "a=b"
    made = planned(tmp_path, raw, ["model.key_layers=[lm_head.*]"])
    assert [layer.name for layer in made.layout.key_layers] == ["lm_head"]


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("trainin.lr=1e-4", "trainin"),
        ("training.lrr=1e-4", "training.lrr"),
        ("world.children[0].trainin.lr=1e-4", "world.children[0].trainin"),
        ("world.children[0].training.lrr=1e-4", "world.children[0].training.lrr"),
        ("world.children[0].children[1].training.lr=fast", "world.children[0].children[1].training.lr"),
        ("world.children[7].training.lr=1e-4", "world.children[7]"),
        ("world.children[x].training.lr=1e-4", "world.children[x]"),
        ("seed.deep=1", "seed"),
        ("training=5", "training"),
        ("training.lr", "training.lr"),
        ("=5", "=5"),
        ("training.lr=[1", "training.lr"),
    ],
)
def test_a_typo_in_an_override(tmp_path: Path, raw: dict[str, Any], override: str, key: str) -> None:
    raw["seed"] = 3
    assert problem(tmp_path, raw, [override]).startswith(key)


# ---- round trips and presets -------------------------------------------------------------------------------


def loaded(folder: Path, raw: dict[str, Any]) -> RunConfig:
    raw["training"] = {"local_steps": 7, "betas": [0.8, 0.9]}
    italy(raw)["aggregation"] = {"staleness": {"fn": "hinge", "a": 2.0}}
    return planned(folder, raw).config


def test_a_mapping_comes_back_equal(tmp_path: Path, raw: dict[str, Any]) -> None:
    there = loaded(tmp_path, raw)
    assert from_mapping(to_mapping(there)) == there


def test_a_saved_configuration_comes_back_equal(tmp_path: Path, raw: dict[str, Any]) -> None:
    there = loaded(tmp_path, raw)
    save(there, tmp_path / "saved.yaml")
    assert load(str(tmp_path / "saved.yaml")) == there


def test_a_plan_is_the_same_in_another_process(tmp_path: Path, raw: dict[str, Any]) -> None:
    there = planned(tmp_path, raw)
    assert pickle.loads(pickle.dumps(there)) == there


def test_a_mapping_is_plain(tmp_path: Path, raw: dict[str, Any]) -> None:
    assert yaml.safe_load(yaml.safe_dump(to_mapping(loaded(tmp_path, raw)))) == to_mapping(loaded(tmp_path, raw))


@pytest.mark.parametrize("name", list(presets()))
def test_every_shipped_preset_is_in_order(name: str, tmp_path: Path) -> None:
    overrides = [f"data_dir={tmp_path}"] if "data_dir: ???" in find(name).read_text() else []
    if "initial_from: ???" in find(name).read_text():
        pytest.importorskip("peft")
        overrides.append(f"model.initial_from={save_pretrained(tmp_path / 'base', max_position_embeddings=256)}")
    made = plan.make_plan(load(name, overrides), check_data=False)
    assert made.config.name == name
    assert made.root.clients


def test_the_quickstart_ships() -> None:
    assert "quickstart" in presets()
