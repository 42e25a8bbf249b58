"""Worlds whose clients train on conversations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from support.chat import CHATML, chat_tokenizer, questions, write_records
from support.pretrained import save_pretrained

from worldlm_ray.client.measure import MeasuredModel
from worldlm_ray.config.loading import from_mapping
from worldlm_ray.data.conversations import Conversations
from worldlm_ray.errors import ConfigError
from worldlm_ray.experiments.evaluate import sound_theta
from worldlm_ray.plan import rundir
from worldlm_ray.plan.plan import Plan, make_plan
from worldlm_ray.reports.describe import describe
from worldlm_ray.simulation.simulator import simulate
from worldlm_ray.tensors.targets import IGNORED

pytestmark = pytest.mark.filterwarnings("ignore")


def talker(name: str, folder: Path, seed: int, **settings: Any) -> dict[str, Any]:
    """A client with questions and answers."""
    file = write_records(folder / f"{name}.jsonl", questions(120, seed=seed))
    return {"client": name, "data": {"files": [str(file)], "format": "conversations"}, **settings}


def fine_tuned(folder: Path, *, template: str | None = CHATML, **model: Any) -> Plan:
    """Two clients on a small model of transformers whose tokenizer has a chat template."""
    base = save_pretrained(folder / "base", vocab_size=304)
    chat_tokenizer(base, template=template)
    raw = {
        "run_dir": str(folder / "run"),
        "data": {"cache_dir": str(folder / "cache")},
        "model": {"backend": "transformers", "initial_from": str(base), "context": 48, **model},
        "merge": {"client": 1.0},
        "budget": {"rounds": 3},
        "training": {"local_steps": 12, "batch_size": 8, "lr": 1e-2},
        "evaluation": {"tokens": 1024, "final_tokens": 1024},
        "world": {"children": [talker("a", folder, 1), talker("b", folder, 2)]},
    }
    return make_plan(from_mapping(raw))


@pytest.mark.parametrize(("trainable", "most"), [("all", 0.9), ("lora", 0.97)])  # adapters of random weights learn less
def test_a_world_learns_to_answer(tmp_path: Path, trainable: str, most: float) -> None:
    plan = rundir.create(fine_tuned(tmp_path, trainable=trainable))
    (tmp_path / "base/chat_template.jinja").unlink()  # the run keeps a copy
    summary = simulate(plan).summary
    for path in ("world/a", "world/b"):
        node = summary["nodes"][path]
        assert node["loss"] < most * node["loss_start"]


def test_a_loss_is_nats_of_the_answers_over_their_bytes(tiny: Callable[..., Plan], tmp_path: Path) -> None:
    plan = talking(tiny, tmp_path)
    client = MeasuredModel(plan, plan.root.clients[0])
    data = client.dataset
    assert isinstance(data, Conversations)
    zeros = np.zeros(plan.layout.size, np.float32)  # every token has the same probability
    batches = list(data.heldout_windows(10**6, context=48, batch_size=4))
    count = sum(int((targets != IGNORED).sum()) for _, targets in batches)
    nats = count * np.log(plan.shape.vocab_size)
    assert client.measure(10**6, parameters=zeros).loss * data.heldout_bytes == pytest.approx(nats, rel=1e-5)
    said = sum(len(record["messages"][1]["content"]) for record in questions(120, seed=1))
    assert data.train_bytes + data.validation_bytes + data.heldout_bytes == said


def talking(tiny: Callable[..., Plan], folder: Path, **settings: Any) -> Plan:
    """One client of a decoder with random weights."""
    data = {"cache_dir": str(folder / "cache"), "tokenizer": str(chat_tokenizer(folder / "tokenizer"))}
    model = {"hidden_size": 16, "layers": 1, "heads": 2, "intermediate_size": 32, "context": 48}
    return tiny([talker("a", folder, 1, **settings)], data=data, model=model | {"key_layers": ["lm_head.*"]})


def test_a_client_with_private_records_trains_on_conversations(tiny: Callable[..., Plan], tmp_path: Path) -> None:
    privacy = {"unit": "record", "noise_multiplier": 0.5, "target_epsilon": 50.0, "grad_sample_mode": "hooks"}
    plan = rundir.create(talking(tiny, tmp_path, privacy=privacy))
    summary = simulate(plan).summary
    assert summary["nodes"]["world/a"]["loss"] is None
    assert summary["nodes"]["world/a"]["steps"] == 2 * 4
    assert np.isfinite(sound_theta(plan, plan.root)).all()


def test_a_plan_says_what_it_trains_on(tiny: Callable[..., Plan], tmp_path: Path) -> None:
    found = describe(talking(tiny, tmp_path))["nodes"]["world/a"]["data"]
    assert found == f"conversations of {tmp_path}/a.jsonl"


def test_a_model_without_a_chat_template_is_refused_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"world\.children\[0\]\.data\.tokenizer: there is no chat template beside"):
        fine_tuned(tmp_path, template=None)
