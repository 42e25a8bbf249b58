"""The model card of an export: one for adapters, merged weights and whole models, which a model hub can read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import worlds
from support.pretrained import save_pretrained, world

from worldlm_ray.config.loading import from_mapping, to_mapping
from worldlm_ray.config.schema import DataConfig
from worldlm_ray.experiments.card_facts import _format, facts
from worldlm_ray.experiments.export import export
from worldlm_ray.huggingface.card import base_facts, card
from worldlm_ray.plan import rundir
from worldlm_ray.plan.plan import Plan, make_plan
from worldlm_ray.reports.policy import policy
from worldlm_ray.simulation.simulator import simulate

Tiny = Callable[..., Plan]
LICENSED = "---\nlicense: apache-2.0\nlanguage:\n- en\ntags: [x]\n---\n\n# A base\n"


def read_card(folder: Path) -> Any:
    """The card as a model hub reads it."""
    hub = pytest.importorskip("huggingface_hub")
    found = hub.ModelCard.load(folder / "README.md")
    hub.metadata_load(folder / "README.md")
    return found


def private_world(folder: Path) -> list[dict[str, Any]]:
    """A client with private gradients, in a federation with one that reports its losses; and a third client."""
    promise = {"unit": "record", "noise_multiplier": 1.0, "max_grad_norm": 1.0, "delta": 1e-3}
    hidden = worlds.client("hidden", folder, 2, privacy=promise)
    return [{"federation": "north", "children": [worlds.client("a", folder, 1), hidden]}, worlds.client("c", folder, 3)]


@pytest.mark.filterwarnings("ignore")
def test_the_card_of_an_adapter_and_of_merged_weights(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    base = save_pretrained(tmp_path / "small-llama")
    (base / "README.md").write_text(LICENSED, encoding="utf-8")
    plan = rundir.create(world(tmp_path, base, trainable="lora"))
    summary = simulate(plan).summary
    export(str(plan.run_dir), "world", tmp_path / "adapter")
    export(str(plan.run_dir), "world", tmp_path / "whole", merge=True)
    adapter, whole = read_card(tmp_path / "adapter"), read_card(tmp_path / "whole")
    assert adapter.data.to_dict() == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["worldlm_ray", "federated-learning", "lora"],
        "base_model": "small-llama",
        "base_model_relation": "adapter",
        "license": "apache-2.0",
        "language": ["en"],
    }
    assert whole.data.to_dict() == adapter.data.to_dict() | {
        "library_name": "transformers",
        "base_model_relation": "finetune",
    }
    assert "model = PeftModel.from_pretrained(base, FOLDER)" in adapter.text
    assert "PeftModel" not in whole.text
    nodes = summary["nodes"]
    for text in (adapter.text, whole.text):
        assert f"| `world/a` | 1 | {nodes['world/a']['tokens']:,} | 50.0% | text (.txt) |" in text
        losses = f"{nodes['world']['loss_start']:.4f} | {nodes['world']['loss']:.4f}"
        assert f"| this model, on all clients' text | {losses} |" in text
        assert "| license of the base model | apache-2.0 |" in text
        assert "peft 0." in text


def test_private_losses_are_not_on_a_card_and_what_was_spent_is(tiny: Tiny, tmp_path: Path) -> None:
    pytest.importorskip("opacus")
    plan = rundir.create(tiny(private_world(tmp_path)))
    nodes = simulate(plan).summary["nodes"]
    export(str(plan.run_dir), "hidden", tmp_path / "out")
    found = read_card(tmp_path / "out")
    assert found.data.to_dict()["library_name"] == "transformers"
    spent = nodes["world/north/hidden"]["epsilon"]
    assert f"| `world/north` | 1 | record | {spent:.3f} | 0.001 |" in found.text
    assert "| this model, on its client's text | private | private | private | private |" in found.text
    assert f"| `world/north/hidden` | 1 | {nodes['world/north/hidden']['tokens']:,} | 100.0% |" in found.text
    assert "The run has 2 more clients, which trained on" in found.text
    assert "base_model" not in found.data.to_dict()
    assert str(tmp_path) not in found.text


def test_many_clients_have_one_row_for_each_federation(tiny: Tiny, tmp_path: Path) -> None:
    crowd = {"federation": "phones", "children": [worlds.crowd("phone", tmp_path, copies=101)]}
    plan = tiny([crowd, worlds.client("c", tmp_path, 3)])
    found = facts(plan, plan.root, {})
    assert [(row.node, row.clients, row.tokens) for row in found.contributions] == [
        ("world/phones", 101, None),
        ("world/c", 1, None),
    ]
    assert "| `world/phones` | 101 | - | - | text (.txt) |" in card(found)


def test_the_format_of_a_text_is_said_without_its_files() -> None:
    told = DataConfig(files=["a/talk.jsonl"], format="conversations")
    assert _format(told) == "conversations, of which the answers are the targets"
    plain = DataConfig(files=["a/x.jsonl.gz", "a/y.txt"], text_key="body")
    assert _format(plain) == "text (.jsonl.gz, .txt, field `body`)"
    assert _format(DataConfig(corpus="docstrings")) == "corpus docstrings"
    assert _format(DataConfig(files=["a/folder"])) == "text"


def test_the_rules_of_every_node_are_said_in_words(tiny: Tiny, tmp_path: Path) -> None:
    noise = {"unit": "client", "noise_multiplier": 5.0, "max_grad_norm": 0.5, "delta": 1e-4}
    guild = {
        "federation": "guild",
        "privacy": noise,
        "aggregation": {"trigger": "goal_achieved", "buffer_size": 2, "max_staleness": 4, "robust": {"clip_norm": 2.0}},
        "merge": {"federation": 0.5, "client": 1.0},
        "children": [worlds.client("a", tmp_path, 1), worlds.client("b", tmp_path, 2)],
    }
    raw = to_mapping(tiny([guild, worlds.client("c", tmp_path, 3)]).config)
    raw |= {"aggregation": {"trigger": "synchronous"}, "merge": {"client": "validated"}}
    said = policy(make_plan(from_mapping(raw)))
    assert said["world"] == (
        "waits for an update of every live child; mean, weighted by tokens, server optimizer sgd; "
        "its clients train its model for it, and a personal model each, which validation text chooses"
    )
    assert said["world/guild"] == (
        "aggregates 2 updates at a time; mean, weighted by tokens, clipped to norm 2, server optimizer sgd; "
        "refuses updates that are more than 4 versions old; takes 50% of its parent's model; "
        "its clients take all of its model; "
        "it adds noise to whole updates of its clients (a unit is a client, clipped to 0.5, delta 0.0001)"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (LICENSED, {"license": "apache-2.0", "language": ["en"]}),
        (LICENSED.replace("\n", "\r\n"), {"license": "apache-2.0", "language": ["en"]}),
        ("# no head\n", {}),
        ("---\nlicense: {a: 1}\n---\n", {}),
        ("---\n[\n---\n", {}),
        ("text\n---\nlicense: mit\n---\n", {}),
    ],
)
def test_what_a_base_models_card_says(tmp_path: Path, text: str, expected: dict[str, Any]) -> None:
    (tmp_path / "README.md").write_bytes(text.encode())
    assert base_facts(tmp_path) == expected
    assert base_facts(tmp_path / "away") == {}


def test_a_cell_holds_what_would_end_it(tiny: Tiny) -> None:
    plan = tiny()
    found = facts(plan, plan.root, {})
    text = card(type(found)(**{**vars(found), "architecture": "a|b\nc"}))
    assert "| architecture | a\\|b c |" in text
