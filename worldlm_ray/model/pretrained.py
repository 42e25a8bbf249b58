"""Causal language models of transformers, with or without peft's adapters, as modules that a trainer can train.

    read_shape  what a plan and `worldlm show` know of a model, from a module without weights
    make        the module to train: frozen parameters are mapped from a file, trainable ones are bound later

The frozen weights of a process exist once, whatever its number of clients, and the machine's page cache holds them once
for all its processes: see pretrained_base.py.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from worldlm_ray.config.schema import LoraConfig, ModelConfig
from worldlm_ray.errors import ConfigError, DataError
from worldlm_ray.model.decoder import cross_entropy
from worldlm_ray.model.pretrained_base import mapped_weights
from worldlm_ray.model.pretrained_shape import LORA_A, PretrainedShape, draw_a

EXTRA = "pip install 'worldlm_ray[huggingface]'"
DEFAULT_CONTEXT = 512
"""Tokens per training sequence if the run sets none and the model allows more."""


class Pretrained(nn.Module):
    """A language model of transformers: token ids [B, T] to logits [B, T, V].

    Args:
        root: transformers' model; its parameters have the layout's names.
    """

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.root = root
        self.drops = any(isinstance(module, nn.Dropout) and module.p > 0.0 for module in root.modules())

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits of the next token at every position."""
        logits_BTV: Tensor = self.root(input_ids=tokens_BT, use_cache=False).logits
        return logits_BTV

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor, *, reduction: str = "mean") -> Tensor:
        """Cross-entropy in nats: the mean per counted target, the sum, or one number per target."""
        if self.training and self.drops:
            # A batch decides its own dropout, so that a client that was restarted drops what it would have dropped.
            torch.manual_seed(zlib.crc32(tokens_BT.cpu().numpy().tobytes()))
        return cross_entropy(self(tokens_BT), targets_BT, reduction=reduction)


def read_shape(
    found: Mapping[str, Any], model: ModelConfig, *, file: Path, folder: Path, cache_dir: str, seed: int = 0
) -> tuple[PretrainedShape, int, bool]:
    """What a run needs to know of a model on disk, from its config.json.

    Args:
        found: the content of config.json.
        model: the run's settings.
        file: the config.json, for messages.
        folder: of the model.
        cache_dir: for the frozen weights.
        seed: of the run.

    Returns:
        The shape, the model's longest sequence in tokens, and whether embedding and head are one tensor.

    Raises:
        ConfigError: a pattern of `model.trainable` or a target of `model.lora` matches nothing.
        DataError: the folder holds no causal language model of transformers.
    """
    root = bare(found, file=file)
    choose(root, model.trainable, model.lora)
    config = root.config
    limit = int(getattr(config, "max_position_embeddings", None) or DEFAULT_CONTEXT)
    trained = tuple((name, tuple(p.shape)) for name, p in root.named_parameters() if p.requires_grad)
    shape = PretrainedShape(
        folder=str(folder),
        config=json.dumps(found),
        model_type=config.model_type,
        hidden_size=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        vocab_size=config.vocab_size,
        context=model.context if model.context is not None else min(limit, DEFAULT_CONTEXT),
        parameters=trained,
        frozen=sum(p.numel() for n, p in root.named_parameters() if not p.requires_grad and LORA_A not in n),
        trainable=model.trainable if isinstance(model.trainable, str) else tuple(model.trainable),
        lora=model.lora,
        frozen_a=tuple((n, tuple(p.shape)) for n, p in root.named_parameters() if LORA_A in n and not p.requires_grad),
        seed=seed,
        cache_dir=cache_dir,
    )
    return shape, limit, bool(getattr(config, "tie_word_embeddings", False))


def make(shape: PretrainedShape, *, recompute: bool = False, device: str = "cpu") -> Pretrained:
    """The module of a shape. Trainable parameters are without memory until they are bound to a flat buffer.

    Args:
        shape: of the model.
        recompute: compute the blocks' activations again in the backward pass instead of keeping them.
        device: where the frozen weights lie.

    Raises:
        DataError: the weights cannot be read.
    """
    folder = Path(shape.folder)
    root = bare(json.loads(shape.config), file=folder / "config.json")
    if shape.trainable != "all":
        root.load_state_dict(mapped_weights(folder, Path(shape.cache_dir), device), strict=False, assign=True)
        root.tie_weights()
    choose(root, shape.trainable, shape.lora)
    drawn = {name: torch.from_numpy(draw_a(name, size, seed=shape.seed)) for name, size in shape.frozen_a}
    root.load_state_dict(drawn, strict=False, assign=True)
    if recompute:
        root.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        root.enable_input_require_grads()
    return Pretrained(root)


