"""Values of a configuration: text as it was written, finite numbers, and all problems at once."""

from __future__ import annotations

import math
import pickle
import time
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from support.worlds import TINY_MODEL

from worldlm_ray.config.loading import Node, from_mapping, hint_of, load, save, to_yaml
from worldlm_ray.config.schema import INHERITED, RunConfig
from worldlm_ray.errors import ConfigError, ConfigErrors, WorldLMError
from worldlm_ray.plan import membership
from worldlm_ray.plan.plan import Plan, make_plan

HEAD = "model: {preset: nano}\nbudget: {rounds: 1}\ndata: {corpus: licenses}\n"
WORDS = [
    "no",
    "on",
    "off",
    "Yes",
    "007",
    "1e3",
    "2024_11_26",
    "2024-11-26",
    "0x1F",
    "3.10",
    "0o7",
    "012",
    "12:30",
    "1_0",
]


def loaded(folder: Path, text: str, overrides: list[str] | None = None) -> RunConfig:
    file = folder / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    return load(str(file), overrides or [])


def planned(folder: Path, text: str, overrides: list[str] | None = None) -> Plan:
    return make_plan(loaded(folder, text, overrides), check_data=False)


def again(plan: Plan, folder: Path) -> Plan:
    """The plan from its own config.yaml."""
    save(plan.config, folder / "saved.yaml")
    return make_plan(load(str(folder / "saved.yaml")), check_data=False)


# ---- text as it was written --------------------------------------------------------------------------------


@pytest.mark.parametrize("word", WORDS)
def test_text_stays_what_was_written(tmp_path: Path, word: str) -> None:
    text = (
        f"{HEAD}name: {word}\nrun_dir: {word}\nmethod: {word}\n"
        f"model: {{preset: nano, key_layers: [{word}, lm_head.*]}}\n"
        f"placement: {{labels: {{{word}: {word}}}}}\n"
        f"world: {{children: [{{federation: {word}, data: {{files: [{word}], order: {word}, text_key: {word}}}, "
        f"children: [{{client: {word}, privacy: {{ledger_dir: {word}}}}}]}}]}}\n"
    )
    text = text.replace("model: {preset: nano}\n", "")
    found = loaded(tmp_path, text)
    assert (found.name, found.run_dir, found.method, found.model.key_layers[0]) == (word, word, word, word)
    assert found.placement.labels == {word: word}
    [federation] = found.world["children"]
    assert federation["federation"] == federation["children"][0]["client"] == word
    assert federation["data"] == {"files": [word], "order": word, "text_key": word}
    assert federation["children"][0]["privacy"] == {"ledger_dir": word}
    save(found, tmp_path / "saved.yaml")
    assert load(str(tmp_path / "saved.yaml")) == found


@pytest.mark.parametrize("word", [*WORDS, "a b", "a #b", "a: b", "[x", "{x}", "x=y", "-", "*x", "&x"])
def test_an_override_stays_what_was_written(tmp_path: Path, word: str) -> None:
    one = HEAD + "world: {children: [{client: a}]}\n"
    names = ["run_dir", "data.text_key", "data.order", "placement.labels.zone"]
    found = loaded(tmp_path, one, [f"{name}={word}" for name in names])
    got = [found.run_dir, found.data.text_key, found.data.order, found.placement.labels["zone"]]
    assert got == [word] * 4


def test_quotes_and_null_in_an_override_are_yaml(tmp_path: Path) -> None:
    one = HEAD + "world: {children: [{client: a}]}\n"
    found = loaded(tmp_path, one, ["data.text_key='no'", 'name="null"', "run_dir=null", "data.files=[no, 007]"])
    assert (found.data.text_key, found.name, found.run_dir, found.data.files) == ("no", "null", None, ["no", "007"])


def test_names_of_a_tree_stay_what_was_written(tmp_path: Path) -> None:
    text = HEAD + "world: {children: [{client: no}, {client: off}, {client: 007}, {client: 12:30}, {client: 'null'}]}\n"
    plan = planned(tmp_path, text, ["world.children[1].client=1e3"])
    assert [client.name for client in plan.root.clients] == ["no", "1e3", "007", "12:30", "null"]
    assert again(plan, tmp_path) == plan
    assert make_plan(from_mapping(plan.to_mapping(), resolved=True), check_data=False) == plan


def test_a_client_that_joins_keeps_its_words(tmp_path: Path) -> None:
    plan = planned(tmp_path, HEAD + "world: {children: [{client: a}]}\n")
    changed = membership.with_client(plan, "world", "007", files=[], overrides=["placement.labels.zone=no"])
    assert changed.node("world/007").settings.placement.labels == {"zone": "no"}


@pytest.mark.parametrize("given_", [7, True, 1.5, None, [1], {"a": 1}])
def test_what_a_program_gives_for_text_must_be_text(given_: Any) -> None:
    with pytest.raises(ConfigError, match=r"^name: got .*; expected text"):
        from_mapping({"name": given_, "budget": {"rounds": 1}})


