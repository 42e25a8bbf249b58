"""Export to a Hugging Face folder, and a Hugging Face model as initial weights."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from worldlm_ray import huggingface
from worldlm_ray.config.loading import from_mapping, to_mapping
from worldlm_ray.errors import ConfigError, DataError
from worldlm_ray.model.decoder import Decoder
from worldlm_ray.model.flat import bind
from worldlm_ray.model.initial import initial_parameters
from worldlm_ray.model.shape import ModelShape
from worldlm_ray.plan.plan import Plan, make_plan

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
    raw = to_mapping(tiny().config)
    raw["model"] = {"initial_from": str(tmp_path / "model"), "context": 16, "key_layers": []}
    plan = make_plan(from_mapping(raw))
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


def resaved(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """An exported model whose tensors were changed."""
    from safetensors.torch import load_file, save_file

    huggingface.export(theta(), SHAPE, LAYOUT, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


NORM, QUERY = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("name", "tensor", "problem"),
    [
        (QUERY, torch.zeros(32, 32, dtype=torch.int8), "is I8: weights are quantized"),
        (QUERY, torch.zeros(32, 32, dtype=torch.float8_e4m3fn), "is F8_E4M3: weights are quantized"),
        (QUERY, torch.zeros(32, 32, dtype=torch.float64), "is F64"),
        (f"{QUERY}_scale", torch.ones(1), "is no tensor of a plain Llama model"),
        ("model.layers.0.self_attn.q_proj.bias", torch.ones(32), "is no tensor of a plain Llama model"),
        ("model.layers.2.mlp.up_proj.weight", torch.ones(48, 32), "is no tensor of a plain Llama model"),
        (NORM, torch.full((32,), float("nan")), "not finite"),
        (NORM, torch.full((32,), float("inf"), dtype=torch.bfloat16), "not finite"),
    ],
)
def test_a_tensor_that_would_be_read_as_another_is_refused_by_name(
    tmp_path: Path, name: str, tensor: torch.Tensor, problem: str
) -> None:
    folder = resaved(tmp_path, lambda tensors: tensors.update({name: tensor}))
    with pytest.raises(DataError, match=rf"{name} .*{problem}"):
        huggingface.read_weights(folder, LAYOUT)
    with pytest.raises(DataError, match=rf"{name} .*{problem}"):
        huggingface.check_weights(folder, LAYOUT, numbers=True)


def test_angles_that_old_files_hold_are_passed_over(tmp_path: Path) -> None:
    old = {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    folder = resaved(tmp_path, lambda tensors: tensors.update(old))
    assert huggingface.read_weights(folder, LAYOUT).tobytes() == theta().tobytes()


@pytest.mark.parametrize("tied", [False, True])
def test_a_missing_head_is_the_embedding_of_tied_models_only(tmp_path: Path, tied: bool) -> None:
    folder = resaved(tmp_path, lambda tensors: tensors.__delitem__("lm_head.weight"))
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": tied}))
    if tied:
        views = LAYOUT.views(huggingface.read_weights(folder, LAYOUT))
        assert np.array_equal(views["lm_head.weight"], views["model.embed_tokens.weight"])
    else:
        with pytest.raises(DataError, match=r"lacks 1 tensors, such as lm_head\.weight"):
            huggingface.read_weights(folder, LAYOUT)


def pointer(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 2200119864\n")


def halved(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (pointer, r"model\.safetensors: is a pointer of git-lfs.*git lfs pull"),
        (halved, r"model\.safetensors: is damaged or was cut short.*download it again"),
        (lambda file: file.write_bytes(b""), r"model\.safetensors: is damaged or was cut short.*download it again"),
        (lambda file: file.rename(file.with_name("pytorch_model.bin")), "save the model as safetensors"),
    ],
)
def test_a_download_that_is_not_whole_is_one_line_of_its_key(
    tiny: Callable[..., Plan], tmp_path: Path, damage: Callable[[Path], None], problem: str
) -> None:
    wide = ModelShape(hidden_size=32, layers=1, heads=2, kv_heads=2, intermediate_size=48, context=16, vocab_size=256)
    layout = wide.layout([])
    huggingface.export(initial_parameters(wide, layout, seed=9), wide, layout, tmp_path / "model")
    damage(tmp_path / "model" / "model.safetensors")
    raw = to_mapping(tiny().config)
    raw["model"] = {"initial_from": str(tmp_path / "model"), "context": 16, "key_layers": []}
    with pytest.raises(ConfigError, match=rf"^model\.initial_from: .*{problem}"):
        make_plan(from_mapping(raw))


def sharded(folder: Path) -> Path:
    """A model in two files with an index."""
    from safetensors.torch import load_file, save_file

    huggingface.export(theta(), SHAPE, LAYOUT, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, where = sorted(tensors), {}
    for number, part in enumerate((names[:5], names[5:]), 1):
        save_file({name: tensors[name] for name in part}, folder / f"model-{number}.safetensors")
        where |= dict.fromkeys(part, f"model-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def test_shards_are_read_and_a_missing_one_is_named(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    assert huggingface.read_weights(folder, LAYOUT).tobytes() == theta().tobytes()
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(DataError, match=r"lacks model-2\.safetensors, which .* names; download it again"):
        huggingface.read_weights(folder, LAYOUT)


@pytest.mark.parametrize("index", ["", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../a.safetensors"}}'])
def test_an_index_that_is_none_is_named(tmp_path: Path, index: str) -> None:
    (sharded(tmp_path) / "model.safetensors.index.json").write_text(index)
    with pytest.raises(DataError, match=r"model\.safetensors\.index\.json: .*download it again"):
        huggingface.read_weights(tmp_path, LAYOUT)


def test_a_size_beside_a_folder_must_be_the_models_own(tiny: Callable[..., Plan], tmp_path: Path) -> None:
    wide = ModelShape(hidden_size=32, layers=1, heads=2, kv_heads=2, intermediate_size=48, context=16, vocab_size=256)
    layout = wide.layout([])
    huggingface.export(initial_parameters(wide, layout, seed=9), wide, layout, tmp_path / "model")
    raw = to_mapping(tiny().config)
    own = {name: getattr(wide, name) for name in ("hidden_size", "layers", "heads", "kv_heads", "intermediate_size")}
    raw["model"] = {"initial_from": str(tmp_path / "model"), "context": 16, "key_layers": [], **own}
    assert make_plan(from_mapping(raw)).shape == wide
    for name in own:
        other = raw | {"model": raw["model"] | {name: 4}}
        with pytest.raises(ConfigError, match=rf"model\.{name}: got 4, but the model of .* has"):
            make_plan(from_mapping(other))


def test_a_context_above_what_the_model_was_made_for_is_refused(tiny: Callable[..., Plan], tmp_path: Path) -> None:
    wide = ModelShape(hidden_size=32, layers=1, heads=2, kv_heads=2, intermediate_size=48, context=16, vocab_size=256)
    layout = wide.layout([])
    huggingface.export(initial_parameters(wide, layout, seed=9), wide, layout, tmp_path / "model")
    raw = to_mapping(tiny().config)
    raw["model"] = {"initial_from": str(tmp_path / "model"), "context": 32, "key_layers": []}
    with pytest.raises(ConfigError, match=r"^model\.context: got 32, but the model of .* for 16 tokens; lower it"):
        make_plan(from_mapping(raw))


def test_a_config_of_a_billion_layers_is_refused_at_once(tmp_path: Path) -> None:
    folder = damaged(tmp_path, lambda found: found.update(num_hidden_layers=10**9))
    with pytest.raises(DataError, match=r"config\.json: num_hidden_layers is 1000000000; at most 10,000"):
        huggingface.read_shape(folder)


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json"])
def test_a_damaged_file_beside_the_model_is_found_before_the_run(
    tiny: Callable[..., Plan], tmp_path: Path, name: str
) -> None:
    wide = ModelShape(hidden_size=32, layers=1, heads=2, kv_heads=2, intermediate_size=48, context=16, vocab_size=256)
    layout = wide.layout([])
    huggingface.export(initial_parameters(wide, layout, seed=9), wide, layout, tmp_path / "model")
    (tmp_path / "model" / name).write_text("{", encoding="utf-8")
    raw = to_mapping(tiny().config)
    raw["model"] = {"initial_from": str(tmp_path / "model"), "context": 16, "key_layers": []}
    with pytest.raises(ConfigError, match=rf"{tmp_path / 'model' / name}: is not JSON"):
        make_plan(from_mapping(raw))


def test_fp64_is_not_said_to_be_quantized(tmp_path: Path) -> None:
    folder = resaved(tmp_path, lambda tensors: tensors.update({NORM: tensors[NORM].double()}))
    with pytest.raises(DataError, match=r"is F64; give the model in fp32, fp16 or bf16"):
        huggingface.read_weights(folder, LAYOUT)


def test_an_adapter_beside_the_weights_is_refused_by_name(tmp_path: Path) -> None:
    huggingface.export(theta(), SHAPE, LAYOUT, tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}', encoding="utf-8")
    for read in (huggingface.read_weights, huggingface.check_weights):
        with pytest.raises(DataError, match=r"an adapter \(adapter_config\.json\), which is not applied; merge it"):
            read(tmp_path, LAYOUT)


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
    raw = to_mapping(tiny().config)
    raw["model"] = {"initial_from": str(tmp_path / "nothing")}
    with pytest.raises(ConfigError, match=r"model\.initial_from"):
        make_plan(from_mapping(raw))
