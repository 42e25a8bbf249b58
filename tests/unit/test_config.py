"""Configurations: what a user gets wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.configs import ITALY, italy, planned, problem, starts

from worldlm_ray.config.loading import load
from worldlm_ray.errors import ConfigError
from worldlm_ray.plan import build, rundir


def test_the_configuration_in_order_is_one(tmp_path: Path, raw: dict[str, Any]) -> None:
    made = planned(tmp_path, raw)
    assert list(made.kinds) == ["world", "world/europe", "world/europe/italy", "world/europe/germany", "world/japan"]
    assert made.config.name == "mine"


# ---- what a user gets wrong --------------------------------------------------------------------------------


def test_an_unknown_key_deep_in_the_tree(tmp_path: Path, raw: dict[str, Any]) -> None:
    italy(raw)["training"] = {"locl_steps": 5}
    line = problem(tmp_path, raw)
    assert starts(line, f"{ITALY}.training.locl_steps")
    assert "did you mean 'local_steps'?" in line


@pytest.mark.parametrize(
    ("section", "key", "suggestion"),
    [("trainin", "trainin", "training"), ("training.local_stps", "training.local_stps", "local_steps")],
)
def test_an_unknown_key_at_the_top(
    tmp_path: Path, raw: dict[str, Any], section: str, key: str, suggestion: str
) -> None:
    above, _, below = section.partition(".")
    raw[above] = {below: 5} if below else {"local_steps": 5}
    line = problem(tmp_path, raw)
    assert starts(line, key)
    assert f"did you mean {suggestion!r}?" in line


def test_an_unknown_key_of_a_node(tmp_path: Path, raw: dict[str, Any]) -> None:
    italy(raw)["agregation"] = {}
    line = problem(tmp_path, raw)
    assert starts(line, f"{ITALY}.agregation")
    assert "did you mean 'aggregation'?" in line


@pytest.mark.parametrize(
    ("settings", "key", "expected"),
    [
        ({"training": {"local_steps": "many"}}, "training.local_steps", "a whole number"),
        ({"training": {"local_steps": 2.5}}, "training.local_steps", "a whole number"),
        ({"training": {"lr": "fast"}}, "training.lr", "a number"),
        ({"training": {"lr": [1]}}, "training.lr", "a number"),
        ({"training": "fast"}, "training", "a mapping"),
        ({"training": [1, 2]}, "training", "a mapping"),
        ({"training": {"betas": 0.9}}, "training.betas", "a list"),
        ({"aggregation": {"trigger": "sometimes"}}, "aggregation.trigger", "goal_achieved"),
        ({"aggregation": {"staleness": {"fn": "poly"}}}, "aggregation.staleness.fn", "polynomial"),
        ({"aggregation": {"attention": "cosine"}}, "aggregation.attention", "a mapping"),
        ({"data": {"files": "a.txt"}}, "data.files", "a list"),
        ({"placement": {"labels": ["eu"]}}, "placement.labels", "a mapping"),
    ],
)
def test_a_wrong_type(tmp_path: Path, raw: dict[str, Any], settings: dict[str, Any], key: str, expected: str) -> None:
    italy(raw).update(settings)
    line = problem(tmp_path, raw)
    assert starts(line, f"{ITALY}.{key}")
    assert expected in line


def test_a_data_file_that_is_not_there(tmp_path: Path, raw: dict[str, Any]) -> None:
    italy(raw)["data"] = {"files": ["no/such/file.txt"]}
    line = problem(tmp_path, raw)
    assert starts(line, f"{ITALY}.data.files[0]")
    assert "'no/such/file.txt'" in line


def test_a_data_file_that_is_empty(tmp_path: Path, raw: dict[str, Any]) -> None:
    (tmp_path / "empty.txt").touch()
    italy(raw)["data"] = {"files": [str(tmp_path / "empty.txt")]}
    assert starts(problem(tmp_path, raw), f"{ITALY}.data.files[0]")


def test_a_client_without_text(tmp_path: Path, raw: dict[str, Any]) -> None:
    del raw["data"]
    assert starts(problem(tmp_path, raw), f"{ITALY}.data.files")


def test_a_corpus_that_does_not_exist(tmp_path: Path, raw: dict[str, Any]) -> None:
    italy(raw)["data"] = {"corpus": "python_stdlb"}
    line = problem(tmp_path, raw)
    assert starts(line, f"{ITALY}.data.corpus")
    assert "did you mean 'python_stdlib'?" in line


@pytest.mark.parametrize("content", ["", "\n\n", "# nothing but a comment\n"])
def test_an_empty_configuration_file(tmp_path: Path, content: str) -> None:
    assert starts(problem(tmp_path, content), "budget")


@pytest.mark.parametrize("content", ["- a\n- b\n", "training: {lr: 1", "a: b: c", "\tx: 1", "5"])
def test_a_configuration_file_that_is_no_mapping(tmp_path: Path, content: str) -> None:
    assert "mine.yaml: is not" in problem(tmp_path, content)


@pytest.mark.parametrize(("name", "missing"), [("nowhere.yaml", "no file"), ("quickstrat", "no preset")])
def test_a_configuration_that_is_not_there(name: str, missing: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(name)
    assert f"there is {missing} '{name}'" in str(caught.value)
    assert caught.value.cure


def test_a_preset_with_a_typo_is_suggested() -> None:
    with pytest.raises(ConfigError, match="did you mean 'quickstart'"):
        load("quickstrat")


@pytest.mark.parametrize("value", [-1, 0])
def test_steps_that_are_not_positive(tmp_path: Path, raw: dict[str, Any], value: int) -> None:
    italy(raw)["training"] = {"local_steps": value}
    line = problem(tmp_path, raw)
    assert starts(line, f"{ITALY}.training.local_steps")
    assert f"got {value}" in line
    assert "above 0" in line


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("training", "batch_size", 0),
        ("training", "lr", 0.0),
        ("training", "lr", float("nan")),
        ("training", "weight_decay", -0.1),
        ("training", "min_lr_ratio", 1.1),
        ("training", "warmup_fraction", -0.1),
        ("training", "betas", [0.9]),
        ("training", "betas", [0.9, 1.0]),
        ("training", "step_delay_s", -1.0),
        ("aggregation", "buffer_size", 0),
        ("aggregation", "quorum", 0),
        ("aggregation", "push_every", 0),
        ("aggregation", "time_up_s", 0.0),
        ("aggregation", "max_staleness", -1),
        ("aggregation", "max_update_norm", 0.0),
        ("merge", "client", 1.5),
        ("merge", "federation", -0.5),
        ("resources", "cpus", 0),
        ("resources", "gpus", -1.0),
        ("simulation", "tokens_per_s", 0.0),
        ("simulation", "bandwidth_gbps", 0.0),
        ("simulation", "latency_s", -1.0),
        ("data", "heldout_fraction", 1.0),
    ],
)
def test_an_impossible_value(tmp_path: Path, raw: dict[str, Any], section: str, key: str, value: Any) -> None:
    italy(raw)[section] = {key: value}
    assert starts(problem(tmp_path, raw), f"{ITALY}.{section}.{key}")


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"attention": {"temperature": 0.0}}, "attention.temperature"),
        ({"staleness": {"a": 0.0}}, "staleness.a"),
        ({"server_optimizer": {"betas": [1.0, 0.5]}}, "server_optimizer.betas"),
        ({"server_optimizer": {"momentum": 2.0}}, "server_optimizer.momentum"),
    ],
)
def test_an_impossible_value_of_a_rule(tmp_path: Path, raw: dict[str, Any], settings: dict[str, Any], key: str) -> None:
    raw["world"]["children"][0]["aggregation"] = settings
    assert starts(problem(tmp_path, raw), f"world.children[0].aggregation.{key}")


def test_an_impossible_value_at_the_top_is_named(tmp_path: Path, raw: dict[str, Any]) -> None:
    raw["training"] = {"local_steps": -5}
    assert "training.local_steps: got -5" in problem(tmp_path, raw)


def test_two_siblings_of_one_name(tmp_path: Path, raw: dict[str, Any]) -> None:
    raw["world"]["children"][0]["children"][1]["client"] = "italy"
    line = problem(tmp_path, raw)
    assert starts(line, "world.children[0].children[1].client")
    assert f"'italy' is taken by {ITALY}" in line


def test_cousins_may_share_a_name(tmp_path: Path, raw: dict[str, Any]) -> None:
    raw["world"]["children"][1]["client"] = "italy"
    assert {"world/italy", "world/europe/italy"} < set(planned(tmp_path, raw).kinds)


def test_a_client_with_children(tmp_path: Path, raw: dict[str, Any]) -> None:
    italy(raw)["children"] = [{"client": "rome"}]
    line = problem(tmp_path, raw)
    assert starts(line, f"{ITALY}.children")
    assert "federation" in line


@pytest.mark.parametrize("children", [None, [], {}, "italy"])
def test_a_federation_without_children(tmp_path: Path, raw: dict[str, Any], children: Any) -> None:
    raw["world"]["children"][0]["children"] = children
    line = problem(tmp_path, raw)
    assert starts(line, "world.children[0].children")
    assert "'europe'" in line


@pytest.mark.parametrize("world", [None, {}, [], "europe"])
def test_a_run_without_a_tree(tmp_path: Path, raw: dict[str, Any], world: Any) -> None:
    raw["world"] = world
    assert starts(problem(tmp_path, raw), "world")


@pytest.mark.parametrize("child", ["italy", 5, None, {}, {"client": "a", "federation": "b"}, {"training": {}}])
def test_a_child_that_is_neither_client_nor_federation(tmp_path: Path, raw: dict[str, Any], child: Any) -> None:
    raw["world"]["children"][1] = child
    assert starts(problem(tmp_path, raw), "world.children[1]")


@pytest.mark.parametrize("name", ["", "a/b", "..", "with space", "-x"])
def test_a_name_that_cannot_be_a_folder(tmp_path: Path, raw: dict[str, Any], name: str) -> None:
    italy(raw)["client"] = name
    assert problem(tmp_path, raw).startswith(ITALY)


def test_an_unknown_model_preset(tmp_path: Path, raw: dict[str, Any]) -> None:
    raw["model"]["preset"] = "nanoo"
    line = problem(tmp_path, raw)
    assert starts(line, "model.preset")
    assert "did you mean 'nano'?" in line


@pytest.mark.parametrize(
    ("key", "value"), [("layers", 0), ("context", -1), ("heads", 3), ("kv_heads", 3), ("hidden_size", 0)]
)
def test_a_model_that_cannot_be_built(tmp_path: Path, raw: dict[str, Any], key: str, value: int) -> None:
    raw["model"][key] = value
    assert starts(problem(tmp_path, raw), f"model.{key}")


def test_a_key_layer_pattern_that_matches_nothing(tmp_path: Path, raw: dict[str, Any]) -> None:
    raw["model"]["key_layers"] = ["lm_head.*", "model.layer.0.*"]
    line = problem(tmp_path, raw)
    assert starts(line, "model.key_layers[1]")
    assert "model.layers.0.*" in line


@pytest.mark.parametrize("budget", [None, {}, {"rounds": 2, "tokens": 5}, {"rounds": 1, "tokens": 1, "seconds": 1.0}])
def test_exactly_one_budget(tmp_path: Path, raw: dict[str, Any], budget: Any) -> None:
    raw["budget"] = budget
    line = problem(tmp_path, raw)
    assert starts(line, "budget")
    assert "exactly one of tokens, rounds, seconds" in line


@pytest.mark.parametrize("budget", [{"rounds": 0}, {"tokens": -1}, {"seconds": 0.0}])
def test_a_budget_of_nothing(tmp_path: Path, raw: dict[str, Any], budget: dict[str, Any]) -> None:
    raw["budget"] = budget
    assert starts(problem(tmp_path, raw), f"budget.{next(iter(budget))}")


def test_a_wrong_budget_is_one_problem(tmp_path: Path, raw: dict[str, Any]) -> None:
    raw["budget"] = {"rounds": 1.5}
    assert starts(problem(tmp_path, raw), "budget.rounds")


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("simulation", "latency_s", 1e308),
        ("simulation", "tokens_per_s", 1e-300),
        ("simulation", "bandwidth_gbps", 1e-300),
        ("training", "step_delay_s", 1e308),
    ],
)
def test_times_without_end_are_refused(
    tmp_path: Path, raw: dict[str, Any], section: str, name: str, value: float
) -> None:
    raw[section] = {name: value}
    assert starts(problem(tmp_path, raw), f"{section}.{name}")


def test_a_model_of_a_billion_layers_is_refused_at_once(tmp_path: Path, raw: dict[str, Any]) -> None:
    raw["model"]["layers"] = 10**9
    assert problem(tmp_path, raw) == "model.layers: got 1,000,000,000; give at most 10,000"


def test_a_model_larger_than_the_memory_is_planned_but_not_begun(tmp_path: Path, raw: dict[str, Any]) -> None:
    raw |= {"model": {"hidden_size": 1_000_000, "heads": 2, "layers": 2}, "run_dir": str(tmp_path / "run")}
    made = planned(tmp_path, raw)
    for begin in (lambda: build.initial(made), lambda: rundir.create(made, simulated=True)):
        with pytest.raises(
            ConfigError, match=r"^model: a model of [\d,]+ parameters needs [\d,.]+ GiB, this machine has"
        ):
            begin()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("budget", [{"rounds": 1}, {"tokens": 1}, {"seconds": 0.5}])
def test_each_budget_alone_is_one(tmp_path: Path, raw: dict[str, Any], budget: dict[str, Any]) -> None:
    raw["budget"] = budget
    name, value = next(iter(budget.items()))
    assert getattr(planned(tmp_path, raw).config.budget, name) == value


def test_two_tokenizers_in_one_world(tmp_path: Path, raw: dict[str, Any]) -> None:
    raw["world"]["children"][1]["data"] = {"tokenizer": "other.json"}
    assert starts(problem(tmp_path, raw), "world.children[1].data.tokenizer")


def test_a_placeholder_that_must_be_given(tmp_path: Path, raw: dict[str, Any]) -> None:
    raw |= {"data_dir": "???"}
    italy(raw)["data"] = {"files": ["${data_dir}/it.txt"]}
    line = problem(tmp_path, raw)
    assert starts(line, "data_dir")
    assert "data_dir=" in line
