"""Export to a Hugging Face folder, and which of its models can be computed here."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.exported import LAYOUT, SHAPE, damaged, theta

from worldlm_ray import huggingface
from worldlm_ray.config.loading import from_mapping, to_mapping
from worldlm_ray.errors import DataError
from worldlm_ray.model.decoder import Decoder
from worldlm_ray.model.flat import bind
from worldlm_ray.model.initial import initial_parameters
from worldlm_ray.model.shape import ModelShape
from worldlm_ray.plan import build
from worldlm_ray.plan.plan import Plan, make_plan


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
    raw = to_mapping(tiny().config)
    raw["model"] = {"initial_from": str(tmp_path / "model"), "context": 16, "key_layers": []}
    plan = make_plan(from_mapping(raw))
    assert plan.shape == wide
    assert build.initial(plan).tobytes() == values.tobytes()


def test_an_export_is_readable_text_and_safetensors(tmp_path: Path) -> None:
    huggingface.export(theta(), SHAPE, LAYOUT, tmp_path / "new" / "folder")
    found = json.loads((tmp_path / "new" / "folder" / "config.json").read_text(encoding="utf-8"))
    assert (found["num_key_value_heads"], found["tie_word_embeddings"]) == (2, False)
    back = huggingface.read_weights(tmp_path / "new" / "folder", LAYOUT)
    assert back.tobytes() == theta().tobytes()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "gpt2"),
        ("model_type", None),
        ("architectures", ["LlamaForSequenceClassification"]),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("attention_dropout", 0.1),
        ("hidden_act", "gelu"),
        ("head_dim", 16),
        ("pretraining_tp", 2),
        ("sliding_window", 8),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("partial_rotary_factor", 0.5),
        ("rope_scaling", {"factor": 2.0}),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_parameters", {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0}),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}),
        ("rope_parameters", {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 500000.0}),  # rope_theta beside it says 10000
        ("rope_theta", -1.0),
        ("quantization_config", {"quant_method": "fp8"}),
        ("quantization", {"bits": 4}),
        ("attn_logit_softcapping", 50.0),
        ("logits_scaling", 8.0),
        ("use_qk_norm", True),
        ("auto_map", {"AutoModelForCausalLM": "modeling.Mine"}),
        ("hidden_size", None),
        ("vocab_size", "many"),
        ("num_hidden_layers", True),
        ("num_attention_heads", 0),
        ("num_key_value_heads", 3),
        ("rms_norm_eps", 0.0),
        ("tie_word_embeddings", 1),
    ],
)
def test_a_model_of_another_kind_is_refused_by_name(tmp_path: Path, field: str, value: object) -> None:
    folder = damaged(tmp_path, lambda found: found.update({field: value}))
    with pytest.raises(DataError, match=field):
        huggingface.read_shape(folder, context=16)


@pytest.mark.parametrize(
    "field", ["head_dim", "rope_theta", "rope_scaling", "torch_dtype", "sliding_window", "mlp_bias"]
)
def test_null_is_as_good_as_absent(tmp_path: Path, field: str) -> None:
    folder = damaged(tmp_path, lambda found: found.update({field: None}))
    assert huggingface.read_shape(folder, context=24) == SHAPE


def test_absent_values_are_those_of_transformers(tmp_path: Path) -> None:
    def drop(found: dict[str, object]) -> None:
        for name in ("rms_norm_eps", "rope_theta", "num_key_value_heads", "max_position_embeddings"):
            del found[name]

    found = huggingface.read_shape(damaged(tmp_path, drop))
    assert (found.norm_eps, found.rope_theta, found.kv_heads, found.context) == (1e-6, 10_000.0, 4, 512)


def test_the_context_is_the_models_own_where_that_is_less(tmp_path: Path) -> None:
    folder = damaged(tmp_path, lambda found: found.update(max_position_embeddings=100))
    assert huggingface.read_shape(folder).context == 100
    assert huggingface.read_shape(folder, context=16).context == 16


def test_the_base_of_the_angles_is_found_in_either_spelling(tmp_path: Path) -> None:
    new = {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    assert huggingface.read_shape(damaged(tmp_path, lambda found: found.update(new))).rope_theta == 5e5
    old = {"rope_theta": 5e5, "rope_scaling": None}
    assert huggingface.read_shape(damaged(tmp_path, lambda found: found.update(old))).rope_theta == 5e5


def test_scaled_positions_are_refused_by_their_type_whatever_comes_first(tmp_path: Path) -> None:
    scaled = {"factor": 8.0, "rope_theta": 1e4, "rope_type": "llama3"}
    with pytest.raises(DataError, match=r"rope_parameters\.rope_type is 'llama3'"):
        huggingface.read_shape(damaged(tmp_path, lambda found: found.update(rope_parameters=scaled)))


@pytest.mark.parametrize("text", ["", "[]", "{", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"])
def test_a_config_that_is_none_is_one_line_with_a_cure(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(DataError, match=r"config\.json: .*(download it again|git lfs pull)"):
        huggingface.read_shape(tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(12))
def test_a_model_with_odd_settings_is_refused_or_computed_exactly(tmp_path: Path, seed: int) -> None:
    transformers = pytest.importorskip("transformers")
    rng = random.Random(seed)
    odd: dict[str, list[object]] = {
        "hidden_act": ["silu", "gelu", "relu"],
        "attention_bias": [False, True],
        "mlp_bias": [False, True],
        "head_dim": [None, 8, 16],
        "num_key_value_heads": [None, 1, 2, 4],
        "rms_norm_eps": [1e-6, 1e-5, 1e-2],
        "tie_word_embeddings": [False, True],
        "rope_parameters": [
            {"rope_type": "default", "rope_theta": 1e4},
            {"rope_type": "default", "rope_theta": 5e5},
            {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
            {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        ],
    }
    # Two settings at a time: with all of them drawn, hardly any model would be accepted.
    drawn = {name: rng.choice(odd[name]) for name in rng.sample(sorted(odd), 2)}
    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(
        **sizes | {"num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.3} | drawn
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    exact = {
        "hidden_act": ["silu"],
        "attention_bias": [False],
        "mlp_bias": [False],
        "head_dim": [None, 8],
        "rope_parameters": odd["rope_parameters"][:2],
    }
    if refused := [name for name, value in drawn.items() if value not in exact.get(name, odd[name])]:
        with pytest.raises(DataError, match="|".join(refused)):
            huggingface.read_shape(tmp_path, context=24)
        return
    found = huggingface.read_shape(tmp_path, context=24)
    values = huggingface.read_weights(tmp_path, found.layout(["lm_head.*", "model.layers.-1.*"]))
    tokens = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(ours(tokens, values, found), theirs(tmp_path, tokens), atol=1e-3)


def test_a_config_of_a_billion_layers_is_refused_at_once(tmp_path: Path) -> None:
    folder = damaged(tmp_path, lambda found: found.update(num_hidden_layers=10**9))
    with pytest.raises(DataError, match=r"config\.json: num_hidden_layers is 1000000000; at most 10,000"):
        huggingface.read_shape(folder)