def test_null_is_no_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^world.children\[0\].client: got null; expected text: put it in quotes"):
        planned(tmp_path, HEAD + "world: {children: [{client: null}]}\n")


@pytest.mark.parametrize("name", ["münchen", "中", "Ελλάδα", "हिन्दी", "a1", "Ü"])
def test_names_may_have_letters_of_every_script(tmp_path: Path, name: str) -> None:
    plan = planned(tmp_path, HEAD + f"name: {name}\nworld: {{children: [{{client: {name}}}]}}\n")
    assert plan.root.clients[0].name == name
    assert again(plan, tmp_path) == plan


def test_names_that_look_alike_are_alike(tmp_path: Path) -> None:
    text = HEAD + "world: {children: [{client: m\u00fcnchen}, {client: mu\u0308nchen}]}\n"
    with pytest.raises(ConfigError, match="'münchen' is taken"):
        planned(tmp_path, text)


@pytest.mark.parametrize("name", ["a/b", "", ".", "..", "-x", "a\tb", "a\x1bb", "a b", "x" * 201, "a\u202eb"])
def test_names_that_cannot_be_are_refused_by_name(tmp_path: Path, name: str) -> None:
    text = HEAD + f"world: {{children: [{{client: {yaml.safe_dump(name, allow_unicode=False).splitlines()[0]}}}]}}\n"
    with pytest.raises(ConfigError, match=r"^world.children\[0\].client: "):
        planned(tmp_path, text)


@pytest.mark.parametrize("name", ["a/b", "", ".", "..", "-x", "a\tb"])
def test_a_run_cannot_be_called_everything(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^name: .* cannot be a folder's name"):
        from_mapping({"name": name, "budget": {"rounds": 1}})


@settings(deadline=None, max_examples=50)
@given(st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12))
def test_any_text_survives_config_yaml(text: str) -> None:
    there = from_mapping(
        {"budget": {"rounds": 1}, "run_dir": f"x{text}", "data": {"text_key": f"x{text}"}}, resolved=True
    )
    raw = yaml.safe_load(to_yaml(there))
    assert from_mapping(raw) == there


@pytest.mark.parametrize("folder", ["${x}", "\\${x}", "\\\\${x}", "${oc.env:HOME}", "a${", "$x"])
def test_a_run_folder_is_no_interpolation(tmp_path: Path, folder: str) -> None:
    (tmp_path / "mine.yaml").write_text(HEAD + "world: {children: [{client: a}]}\n")
    plan = make_plan(load(str(tmp_path / "mine.yaml"), run_dir=folder), check_data=False)
    assert plan.config.run_dir == folder
    assert make_plan(from_mapping(plan.to_mapping(), resolved=True), check_data=False) == plan
    assert again(plan, tmp_path) == plan


def test_interpolations_in_a_file_are_resolved(tmp_path: Path) -> None:
    text = HEAD + "data_dir: 007\nworld: {children: [{client: a, data: {files: ['${data_dir}/x.txt']}}]}\n"
    assert planned(tmp_path, text).root.clients[0].settings.data.files == ["007/x.txt"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\na: 2\n", "duplicate key a"),
        ("a: &x [*x]\n", "hold themselves"),
        ("? [1]\n: 2\n", "a key that is no plain text"),
        ("<<: 3\n", "<< needs a mapping"),
    ],
)
def test_yaml_that_no_one_means(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=f"mine.yaml: is not valid YAML .*{problem}"):
        loaded(tmp_path, text)


def test_aliases_cannot_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worldlm_ray.config.yaml_text.LARGEST", 5_000)
    bomb = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12))
    with pytest.raises(ConfigError, match=r"is not valid YAML .*more than 5,000 entries"):
        loaded(tmp_path, bomb)


def test_an_anchor_means_what_its_place_expects(tmp_path: Path) -> None:
    text = HEAD + "seed: &n 007\nname: *n\nworld: {children: [{client: a, <<: {training: &t {lr: 1e-3}}}]}\n"
    found = loaded(tmp_path, text)
    assert (found.seed, found.name, found.world["children"][0]["training"]) == (7, "007", {"lr": 1e-3})


# ---- numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", ["1e6", "1_000_000", "1000000.0", "1000000", "'1e6'"])
def test_whole_numbers_may_be_written_in_any_way(tmp_path: Path, number: str) -> None:
    one = HEAD.replace("rounds: 1", "seconds: null") + "world: {children: [{client: a}]}\n"
    assert loaded(tmp_path, one, [f"budget.tokens={number}"]).budget.tokens == 1_000_000


@pytest.mark.parametrize(("number", "meant"), [("010", 10), ("0x10", 16), ("0", 0), ("-3", -3)])
def test_a_leading_zero_is_no_octal_number(tmp_path: Path, number: str, meant: int) -> None:
    assert loaded(tmp_path, HEAD + f"seed: {number}\n").seed == meant


