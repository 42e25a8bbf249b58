"""A model of transformers as a folder: a PEFT adapter, or whole weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from worldlm_ray.data.special_tokens import SETTINGS, TOKENIZER
from worldlm_ray.errors import ConfigError, DataError
from worldlm_ray.huggingface.export import CARD, MARK, has_other_card
from worldlm_ray.huggingface.side_files import TEMPLATE
from worldlm_ray.model.pretrained_base import whole_model
from worldlm_ray.model.pretrained_shape import LORA_A, LORA_B, PretrainedShape, draw_a
from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.tensors.layout import Layout

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_SPECIAL = "special_tokens_map.json"
_OF_PEFT = "base_model.model."
"""What peft puts before the names of the model that it wraps."""
TRANSPOSED = ("gpt2",)
"""Kinds of models whose linear layers are Conv1D: their weights are [inputs, outputs]."""


def export_pretrained(
    theta: Flat,
    shape: PretrainedShape,
    layout: Layout,
    folder: Path,
    *,
    kept: Mapping[str, bytes],
    card: str,
    merge: bool = False,
) -> None:
    """Write a model that transformers computes.

    Args:
        theta: the trainable parameters.
        shape: of the model.
        layout: where each parameter lies in `theta`.
        folder: made if missing. Files of an earlier export are replaced.
        kept: small files by name, of the run's tokenizer.
        card: text of the model card, README.md.
        merge: write whole weights, with the adapters added to them. Without adapters whole weights are written anyway.

    Raises:
        ConfigError: `merge` without adapters.
        DataError: the folder cannot be written, or the base model cannot be read.
    """
    if merge and not shape.has_adapters:
        got = "the run trains the model's own parameters: there are no adapters to merge"
        raise ConfigError("--merge", got, "leave it out")
    files = {name: kept[name] for name in (TOKENIZER, SETTINGS, _SPECIAL, TEMPLATE) if name in kept}
    if not has_other_card(folder):
        files[CARD] = f"{card}\n{MARK}\n".encode()
    views: dict[str, np.ndarray[Any, Any]] = dict(layout.views(theta))
    views |= {name: draw_a(name, size, seed=shape.seed) for name, size in shape.frozen_a}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if shape.has_adapters and not merge:
            _write_adapter(views, shape, folder)
        else:
            for name in (ADAPTER, ADAPTER_CONFIG):  # transformers would add an earlier export's to the weights
                (folder / name).unlink(missing_ok=True)
            _write_whole(views, shape, folder)
        for name, contents in files.items():
            (folder / name).write_bytes(contents)
    except OSError as error:
        raise DataError(f"cannot export to {folder}: {error.strerror}; give another folder") from error


def peft_name(name: str) -> str:
    """The name of an adapter's matrix in a PEFT folder."""
    return _OF_PEFT + name.replace(".default.", ".")


def _write_adapter(views: Mapping[str, np.ndarray[Any, Any]], shape: PretrainedShape, folder: Path) -> None:
    import peft
    from safetensors.numpy import save_file

    tensors = {peft_name(name): np.ascontiguousarray(values) for name, values in views.items()}
    save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})
    (folder / ADAPTER).chmod(0o644)
    lora, targets = shape.lora, sorted({name.split(".lora_")[0].rpartition(".")[2] for name in views})
    peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=Path(shape.folder).name,
        inference_mode=True,
        fan_in_fan_out=shape.model_type in TRANSPOSED,
    ).save_pretrained(str(folder))


def _write_whole(views: Mapping[str, np.ndarray[Any, Any]], shape: PretrainedShape, folder: Path) -> None:
    import torch

    model = whole_model(Path(shape.folder))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, values in views.items():
            if not shape.has_adapters:
                parameters[name].copy_(torch.from_numpy(np.array(values)))
            elif name.endswith(LORA_B):
                stem = name.removesuffix(LORA_B)
                add_adapter(parameters[f"{stem}.weight"], views[stem + LORA_A], values, shape)
    model.save_pretrained(folder)


def add_adapter(weight: Any, a: np.ndarray[Any, Any], b: np.ndarray[Any, Any], shape: PretrainedShape) -> None:
    """Add alpha / r B A to a weight, in place.

    Args:
        weight: [outputs, inputs]; of GPT-2's Conv1D [inputs, outputs].
        a: [r, inputs].
        b: [outputs, r].
        shape: gives alpha, r and the kind of the model.
    """
    import torch

    change = torch.from_numpy(np.array(b)) @ torch.from_numpy(np.array(a)) * (shape.lora.alpha / shape.lora.r)
    weight += change.T if shape.model_type in TRANSPOSED else change
