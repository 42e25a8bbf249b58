"""DeepSpeed's configuration, made from ours, and the memory that a worker needs at each ZeRO stage.

This module does not import DeepSpeed, so checks and `worldlm show` take a second.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from worldlm_ray.config.schema import NodeSettings, TrainingConfig
from worldlm_ray.errors import ConfigError

BUCKET_ELEMENTS = 1 << 25
"""Largest bucket of gradients that are reduced together, in elements. DeepSpeed's default is 5e8, for which every
worker keeps a buffer of 2 GB, for any model."""

_OURS = {
    "train_batch_size": "training.batch_size",
    "train_micro_batch_size_per_gpu": "training.batch_size, training.accumulation_steps and resources.workers",
    "gradient_accumulation_steps": "training.accumulation_steps",
    "gradient_clipping": "training.grad_clip",
    "optimizer": "training.lr, betas and weight_decay",
    "zero_optimization.stage": "training.zero_stage",
    "zero_optimization.offload_optimizer.device": "training.offload_optimizer",
    "zero_optimization.offload_param.device": "training.offload_parameters",
    "bf16": "training.precision",
    "torch_autocast": "training.precision",
    "fp16": "training.precision",
    "scheduler": "training.warmup_fraction and min_lr_ratio",
}
"""DeepSpeed's keys that follow from ours, each with the key to change instead."""


def is_zero(settings: NodeSettings) -> bool:
    """Whether a client trains with DeepSpeed: several workers, or a ZeRO stage."""
    return settings.resources.worker_range[1] > 1 or settings.training.zero_stage > 0


def is_bf16(training: TrainingConfig, *, cuda: bool) -> bool:
    """Whether training computes in bf16."""
    return training.precision == "bf16" or (training.precision == "auto" and cuda)


