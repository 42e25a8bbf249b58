"""Export to a Hugging Face folder, and a Hugging Face model as initial weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from worldlm_ray import config as configuration
from worldlm_ray import huggingface
from worldlm_ray.errors import ConfigError, DataError
from worldlm_ray.model.decoder import Decoder
from worldlm_ray.model.flat import bind
from worldlm_ray.model.initial import initial_parameters
from worldlm_ray.model.shape import ModelShape
from worldlm_ray.plan import Plan, make_plan

SHAPE = ModelShape(hidden_size=32, layers=2, heads=4, kv_heads=2, intermediate_size=48, context=24, vocab_size=64)
LAYOUT = SHAPE.layout(["lm_head.*", "model.layers.-1.*"])


def theta() -> np.ndarray:
    return initial_parameters(SHAPE, LAYOUT, seed=5) * np.float32(5.0)  # far from uniform logits


def ours(tokens: torch.Tensor, values: np.ndarray, shape: ModelShape = SHAPE) -> np.ndarray:
    model = Decoder(shape)
    bind(model, shape.layout(["lm_head.*", "model.layers.-1.*"]), torch.from_numpy(values))
    with torch.no_grad():
        return model(tokens).numpy()


def theirs(folder: Path, tokens: torch.Tensor) -> np.ndarray:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(tokens).logits.numpy()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_an_exported_model_gives_the_same_logits(tmp_path: Path) -> None:
    huggingface.export(theta(), SHAPE, LAYOUT, tmp_path)
    tokens = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(0))
    mine, other = ours(tokens, theta()), theirs(tmp_path, tokens)
    assert np.abs(mine).max() > 0.5
    np.testing.assert_allclose(other, mine, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_of_theirs_gives_the_same_logits_here(tmp_path: Path, tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    transformers.LlamaForCausalLM(shape).to(torch.bfloat16).save_pretrained(tmp_path)
    found = huggingface.read_shape(tmp_path, context=24)
    values = huggingface.read_weights(tmp_path, found.layout(["lm_head.*", "model.layers.-1.*"]))
    tokens = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(ours(tokens, values, found), theirs(tmp_path, tokens), atol=1e-3)


def test_what_is_exported_can_be_a_runs_beginning(tiny: Callable[..., Plan], tmp_path: Path) -> None:
    wide = ModelShape(hidden_size=32, layers=1, heads=2, kv_heads=2, intermediate_size=48, context=16, vocab_size=256)
    layout = wide.layout([])
    values = initial_parameters(wide, layout, seed=9)
    huggingface.export(values, wide, layout, tmp_path / "model")
    raw = configuration.to_mapping(tiny().config)
    raw["model"] = {"initial_from": str(tmp_path / "model"), "context": 16, "key_layers": []}
    plan = make_plan(configuration.from_mapping(raw))
    assert plan.shape == wide
    assert plan.initial().tobytes() == values.tobytes()


def test_an_export_is_readable_text_and_safetensors(tmp_path: Path) -> None:
    huggingface.export(theta(), SHAPE, LAYOUT, tmp_path / "new" / "folder")
    found = json.loads((tmp_path / "new" / "folder" / "config.json").read_text(encoding="utf-8"))
    assert (found["num_key_value_heads"], found["tie_word_embeddings"]) == (2, False)
    back = huggingface.read_weights(tmp_path / "new" / "folder", LAYOUT)
    assert back.tobytes() == theta().tobytes()


def damaged(folder: Path, change: Callable[[dict[str, object]], None]) -> Path:
    huggingface.export(theta(), SHAPE, LAYOUT, folder)
    file = folder / "config.json"
    found = json.loads(file.read_text(encoding="utf-8"))
    change(found)
    file.write_text(json.dumps(found), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("field", "value"),
    [("model_type", "gpt2"), ("attention_bias", True), ("rope_scaling", {"factor": 2.0}), ("head_dim", 16)],
)
def test_a_model_of_another_kind_is_refused_by_name(tmp_path: Path, field: str, value: object) -> None:
    folder = damaged(tmp_path, lambda found: found.update({field: value}))
    with pytest.raises(DataError, match=field):
        huggingface.read_shape(folder, context=16)


def test_a_tensor_of_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    huggingface.export(theta(), SHAPE, LAYOUT, tmp_path)
    other = ModelShape(hidden_size=32, layers=2, heads=4, kv_heads=4, intermediate_size=48, context=24, vocab_size=64)
    with pytest.raises(DataError, match=r"k_proj\.weight is \[16, 32\], the model wants \[32, 32\]"):
        huggingface.read_weights(tmp_path, other.layout([]))


def test_a_missing_layer_is_refused_by_name(tmp_path: Path) -> None:
    huggingface.export(theta(), SHAPE, LAYOUT, tmp_path)
    other = ModelShape(hidden_size=32, layers=3, heads=4, kv_heads=2, intermediate_size=48, context=24, vocab_size=64)
    with pytest.raises(DataError, match="lacks 9 tensors"):
        huggingface.read_weights(tmp_path, other.layout([]))


def test_a_folder_without_a_model_is_an_error_of_the_key(tiny: Callable[..., Plan], tmp_path: Path) -> None:
    raw = configuration.to_mapping(tiny().config)
    raw["model"] = {"initial_from": str(tmp_path / "nothing")}
    with pytest.raises(ConfigError, match=r"model\.initial_from"):
        make_plan(configuration.from_mapping(raw))
