"""Which settings of `model` go with which backend: checked before a model's folder is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from worldlm_ray.config.checks import below_one, positive
from worldlm_ray.config.schema import ModelConfig
from worldlm_ray.errors import ConfigError
from worldlm_ray.model.pretrained_shape import PretrainedShape
from worldlm_ray.training import deepspeed_config

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
    """Refuse experts that are no adapters, or have key layers."""
    key, experts = "model.lora.experts", model.lora.experts
    if model.trainable != "lora":
        got = f"{experts}, but model.trainable is {model.trainable}: there are no adapters to mix"
        raise ConfigError(key, got, "set model.trainable to lora")
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


def ranks_within_the_worlds(plan: Plan) -> Iterable[ConfigError]:
    """A smaller rank is a part of the world's adapters; a larger one would have nothing to travel in."""
    lora = plan.config.model.lora
    for at, settings in plan.settings_in_force:
        rank, key = settings.training.lora_rank, f"{at}training.lora_rank"
        if rank is None:
            continue
        if not plan.shape.has_adapters:
            got = f"got {rank}, but model.trainable is {plan.config.model.trainable}: there are no adapters"
            yield ConfigError(key, got, "leave it out, or set model.trainable to lora")
        elif rank > lora.r:
            got = f"got {rank}, but model.lora.r is {lora.r}, the rank of what travels"
            yield ConfigError(key, got, f"give at most {lora.r}, or raise model.lora.r")
        elif rank < lora.r and lora.experts != "none":
            got = f"got {rank}, but model.lora.experts is {lora.experts}: all experts share one A of rank {lora.r}"
            yield ConfigError(key, got, "leave it out, or set model.lora.experts to none")


def smaller_rank_in_one_process(plan: Plan) -> Iterable[ConfigError]:
    """Models of the world's rank are measured by a module of that rank, and DeepSpeed's workers hold one module."""
    for _, client in plan.distinct_clients:
        if plan.smaller_rank(client) is not None and deepspeed_config.is_zero(client.settings):
            got = f"got {client.settings.training.lora_rank}, but the client has DeepSpeed's workers"
            yield ConfigError(f"{client.key}.training.lora_rank", got, "leave it out at this client")


RULES: tuple[Callable[[Plan], Iterable[ConfigError]], ...] = (
    not_under_transformers,
    ranks_within_the_worlds,
    smaller_rank_in_one_process,
)
