"""A pre-trained causal language model as a run knows it: its trainable parameters and their initial values.

Nothing here imports torch. An inner node adds up trainable parameters, and never reads the base model unless these
are its own parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from worldlm_ray.config.schema import LoraConfig
from worldlm_ray.model.shape import ModelShape
from worldlm_ray.seeds import derive
from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.tensors.layout import Layout, make_layout

LORA_A, LORA_B = ".lora_A.default.weight", ".lora_B.default.weight"
"""Ends of the names of an adapter's two matrices, as peft gives them."""


@dataclass(frozen=True, kw_only=True)
class PretrainedShape:
    """A causal language model of transformers. It stands beside `ModelShape`, with its names for the same facts."""

    folder: str
    """Where its config.json and its weights lie, on every machine that trains it."""
    config: str
    """The content of its config.json, as JSON: by the run's copy, if it keeps one."""
    model_type: str
    """Its kind by transformers' name, such as `llama` or `gpt2`."""
    hidden_size: int
    layers: int
    heads: int
    vocab_size: int
    context: int
    """Tokens per training sequence."""
    parameters: tuple[tuple[str, tuple[int, ...]], ...]
    """Name and shape of every trainable parameter, in model order. A tied parameter is listed once."""
    frozen: int
    """Parameters that are not trained, and never travel."""
    trainable: str | tuple[str, ...]
    """`all`, `lora`, or name patterns."""
    lora: LoraConfig
    """Used where `trainable` is `lora`."""
    frozen_a: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """Name and shape of every A that stays as `seed` draws it."""
    seed: int = 0
    """Of the run."""
    cache_dir: str
    """Where the frozen weights are kept in the form in which they are mapped."""

    @property
    def has_adapters(self) -> bool:
        """Whether adapters are trained instead of the model's own parameters."""
        return self.trainable == "lora"

    def layout(self, key_patterns: list[str]) -> Layout:
        """The flat layout of the trainable parameters with the given key layers.

        Raises:
            ConfigError: a pattern matches nothing.
        """
        return make_layout(self.parameters, key_patterns, layers=self.layers)


Architecture = ModelShape | PretrainedShape
"""What a run trains: the decoder of this package, or a model of transformers."""


def initial_adapters(layout: Layout, *, seed: int) -> Flat:
    """Initial adapters of a run: the same for every node. B is zero, so that the model begins as its base.

    A is uniform within 1 / sqrt(inputs), which is what the authors' code draws (Hu et al., arXiv 2106.09685). Every
    matrix draws from its own stream, named by the parameter.

    Args:
        layout: of the adapters.
        seed: of the run.
    """
    flat = np.zeros(layout.size, np.float32)
    for name, view in layout.views(flat).items():
        if name.endswith(LORA_A):
            view[...] = draw_a(name, view.shape, seed=seed)
    return flat


def draw_a(name: str, shape: tuple[int, ...], *, seed: int) -> Flat:
    """The initial A [r, inputs] of an adapter; see `initial_adapters`.

    Args:
        name: of the matrix.
        shape: of the matrix.
        seed: of the run.
    """
    generator = np.random.Generator(np.random.PCG64(derive(seed, "init", name)))
    bound = 1.0 / math.sqrt(shape[1])
    return generator.uniform(-bound, bound, shape).astype(np.float32)