def deepspeed_config(
    training: TrainingConfig, *, workers: int, parameters: int, cuda: bool, key: str = "training"
) -> dict[str, Any]:
    """DeepSpeed's configuration for a client.

    Args:
        training: the client's settings.
        workers: processes that share a step's batch.
        parameters: elements of the model, which bound the buckets.
        cuda: whether the workers have GPUs.
        key: dotted key of the training section, for messages.

    Raises:
        ConfigError: a key of `training.deepspeed` contradicts ours.
    """
    bf16 = is_bf16(training, cuda=cuda)
    bucket = max(min(parameters // 16, BUCKET_ELEMENTS), 1 << 16)
    zero: dict[str, Any] = {
        "stage": training.zero_stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if training.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
    if training.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": cuda}
    ours: dict[str, Any] = {
        "train_batch_size": training.batch_size,
        "train_micro_batch_size_per_gpu": training.batch_size // (workers * training.accumulation_steps),
        "gradient_accumulation_steps": training.accumulation_steps,
        "gradient_clipping": training.grad_clip,  # always set, since DeepSpeed clips at 1.0 by default
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": training.lr,
                "betas": list(training.betas),
                "weight_decay": training.weight_decay,
                # torch's optimizer needs no compiler. DeepSpeed's, for offloaded states, is many times faster.
                "torch_adam": not (training.offload_optimizer and cuda),
            },
        },
        "zero_optimization": zero,
        # At stage 0 bf16 works as without DeepSpeed: fp32 parameters under autocast.
        "bf16": {"enabled": bf16 and training.zero_stage > 0},
        "torch_autocast": {"enabled": bf16 and training.zero_stage == 0, "dtype": "bfloat16"},
        "wall_clock_breakdown": False,
        "steps_per_print": 10**9,
    }
    for path, value in _leaves(training.deepspeed):
        _check_key(path, value, ours, f"{key}.deepspeed")
    return _merged(ours, training.deepspeed)


def check(settings: NodeSettings, *, parameters: int, key: str) -> None:
    """Check a client's settings of DeepSpeed and of gradient accumulation.

    Args:
        settings: the client's.
        parameters: elements of the model.
        key: dotted key of the client, for messages.

    Raises:
        ConfigError: a batch cannot be divided, a setting needs another stage, or two settings contradict each other.
    """
    training, (low, high) = settings.training, settings.resources.worker_range
    for workers in range(low, high + 1):
        parts = workers * training.accumulation_steps
        if training.batch_size % parts:
            got = f"got {training.batch_size}, which {workers} workers cannot share equally"
            if training.accumulation_steps > 1:
                got += f" in {training.accumulation_steps} parts"
            raise ConfigError(f"{key}.training.batch_size", got, f"give a multiple of {parts}")
    if not is_zero(settings):
        for name in ("offload_optimizer", "offload_parameters", "deepspeed"):
            if getattr(training, name):
                got = "is set, but the client trains without DeepSpeed"
                raise ConfigError(f"{key}.training.{name}", got, "set training.zero_stage or resources.workers")
        return
    if training.offload_optimizer and training.zero_stage == 0:
        got = "is set at ZeRO stage 0, which keeps the whole optimizer on every worker"
        raise ConfigError(f"{key}.training.offload_optimizer", got, "set training.zero_stage to 1 or more")
    if training.offload_parameters and training.zero_stage != 3:
        got = f"is set at ZeRO stage {training.zero_stage}"
        raise ConfigError(f"{key}.training.offload_parameters", got, "only stage 3 can: set training.zero_stage to 3")
    gpus = settings.resources.gpus
    if gpus not in (0.0, 1.0):
        raise ConfigError(f"{key}.resources.gpus", f"got {gpus:g}", "a worker of a ZeRO client has 0 or 1 GPU")
    deepspeed_config(training, workers=low, parameters=parameters, cuda=gpus > 0, key=f"{key}.training")


# ---- memory ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class WorkerBytes:
    """Bytes on one worker, without activations and buckets."""

    parameters: int
    gradients: int
    optimizer: int
    """fp32 parameters if the model computes in bf16 or is sharded, and both moments."""
    host: int = 0
    """The part of these three that is offloaded to the host's memory."""

    @property
    def total(self) -> int:
        """The sum over the worker's device and the host's memory."""
        return self.parameters + self.gradients + self.optimizer


def worker_bytes(training: TrainingConfig, *, parameters: int, workers: int, cuda: bool, stage: int) -> WorkerBytes:
    """Memory by ZeRO stage: what a stage shards is divided by the number of workers.

    Source: Rajbhandari et al., arXiv 1910.02054, section 5 and figure 1: 2 + 2 + 12 bytes per parameter in mixed
    precision. In fp32, DeepSpeed's stages 1 to 3 keep a master copy beside the parameters, too: 4 + 4 + 12. Stage 0
    has no master copy, not even in bf16: 4 + 4 + 8.
    """
    width = 2 if stage and is_bf16(training, cuda=cuda) else 4
    optimizer = 12 if stage else 8

    def share(of: int, sharded: bool) -> int:
        return -(-of * parameters // workers) if sharded else of * parameters

    found = WorkerBytes(
        parameters=share(width, stage >= 3),
        gradients=share(width, stage >= 2),
        optimizer=share(optimizer, stage >= 1),
    )
    host = found.optimizer if training.offload_optimizer else 0
    if training.offload_optimizer and stage >= 2:
        host += found.gradients
    if training.offload_parameters and stage == 3:
        host += found.parameters
    return WorkerBytes(parameters=found.parameters, gradients=found.gradients, optimizer=found.optimizer, host=host)


# ---- further keys ------------------------------------------------------------------------------------------------


def _leaves(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in mapping.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{path}.")
        else:
            yield path, value


def _check_key(path: str, value: Any, ours: Mapping[str, Any], key: str) -> None:
    for name, instead in _OURS.items():
        if path != name and not path.startswith(f"{name}."):
            continue
        expected: Any = ours
        for part in path.split("."):
            expected = expected.get(part) if isinstance(expected, Mapping) else None
        if value != expected:
            got = f"got {value!r}" + (f", but it is {expected!r} here" if expected is not None else "")
            raise ConfigError(f"{key}.{path}", got, f"remove it; it follows from {instead}")


def _merged(ours: Mapping[str, Any], further: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(ours)
    for name, value in further.items():
        known = result.get(name)
        result[name] = _merged(known, value) if isinstance(known, Mapping) and isinstance(value, Mapping) else value
    return result
