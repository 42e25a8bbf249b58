"""Is CUDA's result the CPU's? Losses and updates in fp32 and bf16, compiled, and after a restart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from benchmarks.gpu.card import device
from benchmarks.gpu.rows import Rows
from benchmarks.zero_group import RATE, batches, start
from worldlm_ray.config.schema import TrainingConfig
from worldlm_ray.model.shape import PRESETS
from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.training.local import LocalTrainer
from worldlm_ray.training.trainer import Batch

LOSS_FP32, UPDATE_FP32 = 1e-3, 2e-2
"""Largest difference of a step's loss (nats per token), and relative L2 difference of the update, of two fp32 devices:
sums are taken in another order, and 50 steps of AdamW amplify that."""
LOSS_BF16 = 0.05
"""Largest difference of a step's loss between bf16 and fp32: bf16 has 8 bits of mantissa."""


def measure(rows: Rows, toy: bool) -> None:
    """Train the same batches in each way and compare."""
    where, steps = device(toy), 5 if toy else 50
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    shape = PRESETS["nano"] if toy else PRESETS["micro"]
    layout, initial = start(shape)
    drawn = batches(shape, steps=steps)

    def trained(on: str, **settings: str) -> tuple[list[float], Flat]:
        made = LocalTrainer(shape, layout, TrainingConfig(**settings), threads=2, device=on)  # type: ignore[arg-type]
        made.write(initial)
        return losses(made, drawn), made.read() - initial

    reference = trained("cpu", precision="fp32", compile="off")
    runs = {
        "fp32": (trained(where, precision="fp32", compile="off"), LOSS_FP32, UPDATE_FP32),
        "fp32, compiled": (trained(where, precision="fp32", compile="on"), LOSS_FP32, UPDATE_FP32),
        "bf16": (trained(where, precision="bf16", compile="off"), LOSS_BF16, None),
        "bf16, compiled": (trained(where, precision="bf16", compile="off" if toy else "on"), LOSS_BF16, None),
    }
    for name, ((found, update), loss_bound, update_bound) in runs.items():
        gap = float(np.max(np.abs(np.subtract(found, reference[0]))))
        rows.add(f"{name} against CPU fp32, {steps} steps: loss", gap, "nats per token", most=loss_bound, must=True)
        norm = float(np.linalg.norm(update - reference[1]) / np.linalg.norm(reference[1]))
        rows.add(f"{name} against CPU fp32, {steps} steps: update", norm, most=update_bound, must=True)
    rows.add("bits that differ after a restart", _restart(where, toy), most=0.0, must=True)


def losses(made: LocalTrainer, drawn: Sequence[Batch]) -> list[float]:
    """One step per batch; returns each step's loss."""
    return [made.run([batch], lambda _: RATE).loss_sum for batch in drawn]


def _restart(where: str, toy: bool) -> float:
    """Parameters that differ between a run of 2n steps and one that was restarted from a checkpoint after n."""
    shape, half = PRESETS["nano"] if toy else PRESETS["micro"], 3 if toy else 10
    layout, initial = start(shape)
    drawn = batches(shape, steps=2 * half)

    def fresh() -> LocalTrainer:
        return LocalTrainer(shape, layout, TrainingConfig(compile="off"), threads=2, device=where)

    whole = fresh()
    whole.write(initial)
    losses(whole, drawn[:half])
    parameters, moments = whole.read(), whole.optimizer_state()
    losses(whole, drawn[half:])
    again = fresh()
    again.write(parameters)
    again.load_optimizer_state(moments)
    losses(again, drawn[half:])
    return float(np.count_nonzero(whole.read().view(np.uint32) != again.read().view(np.uint32)))
