"""Weights of a Hugging Face folder: read as they are, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.exported import LAYOUT, SHAPE, theta

from worldlm_ray import huggingface
from worldlm_ray.config.loading import from_mapping, to_mapping
from worldlm_ray.errors import ConfigError, DataError
from worldlm_ray.model.initial import initial_parameters
from worldlm_ray.model.shape import ModelShape
from worldlm_ray.plan.plan import Plan, make_plan


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
