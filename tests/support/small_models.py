"""A small decoder, batches for it and a trainer of it."""

from __future__ import annotations

import numpy as np

from worldlm_ray.model.shape import ModelShape
from worldlm_ray.training.local import Batch

KEYS = ["model.embed_tokens.*", "model.layers.-1.*", "model.norm.*", "lm_head.*"]


def batches(shape: ModelShape, count: int, *, seed: int = 0, size: int = 4) -> list[Batch]:
    rng = np.random.Generator(np.random.PCG64(seed))
    windows = rng.integers(0, shape.vocab_size, (count, size, shape.context + 1))
    return [(np.ascontiguousarray(w[:, :-1]), np.ascontiguousarray(w[:, 1:])) for w in windows]
