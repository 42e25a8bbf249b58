"""The model that a run begins from: its shape, its tokenizer, and what its folder holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from worldlm_ray import huggingface
from worldlm_ray.config.checks import positive
from worldlm_ray.config.schema import ModelConfig, RunConfig
from worldlm_ray.errors import ConfigError, DataError
from worldlm_ray.model import pretrained_base
from worldlm_ray.model.pretrained_shape import Architecture, PretrainedShape, initial_adapters
from worldlm_ray.model.shape import SIZES, resolve_shape
from worldlm_ray.plan import kept
from worldlm_ray.plan.backend_checks import check_backend
from worldlm_ray.storage.filesystem import expanded
from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.tensors.layout import Layout

BYTES = 256
"""Tokens of a tokenizer that takes every byte for one."""
BYTE_MODEL = BYTES + 128
"""A model that knows more tokens than bytes and some special ones was made for another tokenizer."""


def shape_of(config: RunConfig, vocab_size: int) -> Architecture:
    """The model's shape: a preset with the config's numbers, or that of a model on disk."""
    model = config.model
    check_backend(model)
    if model.initial_from is None:
        return resolve_shape(model, vocab_size=vocab_size)
    if model.context is not None:
        positive(model.context, "model.context")
    base = declared(config, model.initial_from)
    folder, found = expanded(model.initial_from), base.shape
    if found.context > base.max_positions:
        got = f"got {found.context}, but the model of {folder} was made for {base.max_positions:,} tokens"
        raise ConfigError("model.context", got, "lower it")
    for name in SIZES:
        given, own = getattr(model, name), getattr(found, name, None)
        if given not in (None, own):
            got = f"got {given}, but the model of {folder} has {own}"
            raise ConfigError(f"model.{name}", got, "remove it, or set it to null")
    if config.data.tokenizer is None and vocab_size == BYTES:
        _check_bytes(folder, found.vocab_size)
    if found.vocab_size < vocab_size:
        raise ConfigError(
            "model.initial_from",
            f"the model knows {found.vocab_size} tokens, the tokenizer makes {vocab_size}",
            "set data.tokenizer to the model's own tokenizer.json",
        )
    return found


def declared(config: RunConfig, folder: str) -> huggingface.Declared:
    """What the model that a run begins from declares: by the run's copy, if it keeps one."""
    file = kept.place(config, kept.MODEL_CONFIG) or expanded(folder) / kept.MODEL_CONFIG
    if config.model.backend == "transformers":
        return pretrained(config.model, file, expanded(folder), cache_dir=config.data.cache_dir, seed=config.seed)
    try:
        return huggingface.read_declared(file, context=config.model.context)
    except DataError as error:
        raise ConfigError("model.initial_from", str(error)) from error


def pretrained(model: ModelConfig, file: Path, folder: Path, *, cache_dir: str, seed: int) -> huggingface.Declared:
    """The same of a model that transformers computes. It is read once per process: transformers takes seconds to start.

    Args:
        model: the run's settings.
        file: the config.json, or the run's copy of it.
        folder: of the model.
        cache_dir: for the frozen weights.
        seed: of the run.
    """
    try:
        found = huggingface.read_object(file)
        key = repr((found, model, file, folder, cache_dir, seed))
        if key not in _READ:
            from worldlm_ray.model.pretrained import read_shape

            shape, longest, tied = read_shape(found, model, file=file, folder=folder, cache_dir=cache_dir, seed=seed)
            _READ[key] = huggingface.Declared(shape=shape, max_positions=longest, tied=tied)
    except DataError as error:
        raise ConfigError("model.initial_from", str(error)) from error
    return _READ[key]


_READ: dict[str, huggingface.Declared] = {}
"""What `pretrained` has made, by the content of config.json and its arguments."""


def read_parameters(model: ModelConfig, shape: Architecture, layout: Layout, *, seed: int) -> Flat:
    """The initial parameters of a run that begins from a model on disk.

    Raises:
        ConfigError: the weights cannot be read.
    """
    if shape.has_adapters:
        return initial_adapters(layout, seed=seed)
    assert model.initial_from is not None, "a run without it begins from random weights"
    folder = expanded(model.initial_from)
    try:
        if isinstance(shape, PretrainedShape):
            return pretrained_base.read_parameters(folder, Path(shape.cache_dir), layout)
        return huggingface.read_weights(folder, layout)
    except DataError as error:
        raise ConfigError("model.initial_from", str(error)) from error


def tokenizer_of(config: RunConfig) -> str | None:
    """The tokenizer in force where no node names another: the run's copy, the one that is given, or the model's."""
    copy = kept.place(config, kept.TOKENIZER)
    if copy is not None or config.data.tokenizer is not None:
        return str(copy or config.data.tokenizer)
    if config.model.initial_from is not None:
        own = expanded(config.model.initial_from) / kept.TOKENIZER
        return str(own) if own.is_file() else "bytes"
    return None


def with_tokenizer(config: RunConfig) -> RunConfig:
    """The configuration with the tokenizer of its initial model, where it names none and that model has one."""
    tokenizer = tokenizer_of(config)
    if tokenizer in (None, "bytes"):
        return config
    return replace(config, data=replace(config.data, tokenizer=tokenizer))


def _check_bytes(folder: Path, vocab_size: int) -> None:
    """Refuse to take a model's text for bytes, unless it may well have been made for them."""
    others = [
        name for name in ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt") if (folder / name).exists()
    ]
    if vocab_size <= BYTE_MODEL and not others:
        return
    got = f"is not given, and {folder} holds no tokenizer.json" + (f", only {others[0]}" if others else "")
    cure = "give the model's own as a tokenizer.json, or `bytes` to train it on bytes all the same"
    raise ConfigError("data.tokenizer", f"{got}; its model knows {vocab_size:,} tokens", cure)


def check_weights(folder: str, shape: Architecture, layout: Layout, *, numbers: bool = False) -> None:
    """Look through the weights that the run begins from: the headers, and the numbers if that is asked for."""
    try:
        if not isinstance(shape, PretrainedShape):
            huggingface.check_weights(expanded(folder), layout, numbers=numbers)
        elif numbers:
            pretrained_base.base_file(expanded(folder), Path(shape.cache_dir))
        else:
            pretrained_base.fingerprint(expanded(folder))
    except DataError as error:
        raise ConfigError("model.initial_from", str(error)) from error


def check_side_files(folder: str) -> None:
    """Refuse a damaged file that an export of the run would need: found only then, it would be too late."""
    for name in (kept.GENERATION_CONFIG, "tokenizer_config.json", "special_tokens_map.json"):
        file = expanded(folder) / name
        try:
            if file.is_file():
                huggingface.read_object(file)
        except DataError as error:
            raise ConfigError("model.initial_from", str(error)) from error
