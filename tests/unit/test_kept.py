"""What a run keeps of the files that it was made from, and that its paths mean the same from any folder."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import worlds

from worldlm_ray import huggingface
from worldlm_ray.config.loading import from_mapping, to_mapping
from worldlm_ray.data import load_tokenizer
from worldlm_ray.errors import ConfigError, RunError
from worldlm_ray.experiments import evaluate
from worldlm_ray.model.initial import initial_parameters
from worldlm_ray.model.shape import ModelShape
from worldlm_ray.plan import absolute, kept, membership, rundir
from worldlm_ray.plan.plan import Plan, make_plan
from worldlm_ray.reports.describe import describe, tables


def made(tiny: Callable[..., Plan], tokenizer: Path | str, **changes: Any) -> Plan:
    """A new run with this tokenizer."""
    raw = to_mapping(tiny().config)
    raw["data"]["tokenizer"] = str(tokenizer)
    return rundir.create(make_plan(from_mapping(raw | changes)))


def test_a_run_goes_by_its_copy_of_the_tokenizer(tiny: Callable[..., Plan], tmp_path: Path) -> None:
    file = worlds.tokenizer(tmp_path / "tok.json", size=300)
    first = file.read_bytes()
    plan = made(tiny, file)
    worlds.tokenizer(file, size=300, text="other words of another text " * 50)
    assert file.read_bytes() != first
    copy = plan.run_dir / "files" / "tokenizer.json"
    assert copy.read_bytes() == first
    for found in (plan, rundir.reopen(str(plan.run_dir)), pickle.loads(pickle.dumps(plan))):
        assert {client.settings.data.tokenizer for client in found.root.clients} == {str(copy)}
    file.unlink()
    assert rundir.reopen(str(plan.run_dir)).shape == plan.shape


def test_a_moved_run_goes_by_the_copy_where_it_lies_now(tiny: Callable[..., Plan], tmp_path: Path) -> None:
    plan = made(tiny, worlds.tokenizer(tmp_path / "tok.json"))
    moved = plan.run_dir.rename(tmp_path / "moved")
    found = rundir.reopen(str(moved)).root.clients[0].settings.data.tokenizer
    assert found == str(moved / "files" / "tokenizer.json")


@pytest.mark.parametrize("damage", [lambda file: file.write_text("{}"), lambda file: file.unlink()])
def test_a_copy_that_has_changed_is_refused_by_name(
    tiny: Callable[..., Plan], tmp_path: Path, damage: Callable[[Path], Any]
) -> None:
    plan = made(tiny, worlds.tokenizer(tmp_path / "tok.json"))
    damage(plan.run_dir / "files" / "tokenizer.json")
    with pytest.raises(RunError, match=r"files/tokenizer\.json.* restore the file of this run"):
        rundir.reopen(str(plan.run_dir))


def test_nothing_is_measured_with_one_tokenizer_while_the_configuration_names_another(
    tiny: Callable[..., Plan], tmp_path: Path
) -> None:
    file = worlds.tokenizer(tmp_path / "tok.json")
    plan = made(tiny, file)
    kept.check_originals(plan.config)
    worlds.tokenizer(file, text="other words of another text " * 50)
    with pytest.raises(RunError, match=r"tok\.json \(data\.tokenizer\) has changed since the run was made"):
        evaluate.evaluate(str(plan.run_dir), tokens=64)
    file.unlink()
    kept.check_originals(plan.config)


def test_a_run_keeps_its_tokenizer_when_it_goes_on(tiny: Callable[..., Plan], tmp_path: Path) -> None:
    plan = made(tiny, worlds.tokenizer(tmp_path / "tok.json"))
    for override in ("data.tokenizer=bytes", "world.children[0].data.tokenizer=x.json", "model.initial_from=y"):
        with pytest.raises(ConfigError, match="belongs to what the run began with"):
            rundir.reopen(str(plan.run_dir), [override])


def test_the_tokenizer_is_named_once_whatever_names_it(tiny: Callable[..., Plan], tmp_path: Path) -> None:
    file = worlds.tokenizer(tmp_path / "tok.json")
    raw = to_mapping(tiny().config)
    for child in raw["world"]["children"]:
        child["data"] = child.get("data", {}) | {"tokenizer": str(file)}
    plan = rundir.create(make_plan(from_mapping(raw)))
    assert plan.config.data.tokenizer == str(file)
    assert '"tokenizer"' not in json.dumps(plan.config.world)
    assert plan.root.clients[0].settings.data.tokenizer == str(plan.run_dir / "files" / "tokenizer.json")


def model_folder(folder: Path, *, vocab_size: int = 300) -> ModelShape:
    shape = ModelShape(
        hidden_size=32, layers=1, heads=2, kv_heads=2, intermediate_size=48, context=16, vocab_size=vocab_size
    )
    layout = shape.layout([])
    huggingface.export(initial_parameters(shape, layout, seed=9), shape, layout, folder)
    (folder / "tokenizer.json").unlink(missing_ok=True)
    return shape


def begun_from(tiny: Callable[..., Plan], folder: Path, **data: Any) -> Plan:
    raw = to_mapping(tiny().config)
    raw["model"] = {"initial_from": str(folder), "key_layers": []}
    raw["data"] |= {"tokenizer": None} | data
    return make_plan(from_mapping(raw))


def test_a_models_own_tokenizer_is_the_runs_unless_another_is_given(tiny: Callable[..., Plan], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model_folder(folder)
    worlds.tokenizer(folder / "tokenizer.json", size=300)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    plan = rundir.create(begun_from(tiny, folder))
    names = {"tokenizer.json", "tokenizer_config.json", "config.json"}
    assert names <= set(plan.config.kept) == {file.name for file in (plan.run_dir / "files").iterdir()}
    assert plan.config.data.tokenizer == str(folder / "tokenizer.json")
    other = worlds.tokenizer(tmp_path / "other.json", size=280)
    given = begun_from(tiny, folder, tokenizer=str(other))
    assert given.root.clients[0].settings.data.tokenizer == str(other)


def test_a_run_needs_no_folder_of_its_model_to_be_looked_at(tiny: Callable[..., Plan], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shape = model_folder(folder, vocab_size=256)
    plan = rundir.create(begun_from(tiny, folder))
    folder.rename(tmp_path / "away")
    assert rundir.reopen(str(plan.run_dir), check_data=False).shape == shape


@pytest.mark.parametrize(("vocab_size", "other"), [(1_000, None), (256, "tokenizer.model"), (256, "vocab.json")])
def test_a_model_of_another_tokenizer_is_not_trained_on_bytes_in_silence(
    tiny: Callable[..., Plan], tmp_path: Path, vocab_size: int, other: str | None
) -> None:
    model_folder(tmp_path / "model", vocab_size=vocab_size)
    if other is not None:
        (tmp_path / "model" / other).write_text("")
    with pytest.raises(ConfigError, match=r"^data\.tokenizer: is not given, .* or `bytes` to train it on bytes"):
        begun_from(tiny, tmp_path / "model")
    assert begun_from(tiny, tmp_path / "model", tokenizer="bytes").shape.vocab_size == vocab_size


def test_a_run_with_damaged_weights_leaves_no_folder(tiny: Callable[..., Plan], tmp_path: Path) -> None:
    shape, layout = model_folder(tmp_path / "model", vocab_size=256), None
    layout = shape.layout([])
    values = initial_parameters(shape, layout, seed=9)
    values[7] = float("nan")
    huggingface.export(values, shape, layout, tmp_path / "model")
    plan = begun_from(tiny, tmp_path / "model")
    with pytest.raises(ConfigError, match=r"^model\.initial_from: .* not finite"):
        rundir.create(plan)
    assert not plan.run_dir.exists()


def test_show_names_the_folder_that_a_run_begins_from(tiny: Callable[..., Plan], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model_folder(folder, vocab_size=256)
    found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    changed = found | {"tie_word_embeddings": True, "max_position_embeddings": 4096}
    (folder / "config.json").write_text(json.dumps(changed), encoding="utf-8")
    plan = begun_from(tiny, folder)
    facts = describe(plan)
    model = facts["model"]
    assert (model["context"], model["longest"], model["was_tied"], model["preset"]) == (512, 4096, True, None)
    caption = str(next(tables(facts)).caption)
    assert f"from {folder} (sequences of at most 4,096 tokens there, embedding and head trained apart" in caption
    assert "tokenizer bytes" in caption
    assert "preset" not in caption


def test_an_error_about_a_tokenizer_says_its_cure_once(tiny: Callable[..., Plan], tmp_path: Path) -> None:
    raw = to_mapping(tiny().config)
    (tmp_path / "none.json").write_text("{}", encoding="utf-8")
    for name in ("absent.json", "none.json"):
        raw["data"]["tokenizer"] = str(tmp_path / name)
        with pytest.raises(ConfigError) as caught:
            make_plan(from_mapping(raw))
        assert str(caught.value).count("tokenizer.json or its folder") == 1


def test_the_folder_of_a_tokenizer_is_as_good_as_the_file(tmp_path: Path) -> None:
    worlds.tokenizer(tmp_path / "tokenizer.json", size=300)
    by_file, by_folder = load_tokenizer(str(tmp_path / "tokenizer.json")), load_tokenizer(str(tmp_path))
    assert by_file.fingerprint == by_folder.fingerprint


def test_relative_paths_are_kept_absolute(
    tiny: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "he[r]e", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    monkeypatch.chdir(here)
    worlds.write_text(Path("a.txt"), seed=1)
    worlds.write_text(Path("b.txt"), seed=2)
    worlds.tokenizer(Path("tok.json"))
    raw = to_mapping(tiny().config)
    raw["data"] = {"tokenizer": "tok.json", "files": ["a.txt"], "cache_dir": "cache"}
    raw["world"] = {"children": [{"client": "a"}, {"client": "b", "data": {"files": ["?.txt", "~/none.txt"]}}]}
    raw["world"]["children"].append({"client": "c", "data": {"pool": [{"files": ["b.txt"]}, {"files": ["a.txt"]}]}})
    plan = rundir.create(make_plan(from_mapping(raw), check_data=False))
    monkeypatch.chdir(there)
    found = rundir.reopen(str(plan.run_dir), check_data=False)
    a, b, c = (client.settings.data for client in found.root.clients)
    assert a.files == [str(here / "a.txt")]
    assert a.cache_dir == str(here / "cache")
    assert b.files[1] == "~/none.txt"
    assert [str(member["files"][0]) for member in c.pool] == [str(here / "b.txt"), str(here / "a.txt")]
    pattern = replace(b, files=b.files[:1], tokenizer=None)
    from worldlm_ray.data import check_sources

    assert check_sources(pattern, "data") == [here / "a.txt", here / "b.txt"]


def test_addresses_and_names_are_no_relative_paths() -> None:
    for text in ("bytes", "~/tok.json", "s3://bucket/tok.json", "/tok.json"):
        assert absolute.absolute_path(text) == text


def test_a_client_that_joins_has_absolute_paths(
    tiny: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    changed = membership.with_client(tiny(), "world", "late", files=[], overrides=["data.files=[late.txt]"])
    assert changed.node("world/late").settings.data.files == [str(tmp_path / "late.txt")]
