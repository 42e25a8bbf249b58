"""Sizes of a decoder, presets of them, and the parameters that they imply.

Nothing here imports torch: `worldlm show` and every check before a run work from shapes alone.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace

from worldlm_ray.config.checks import positive
from worldlm_ray.config.schema import ModelConfig
from worldlm_ray.errors import ConfigError
from worldlm_ray.tensors.layout import Layout, make_layout

MOST_LAYERS = 10_000
"""With more layers, the list of names alone would take minutes."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a Llama-shaped decoder (untied head, SwiGLU, RMSNorm, rotary positions)."""

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    intermediate_size: int
    context: int
    """Tokens per training sequence."""
    vocab_size: int = 256
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5

    @property
    def frozen(self) -> int:
        """Parameters that are not trained."""
        return 0

    @property
    def has_adapters(self) -> bool:
        """Whether adapters are trained instead of the model's own parameters: never here."""
        return False

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.heads

    @property
    def parameters(self) -> list[tuple[str, tuple[int, ...]]]:
        """Name and shape of every parameter, in model order. Names: Hugging Face's LlamaForCausalLM."""
        width, kv = self.hidden_size, self.kv_heads * self.head_size
        found: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (self.vocab_size, width))]
        for layer in range(self.layers):
            block = f"model.layers.{layer}"
            found += [
                (f"{block}.self_attn.q_proj.weight", (width, width)),
                (f"{block}.self_attn.k_proj.weight", (kv, width)),
                (f"{block}.self_attn.v_proj.weight", (kv, width)),
                (f"{block}.self_attn.o_proj.weight", (width, width)),
                (f"{block}.mlp.gate_proj.weight", (self.intermediate_size, width)),
                (f"{block}.mlp.up_proj.weight", (self.intermediate_size, width)),
                (f"{block}.mlp.down_proj.weight", (width, self.intermediate_size)),
                (f"{block}.input_layernorm.weight", (width,)),
                (f"{block}.post_attention_layernorm.weight", (width,)),
            ]
        return [*found, ("model.norm.weight", (width,)), ("lm_head.weight", (self.vocab_size, width))]

    def layout(self, key_patterns: list[str]) -> Layout:
        """The flat layout with the given key layers.

        Raises:
            ConfigError: a pattern matches nothing.
        """
        return make_layout(self.parameters, key_patterns, layers=self.layers)


def _preset(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, context: int) -> ModelShape:
    return ModelShape(
        hidden_size=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        intermediate_size=intermediate,
        context=context,
    )


PRESETS = {
    "nano": _preset(64, 3, 4, 4, 176, 64),
    "micro": _preset(128, 4, 4, 4, 352, 128),
    "mini": _preset(256, 6, 8, 8, 704, 256),
    # 75m to 400m follow the sizes of the WorldLM paper's models with a vocabulary of 50k.
    "75m": _preset(512, 8, 8, 8, 1408, 1024),
    "125m": _preset(768, 12, 12, 12, 2048, 1024),
    "250m": _preset(1024, 14, 16, 16, 2816, 1024),
    "400m": _preset(1024, 24, 16, 16, 2816, 2048),
    "1b": _preset(2048, 22, 32, 8, 5632, 2048),
}


SIZES = ("hidden_size", "layers", "heads", "kv_heads", "intermediate_size")
"""Settings of the model that a Hugging Face folder determines, if a run begins from one."""


def resolve_shape(config: ModelConfig, *, vocab_size: int) -> ModelShape:
    """The shape of a preset, with the sizes that the config sets itself.

    Raises:
        ConfigError: an unknown preset, or numbers that do not fit each other.
    """
    if config.preset not in PRESETS:
        close = difflib.get_close_matches(config.preset, PRESETS, n=1)
        cure = f"did you mean {close[0]!r}?" if close else "expected one of " + ", ".join(PRESETS)
        raise ConfigError("model.preset", f"unknown preset {config.preset!r}", cure)
    shape = replace(PRESETS[config.preset], vocab_size=vocab_size)
    for name in (*SIZES, "context"):
        value = getattr(config, name)
        if value is not None:
            positive(value, f"model.{name}")
            if name == "layers" and value > MOST_LAYERS:
                raise ConfigError("model.layers", f"got {value:,}", f"give at most {MOST_LAYERS:,}")
            shape = replace(shape, **{name: value})
    if config.heads is not None and config.kv_heads is None:
        shape = replace(shape, kv_heads=shape.heads)
    if shape.hidden_size % (2 * shape.heads):
        raise ConfigError(
            "model.heads",
            f"{shape.heads} heads do not divide hidden_size {shape.hidden_size} into even widths",
            "choose a multiple of twice the heads",
        )
    if shape.heads % shape.kv_heads:
        raise ConfigError("model.kv_heads", f"{shape.kv_heads} does not divide {shape.heads} heads", "choose a divisor")
    return shape
