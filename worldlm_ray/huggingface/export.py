"""A node's model as a Hugging Face folder that `AutoModelForCausalLM` loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from worldlm_ray.errors import DataError
from worldlm_ray.huggingface.declared import CONFIG
from worldlm_ray.huggingface.weights import WEIGHTS
from worldlm_ray.model.shape import ModelShape
from worldlm_ray.params import Flat, Layout


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
