"""What lies in an exported folder beside the weights."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import worlds
from typer.testing import CliRunner

from worldlm_ray import huggingface
from worldlm_ray.cli import main as cli
from worldlm_ray.config.loading import from_mapping, save, to_mapping
from worldlm_ray.data import load_tokenizer
from worldlm_ray.errors import ConfigError
from worldlm_ray.experiments.card_facts import facts
from worldlm_ray.experiments.export import export
from worldlm_ray.huggingface.card import Facts, card
from worldlm_ray.huggingface.side_files import side_files
from worldlm_ray.model.initial import initial_parameters
from worldlm_ray.model.shape import ModelShape
from worldlm_ray.plan import kept, rundir
from worldlm_ray.plan.plan import Plan, make_plan
from worldlm_ray.storage import checkpoint

SHAPE = ModelShape(hidden_size=32, layers=1, heads=2, kv_heads=2, intermediate_size=48, context=16, vocab_size=300)
LAYOUT = SHAPE.layout([])
BASE = {"eos_token_id": 257, "bos_token_id": 256, "max_position_embeddings": 4096, "tie_word_embeddings": True}
TEXT = "The function of a rïver,\n\n\tand a law."


def run_with(tiny: Callable[..., Plan], **changes: Any) -> Plan:
    """A run whose world has a checkpoint."""
    raw = to_mapping(tiny().config)
    raw["data"] |= changes.pop("data", {})
    plan = rundir.create(make_plan(from_mapping(raw | changes)))
    theta = initial_parameters(plan.shape, plan.layout, seed=3)
    checkpoint.save(checkpoint.folder(plan.run_dir, "world"), {}, {"theta": theta})
    return plan


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def files_of(base: dict[str, Any] | None = None, **more: Any) -> dict[str, bytes]:
    found = {} if base is None else {"config.json": json.dumps(base).encode()}
    return found | {name: json.dumps(value).encode() for name, value in more.items()}


def test_what_a_base_says_of_ends_and_length_is_kept() -> None:
    files = side_files(SHAPE, files_of(BASE))
    config, generation = json.loads(files["config.json"]), json.loads(files["generation_config.json"])
    assert (config["eos_token_id"], config["bos_token_id"], config["max_position_embeddings"]) == (257, 256, 4096)
    assert generation == {"eos_token_id": 257, "bos_token_id": 256}
    assert config["tie_word_embeddings"] is False  # the head is a tensor of the file now


def test_how_a_base_generates_is_kept() -> None:
    theirs = {"temperature": 0.6, "top_p": 0.9, "do_sample": True, "eos_token_id": [257, 258]}
    files = side_files(SHAPE, files_of(BASE, **{"generation_config.json": theirs}))
    assert json.loads(files["generation_config.json"]) == theirs | {"bos_token_id": 256}


def test_the_runs_own_tokenizer_says_where_its_texts_end(tmp_path: Path) -> None:
    tokenizer = worlds.tokenizer(tmp_path / "tok.json").read_bytes()
    files = side_files(SHAPE, files_of(BASE) | {"tokenizer.json": tokenizer})
    assert json.loads(files["config.json"])["eos_token_id"] == 0
    among = files_of(BASE | {"eos_token_id": [257, 0]})
    assert json.loads(side_files(SHAPE, among | {"tokenizer.json": tokenizer})["config.json"])["eos_token_id"] == [
        257,
        0,
    ]
    settings = json.loads(files["tokenizer_config.json"])
    assert (settings["tokenizer_class"], settings["eos_token"]) == ("PreTrainedTokenizerFast", "<|endoftext|>")
    assert files["tokenizer.json"] == tokenizer


def test_a_chat_template_is_kept_and_the_class_of_an_architecture_is_not(tmp_path: Path) -> None:
    theirs = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "chat_template": "{{ messages }}"}
    kept_files = files_of(BASE, **{"tokenizer_config.json": theirs | {"model_max_length": 99}})
    kept_files |= {
        "tokenizer.json": worlds.tokenizer(tmp_path / "t.json").read_bytes(),
        "chat_template.jinja": b"{{ x }}",
    }
    files = side_files(SHAPE, kept_files)
    settings = json.loads(files["tokenizer_config.json"])
    assert (settings["chat_template"], settings["model_max_length"]) == ("{{ messages }}", 99)
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "add_bos_token" not in settings
    assert files["chat_template.jinja"] == b"{{ x }}"


def test_the_tokenizer_of_bytes_gives_the_same_ids(tmp_path: Path) -> None:
    huggingface.export(initial_parameters(SHAPE, LAYOUT, seed=1), SHAPE, LAYOUT, tmp_path)
    ids = load_tokenizer(str(tmp_path)).encode(TEXT)
    assert ids.tolist() == list(TEXT.encode())
    assert load_tokenizer(str(tmp_path)).decode(ids) == TEXT


def test_every_file_can_be_read_by_those_who_may_read_the_others(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        huggingface.export(initial_parameters(SHAPE, LAYOUT, seed=1), SHAPE, LAYOUT, tmp_path, card="A card.")
    finally:
        os.umask(before)
    assert {file.name: oct(file.stat().st_mode & 0o777) for file in tmp_path.iterdir()} == dict.fromkeys(
        ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "README.md"], "0o644"
    )


def test_nothing_of_an_earlier_export_is_left(tmp_path: Path) -> None:
    values = initial_parameters(SHAPE, LAYOUT, seed=1)
    files = files_of(BASE, **{"generation_config.json": {"top_p": 0.9}}) | {"chat_template.jinja": b"{{ x }}"}
    huggingface.export(values, SHAPE, LAYOUT, tmp_path, kept=files, card="The first card.")
    huggingface.export(values, SHAPE, LAYOUT, tmp_path, card="The second card.")
    assert "second" in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert not (tmp_path / "chat_template.jinja").exists()
    assert not (tmp_path / "generation_config.json").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["bytes", "byte level", "of a folder"])
def test_their_tokenizer_gives_the_same_ids(tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    import tokenizers

    files = files_of(BASE)
    if kind != "bytes":
        files |= {"tokenizer.json": worlds.tokenizer(tmp_path / "t.json").read_bytes()}
    if kind == "of a folder":
        files |= files_of(**{"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True}})
    huggingface.export(initial_parameters(SHAPE, LAYOUT, seed=1), SHAPE, LAYOUT, tmp_path / "model", kept=files)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    for text in ("The function", TEXT, " two  spaces", ""):
        assert (
            theirs(text).input_ids
            == plain.encode(text).ids
            == load_tokenizer(str(tmp_path / "model")).encode(text).tolist()
        )
    assert len(theirs) == plain.get_vocab_size() <= SHAPE.vocab_size
    assert theirs.eos_token_id == (None if kind == "bytes" else 0)
    assert theirs.decode(plain.encode(TEXT).ids) == TEXT


# --------------------------------------------------------------------------------------------- from a run


def test_an_export_holds_what_the_run_was_made_with(tiny: Callable[..., Plan], tmp_path: Path) -> None:
    file = worlds.tokenizer(tmp_path / "tok.json")
    first = file.read_bytes()
    plan = run_with(tiny, data={"tokenizer": str(file)})
    file.unlink()
    assert export(str(plan.run_dir), "world", tmp_path / "out") == ("world", [])
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == first
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "# tiny: world" in text
    assert "random weights, seed 0" in text
    assert "not known: the run has not ended" in text
    back = huggingface.read_weights(tmp_path / "out", plan.layout)
    assert back.tobytes() == initial_parameters(plan.shape, plan.layout, seed=3).tobytes()


def test_a_run_that_keeps_no_files_exports_the_originals(tiny: Callable[..., Plan], tmp_path: Path) -> None:
    file = worlds.tokenizer(tmp_path / "tok.json")
    plan = run_with(tiny, data={"tokenizer": str(file)})
    raw = to_mapping(plan.config) | {"kept": {}}  # as a run of an earlier version
    save(from_mapping(raw), plan.run_dir / "config.yaml")
    export(str(plan.run_dir), "world", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == file.read_bytes()


def test_a_readme_of_the_users_own_stays(tiny: Callable[..., Plan], tmp_path: Path) -> None:
    plan = run_with(tiny)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("Mine.", encoding="utf-8")
    result = CliRunner().invoke(cli.app, ["export", str(plan.run_dir), str(tmp_path / "out")])
    assert result.exit_code == 0
    assert (tmp_path / "out" / "README.md").read_text(encoding="utf-8") == "Mine."


def test_the_model_that_a_run_began_from_is_not_replaced(tiny: Callable[..., Plan], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    values = initial_parameters(SHAPE, LAYOUT, seed=1)
    huggingface.export(values, SHAPE, LAYOUT, folder)
    changed = read(folder, "config.json") | {"tie_word_embeddings": True, "max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps(changed), encoding="utf-8")
    plan = run_with(tiny, model={"initial_from": str(folder), "key_layers": []})
    with pytest.raises(ConfigError, match="holds the model that the run began from; give another folder"):
        export(str(plan.run_dir), "world", folder)
    assert np.array_equal(huggingface.read_weights(folder, LAYOUT), values)
    export(str(plan.run_dir), "world", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "the model in a folder named model, whose embedding and head were one tensor" in text
    assert "64 tokens in training, at most 64" in text
    assert kept.MODEL_CONFIG in plan.config.kept


def test_a_card_says_what_was_measured() -> None:
    facts = Facts(
        run="europe",
        node="world/italy",
        kind="client",
        method="worldlm",
        architecture="Llama, 1,234,567 parameters in fp32, embedding and head apart",
        context=128,
        longest=4096,
        began_from="random weights, seed 0",
        tied=False,
        tokens=400_000,
        tokenizer="the bytes of UTF-8",
        loss=1.25,
        perplexity_per_token=33.02,
        privacy=["1 of 2 clients: epsilon 7.987 at most, at delta 1e-05 (unit: record)"],
    )
    text = card(facts)
    for row in (
        "| architecture | Llama, 1,234,567 parameters in fp32, embedding and head apart |",
        "| trained on | 400,000 tokens |",
        "| sequences | 128 tokens in training, at most 4,096 |",
        "| loss on that client's held-out text | 1.2500 nats per byte, perplexity 33.020 per token |",
        "| differential privacy | 1 of 2 clients: epsilon 7.987 at most, at delta 1e-05 (unit: record) |",
    ):
        assert row in text
    assert text.startswith("---\nlibrary_name: transformers\n")


@pytest.mark.parametrize(
    "damaged", ['{"nodes": []}', '{"nodes": {"world": 3}}', '{"nodes": {"world": {"loss": "nan"}}}', "[1]", "{"]
)
def test_a_damaged_summary_costs_its_facts_only(tiny: Callable[..., Plan], tmp_path: Path, damaged: str) -> None:
    plan = tiny()
    plan.run_dir.mkdir(parents=True, exist_ok=True)
    (plan.run_dir / "summary.json").write_text(damaged)
    found = facts(plan, plan.root, {})
    assert (found.tokens, found.loss, found.perplexity_per_token) == (None, None, None)
    assert "not measured, or private" in card(found)


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_of_a_folder_is_refused(name: str) -> None:
    for command in (["export", "RUN", name], ["compare", "quickstart", "--out", name]):
        error = CliRunner().invoke(cli.app, command).exception
        assert isinstance(error, ConfigError)
        assert str(error).endswith("is empty; give a folder")
