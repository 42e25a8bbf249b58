"""What a worker of DeepSpeed needs before its engine: the process group, the module, and the parameter groups."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import deepspeed
import torch
from torch import nn

from worldlm_ray.config.schema import PrivacyConfig, TrainingConfig
from worldlm_ray.model.decoder import Decoder
from worldlm_ray.model.flat import bind
from worldlm_ray.model.making import LanguageModel, make_model
from worldlm_ray.model.pretrained_shape import Architecture, PretrainedShape
from worldlm_ray.tensors.layout import Layout


def join(*, cuda: bool) -> None:
    """Let DeepSpeed use the process group that exists."""
    # DeepSpeed calls torch's collectives by deprecated names, and torch warns at every call.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if not cuda:
        # DeepSpeed would compile an all-reduce through shared memory at its first start. gloo needs no compiler, and
        # works between hosts, too.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", auto_mpi_discovery=False, verbose=False)


def make_zero_model(
    shape: Architecture, layout: Layout, training: TrainingConfig, config: dict[str, Any]
) -> LanguageModel:
    """The module that DeepSpeed is to train. At stage 3 a decoder is sharded while it is made.

    The frozen parameters of a pre-trained model are mapped, and DeepSpeed shards them when the engine is made.
    """
    recompute = training.activation_checkpointing
    if isinstance(shape, PretrainedShape):
        model = make_model(shape, recompute=recompute)
        bind(model.root, layout, torch.zeros(layout.size))
        return model
    with deepspeed.zero.Init(config_dict_or_path=config, enabled=training.zero_stage == 3):
        return Decoder(shape, recompute=recompute)


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Put the buffers where the parameters are: DeepSpeed leaves those of a decoder that it sharded on the CPU."""
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)


def checked(privacy: PrivacyConfig, shape: Architecture, model: LanguageModel) -> PrivacyConfig:
    """The settings with the mode of per-record gradients decided, once these are known to be right for the model."""
    from worldlm_ray.privacy.dp_sgd import check_architecture, likely_cheaper

    mode = privacy.grad_sample_mode
    if mode == "auto":
        mode = likely_cheaper(width=shape.hidden_size, length=shape.context)
    check_architecture(shape, mode=mode, model=model)
    return replace(privacy, grad_sample_mode=mode)


def groups_of(model: nn.Module, training: TrainingConfig) -> list[dict[str, Any]]:
    """Weight decay on matrices, not on norms. At stage 3 `parameter.shape` is empty, and `ds_shape` is the whole."""
    matrices: list[nn.Parameter] = []
    norms: list[nn.Parameter] = []
    for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
        shape = getattr(parameter, "ds_shape", parameter.shape)
        (matrices if len(shape) > 1 else norms).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": training.weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]  # of adapters no norm is trained
