"""Initial weights of a run, without torch: inner nodes make them, too, and never load it."""

from __future__ import annotations

import math

import numpy as np

from worldlm_ray.model.shape import ModelShape
from worldlm_ray.seeds import derive
from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.tensors.layout import Layout


def initial_parameters(shape: ModelShape, layout: Layout, *, seed: int) -> Flat:
    """Initial weights of a run: the same for every node, and independent of the key/backbone split.

    Normal with standard deviation 0.02, residual projections scaled by 1/sqrt(2 layers) (GPT-2's rule),
    norms one. Every tensor draws from its own stream, named by the parameter.
    """
    flat = np.empty(layout.size, np.float32)
    for name, view in layout.views(flat).items():
        if view.ndim == 1:
            view.fill(1.0)
            continue
        scale = 0.02
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            scale /= math.sqrt(2 * shape.layers)
        generator = np.random.Generator(np.random.PCG64(derive(seed, "init", name)))
        view[...] = generator.standard_normal(view.shape, np.float32) * np.float32(scale)
    return flat
