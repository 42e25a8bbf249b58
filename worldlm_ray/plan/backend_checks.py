"""Which settings of `model` go with which backend: checked before a model's folder is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from worldlm_ray.config.checks import below_one, positive
from worldlm_ray.config.schema import ModelConfig
from worldlm_ray.errors import ConfigError
from worldlm_ray.model.pretrained_shape import PretrainedShape

if TYPE_CHECKING:
    from worldlm_ray.plan.plan import Plan


def check_backend(model: ModelConfig) -> None:
    """Refuse settings that the backend does not know.

    Raises:
        ConfigError: the first of them.
    """
    patterns = model.trainable
    if patterns not in ("all", "lora") and not (
        isinstance(patterns, list) and patterns and all(isinstance(pattern, str) for pattern in patterns)
    ):
        cure = "write all, lora, or a list of name patterns such as [model.layers.29.*]"
        raise ConfigError("model.trainable", f"got {patterns!r}", cure)
    if model.lora.experts != "none":
        _check_experts(model)
    if model.backend == "decoder":
        if patterns != "all":
            got = f"got {patterns!r}, but model.backend is decoder, which trains all parameters"
            raise ConfigError("model.trainable", got, "set model.backend to transformers")
        return
    if model.initial_from is None:
        got = "not given, but model.backend is transformers"
        raise ConfigError("model.initial_from", got, "name the folder of a Hugging Face model")
    positive(model.lora.r, "model.lora.r")
    positive(model.lora.alpha, "model.lora.alpha")
    below_one(model.lora.dropout, "model.lora.dropout")


def _check_experts(model: ModelConfig) -> None:
    """Refuse experts that are no adapters, or whose mean is none."""
    key, experts = "model.lora.experts", model.lora.experts
    if model.trainable != "lora":
        got = f"{experts}, but model.trainable is {model.trainable}: there are no adapters to mix"
        raise ConfigError(key, got, "set model.trainable to lora")
    if not model.lora.freeze_a:
        got = f"{experts}, but clients train A: the mean of B is then the mean of no adapters"
        raise ConfigError(key, got, "set model.lora.freeze_a to true")
    if model.key_layers:
        raise ConfigError(key, f"{experts}, but model.key_layers is not empty", "leave key layers out")


def not_under_transformers(plan: Plan) -> Iterable[ConfigError]:
    """What the backend `transformers` does not do."""
    if not isinstance(plan.shape, PretrainedShape):
        return
    for _, client in plan.distinct_clients:
        settings = client.settings
        cure = "set model.backend to decoder, or leave this out"
        if settings.training.compile == "on":
            got = "on, but transformers compiles its models itself, if at all"
            yield ConfigError(f"{client.key}.training.compile", got, cure)


RULES: tuple[Callable[[Plan], Iterable[ConfigError]], ...] = (not_under_transformers,)
