"""A small model, exported to a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from worldlm_ray import huggingface
from worldlm_ray.model.initial import initial_parameters
from worldlm_ray.model.shape import ModelShape

SHAPE = ModelShape(hidden_size=32, layers=2, heads=4, kv_heads=2, intermediate_size=48, context=24, vocab_size=64)
LAYOUT = SHAPE.layout(["lm_head.*", "model.layers.-1.*"])


def theta() -> np.ndarray:
    return initial_parameters(SHAPE, LAYOUT, seed=5) * np.float32(5.0)  # far from uniform logits


def damaged(folder: Path, change: Callable[[dict[str, object]], None]) -> Path:
    huggingface.export(theta(), SHAPE, LAYOUT, folder)
    file = folder / "config.json"
    found = json.loads(file.read_text(encoding="utf-8"))
    change(found)
    file.write_text(json.dumps(found), encoding="utf-8")
    return folder
