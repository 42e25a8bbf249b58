"""Hugging Face folders: a node's model as one that `AutoModelForCausalLM` loads, and one as a run's initial weights.

Parameter names and shapes are Hugging Face's already (worldlm_ray/model/shape.py): this is a file format, not a
conversion. A folder holds config.json, model.safetensors (or shards with an index), and the run's tokenizer.json.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from worldlm_ray.errors import DataError
from worldlm_ray.model.shape import ModelShape
from worldlm_ray.params import Flat, Layout

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


def export(theta: Flat, shape: ModelShape, layout: Layout, folder: Path, *, tokenizer: str = "bytes") -> None:
    """Write a model for Hugging Face.

    Args:
        theta: the parameters.
        shape: sizes of the decoder.
        layout: where each parameter lies in `theta`.
        folder: made if need be; files of an earlier export are replaced.
        tokenizer: the run's tokenizer; a tokenizer.json is copied, bytes need none.

    Raises:
        DataError: the folder cannot be written.
    """
    from safetensors.numpy import save_file

    views = layout.views(theta)
    ordered = {name: np.ascontiguousarray(views[name]) for name, _ in shape.parameters}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(ordered, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(_config(shape), indent=2) + "\n", encoding="utf-8")
        if tokenizer != "bytes":
            shutil.copyfile(Path(tokenizer).expanduser(), folder / "tokenizer.json")
    except OSError as error:
        raise DataError(f"cannot export to {folder}: {error.strerror}; give another folder") from error


def _config(shape: ModelShape) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
        "head_dim": shape.head_size,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": shape.context,
        "mlp_bias": False,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "vocab_size": shape.vocab_size,
    }


def read_shape(folder: Path, *, context: int) -> ModelShape:
    """The shape of a Llama-shaped Hugging Face model on disk.

    Args:
        folder: holds config.json.
        context: tokens per training sequence of the run.

    Raises:
        DataError: no such folder, or the model is of another kind.
    """
    try:
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} holds no readable {CONFIG}; give the folder of a Hugging Face model") from error
    heads = found.get("num_attention_heads", 0)
    differs = {
        "model_type": found.get("model_type") != "llama",
        "attention_bias": bool(found.get("attention_bias")),
        "mlp_bias": bool(found.get("mlp_bias")),
        "rope_scaling": bool(found.get("rope_scaling")),
        "head_dim": heads and found.get("head_dim", found["hidden_size"] // heads) * heads != found["hidden_size"],
    }
    for name, wrong in differs.items():
        if wrong:
            raise DataError(
                f"{folder / CONFIG}: {name} is {found.get(name)!r}; only plain Llama models can be trained on"
            )
    parameters = found.get("rope_parameters") or {}
    return ModelShape(
        hidden_size=found["hidden_size"],
        layers=found["num_hidden_layers"],
        heads=heads,
        kv_heads=found.get("num_key_value_heads", heads),
        intermediate_size=found["intermediate_size"],
        context=context,
        vocab_size=found["vocab_size"],
        rope_theta=float(found.get("rope_theta") or parameters.get("rope_theta", 10_000.0)),
        norm_eps=float(found.get("rms_norm_eps", 1e-5)),
    )


def read_weights(folder: Path, layout: Layout) -> Flat:
    """The weights of a Hugging Face model on disk as a flat buffer; a tied head becomes a copy of the embedding.

    Raises:
        DataError: a tensor is missing, or has another shape than the layout's.
    """
    files = _weight_files(folder)
    flat = np.empty(layout.size, np.float32)
    views, missing = layout.views(flat), set(layout.views(flat))
    from safetensors.torch import load_file  # numpy has no bfloat16

    embedding = None
    for file in files:
        for name, tensor in load_file(file).items():
            if name not in views:
                continue
            if tuple(tensor.shape) != views[name].shape:
                raise DataError(f"{file}: {name} is {list(tensor.shape)}, the model wants {list(views[name].shape)}")
            views[name][...] = tensor.float().numpy()
            missing.discard(name)
            embedding = views[name] if name == "model.embed_tokens.weight" else embedding
    if missing == {"lm_head.weight"} and embedding is not None:
        views["lm_head.weight"][...] = embedding
        missing = set()
    if missing:
        raise DataError(f"{folder} lacks {len(missing)} tensors, such as {sorted(missing)[0]}")
    return flat


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        return sorted({folder / file for file in index["weight_map"].values()})
    raise DataError(f"{folder} holds no {WEIGHTS}; other formats are not read, save the model as safetensors")