def bare(found: Mapping[str, Any], *, file: Path) -> Any:
    """transformers' module without weights.

    Raises:
        DataError: transformers has no causal language model of this config.json.
    """
    auto = import_transformers()
    kind = found.get("model_type")
    if not isinstance(kind, str):
        raise DataError(f"{file}: names no model_type; give the folder of a Hugging Face model")
    if "quantization_config" in found:
        raise DataError(f"{file}: quantization_config: weights are quantized; give the model unquantized")
    known = auto.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    named = found.get("architectures") or []
    if "vision_config" in found or kind not in known or not set(named) & {known[kind]}:
        got = f"{named[0] if named else 'no architecture'} (model_type {kind})"
        wanted = f"; give {known[kind]}" if kind in known and "vision_config" not in found else "; give another model"
        raise DataError(f"{file}: {got} is no causal language model of transformers {auto.__version__}{wanted}")
    try:
        config = auto.CONFIG_MAPPING[kind].from_dict(dict(found))
        if getattr(config, "is_decoder", True) is False and "Bert" in known[kind]:
            raise DataError(f"{file}: {named[0]} is an encoder (is_decoder is not true); give a causal language model")
        with _without_weights():
            root = auto.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        root.tie_weights()  # parameters without memory are new ones
    except DataError:
        raise
    except Exception as error:  # a config.json makes transformers raise errors of many kinds
        detail = " ".join(str(error).split())[:300]
        raise DataError(f"{file}: transformers {auto.__version__} makes no model of it ({detail})") from error
    return root


def choose(root: Any, trainable: str | Any, lora: LoraConfig) -> None:
    """Let exactly the trainable parameters require a gradient; with `lora`, inject peft's adapters.

    Raises:
        ConfigError: a pattern or a target matches nothing.
    """
    if trainable == "all":
        return
    root.requires_grad_(False)
    if trainable == "lora":
        _inject(root, lora)
        return
    parameters = dict(root.named_parameters())
    for index, pattern in enumerate(trainable):
        matched = [name for name in parameters if fnmatchcase(name, pattern)]
        if not matched:
            few = ", ".join(list(parameters)[:3])
            cure = f"there are {len(parameters)}, such as {few}"
            raise ConfigError(f"model.trainable[{index}]", f"the pattern {pattern!r} matches no parameter", cure)
        for name in matched:
            parameters[name].requires_grad_(True)


def linear_names(root: nn.Module) -> list[str]:
    """Last parts of the names of the linear layers: what `model.lora.targets` may name."""
    names = [
        name
        for name, module in root.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    ]
    return sorted({name.rpartition(".")[2] for name in names})


def _inject(root: Any, lora: LoraConfig) -> None:
    try:
        import peft
    except ImportError as error:
        raise ConfigError("model.trainable", "lora, but peft is not installed", EXTRA) from error
    targets: Any = lora.targets or "all-linear"
    there = linear_names(root)
    for index, name in enumerate(lora.targets):
        if name not in there:
            cure = f"there are {', '.join(there)}"
            raise ConfigError(f"model.lora.targets[{index}]", f"{name!r} names no linear layer", cure)
    settings = peft.LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, bias="none"
    )
    peft.inject_adapter_in_model(settings, root, low_cpu_mem_usage=True)
    for name, parameter in root.named_parameters():
        if lora.freeze_a and name.endswith(LORA_A):
            parameter.requires_grad_(False)


def import_transformers() -> Any:
    """The package.

    Raises:
        ConfigError: it is not installed.
    """
    if not torch.cuda.is_available():
        # accelerate imports DeepSpeed, which prints a warning where it has to find out by itself that there is no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import transformers
    except ImportError as error:
        raise ConfigError("model.backend", "transformers is not installed", EXTRA) from error
    transformers.utils.logging.disable_progress_bar()  # the run has its progress line
    return transformers


@contextmanager
def _without_weights() -> Iterator[None]:
    """Parameters without memory. Buffers are real: those that are not saved are computed when the module is made."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        yield