@pytest.mark.parametrize("number", ["12:30", "4M", "1e6.5", "1.5", "1e30", ".inf", "true", "9223372036854775808"])
def test_what_is_no_whole_number_is_refused(tmp_path: Path, number: str) -> None:
    with pytest.raises(ConfigError, match=r"^budget.tokens: got .*whole number|^budget.tokens: got inf"):
        loaded(tmp_path, HEAD, [f"budget.tokens={number}"])


def test_a_budget_on_the_command_line_replaces_another_kind(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "mine.yaml").write_text(HEAD.replace("rounds: 1", "tokens: 500"))
    budget = load(str(tmp_path / "mine.yaml"), ["budget.rounds=2"], say=said.append).budget
    assert (budget.rounds, budget.tokens, budget.seconds) == (2, None, None)
    assert said == ["budget.rounds on the command line takes the place of budget.tokens"]
    with pytest.raises(ConfigError, match=r"tokens and rounds set; .*budget\.tokens=null"):
        load(str(tmp_path / "mine.yaml"), ["budget.rounds=2", "budget.tokens=7"])


LEAVES = [
    math.nan, math.inf, -math.inf, 1e308, -1, 0, -0.0, "", "a", [], {}, None, True, 2**70, 1e30, ["a"], {"a": "b"},
    [math.nan], "${x", "\0",
]  # fmt: skip


def leaves(of: Any, prefix: str = "") -> Iterator[str]:
    """Every key of the schema that holds no section."""
    for f in fields(of):
        value = getattr(of, f.name)
        yield from leaves(value, f"{prefix}{f.name}.") if is_dataclass(value) else [f"{prefix}{f.name}"]


def with_value(key: str, value: Any) -> dict[str, Any]:
    raw: dict[str, Any] = {
        "model": dict(TINY_MODEL),
        "budget": {"rounds": 2},
        "data": {"corpus": "licenses"},
        "world": {"children": [{"client": "a"}, {"client": "b"}]},
    }
    at = raw
    for name in key.split(".")[:-1]:
        at = at.setdefault(name, {})
    at[key.split(".")[-1]] = value
    return raw


@pytest.mark.parametrize("key", list(leaves(RunConfig())))
def test_any_value_of_any_key_is_taken_or_refused_in_a_line_each(key: str) -> None:
    for value in LEAVES:
        began = time.process_time()
        try:
            made = make_plan(from_mapping(with_value(key, value), resolved=True), check_data=False)
        except WorldLMError as error:
            lines = str(error).splitlines()
            assert any(key in line or key.rsplit(".", 1)[-1] in line for line in lines), (value, lines)
        else:
            assert_finite(made.to_mapping())
        assert time.process_time() - began < 5.0, value


def assert_finite(value: Any) -> None:
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            assert_finite(each)
    assert not isinstance(value, float) or math.isfinite(value)


# ---- all problems at once ----------------------------------------------------------------------------------


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    text = HEAD + "training: {lr: -1, local_stps: 4, batch_size: many}\nseed: x\nevaluation: {tokens: 0}\n"
    with pytest.raises(ConfigErrors) as caught:
        loaded(tmp_path, text)
    assert {error.key for error in caught.value.each} == {
        "training.local_stps",
        "training.batch_size",
        "seed",
        "evaluation.tokens",
    }
    assert str(caught.value).count("\n") == 3
    back = pickle.loads(pickle.dumps(caught.value))
    assert str(back) == str(caught.value)


def test_problems_of_a_tree_are_told_once_each(tmp_path: Path) -> None:
    text = HEAD + (
        "training: {lr: -1}\nworld: {children: [{client: a}, {client: b, training: {local_steps: 0, lrr: 1}}, "
        "{client: a}, {clint: d}, {federation: e, children: [{client: f, merge: {client: 2}}]}]}\n"
    )
    with pytest.raises(ConfigErrors) as caught:
        planned(tmp_path, text)
    assert [error.key for error in caught.value.each] == [
        "training.lr",
        "world.children[1].training.lrr",
        "world.children[1].training.local_steps",
        "world.children[2].client",
        "world.children[3]",
        "world.children[4].children[0].merge.client",
    ]


def test_of_very_many_problems_the_first_ten_are_told(tmp_path: Path) -> None:
    children = ", ".join(f"{{client: c{n}, training: {{lr: -{n}}}}}" for n in range(1, 16))
    with pytest.raises(ConfigErrors) as caught:
        planned(tmp_path, HEAD + f"world: {{children: [{children}]}}\n")
    lines = str(caught.value).splitlines()
    assert len(lines) == 11
    assert lines[-1] == "and 5 more"


def test_every_section_of_a_node_has_a_type() -> None:
    for name in INHERITED:
        assert is_dataclass(hint_of(Node, name))
