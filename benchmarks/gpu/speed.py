"""Tokens per second and MFU of a client, against the best bare PyTorch loop that we can write."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.card import device, flops_per_token, peak_flops, seconds, shape_of
from benchmarks.gpu.rows import Rows
from benchmarks.zero_group import RATE, batches, start
from worldlm_ray.config.schema import TrainingConfig
from worldlm_ray.model.decoder import Decoder
from worldlm_ray.model.shape import ModelShape
from worldlm_ray.training.local import LocalTrainer
from worldlm_ray.training.trainer import Batch

ROWS_OF = {"75m": 64, "125m": 32, "250m": 24, "400m": 12, "1b": 8}
"""Sequences per step that fit into 78 GiB with room."""
PAIRS, STEPS = 3, 10
WITH_MFU = ("400m", "1b")


def measure(rows: Rows, toy: bool) -> None:
    """Pairs of both loops on the same batches, size by size; the sizes with a target come early."""
    for preset in ("75m",) if toy else ("75m", "400m", "1b", "125m", "250m"):
        _one_size(rows, preset, toy)
        gc.collect()
        if not toy:
            rows.add(f"{preset}: memory at most", torch.cuda.max_memory_allocated() / 2**30, "GiB")
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def _one_size(rows: Rows, preset: str, toy: bool) -> None:
    where, shape = device(toy), shape_of(preset, toy)
    drawn = batches(shape, steps=2 if toy else STEPS, size=4 if toy else ROWS_OF[preset])
    tokens = sum(inputs.size for inputs, _ in drawn)
    training = TrainingConfig(compile="off" if toy else "on", precision="fp32" if toy else "bf16")
    layout, initial = start(shape)
    made = LocalTrainer(shape, layout, training, threads=2, device=where)
    made.write(initial)

    def client() -> None:
        made.run(drawn, lambda _: RATE)

    loops = {"client": client, "bare": bare_loop(shape, drawn, training, where)}
    if not toy:  # raises where the flash kernel cannot take these shapes
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            client()
    pairs = [
        {name: seconds(loop, device=where, repeats=1) for name, loop in loops.items()}
        for _ in range(1 if toy else PAIRS)
    ]
    speed = {name: tokens / statistics.median(pair[name] for pair in pairs) for name in loops}
    ratio = statistics.median(pair["bare"] / pair["client"] for pair in pairs)
    rows.add(f"{preset}: client", speed["client"], "tokens/s")
    rows.add(f"{preset}: bare loop", speed["bare"], "tokens/s")
    rows.add(f"{preset}: client over bare loop", ratio, least=None if toy else 0.97)
    peak = None if toy else peak_flops()
    if peak is not None:
        mfu = speed["client"] * flops_per_token(shape, layout.size) / peak
        rows.add(f"{preset}: MFU", mfu, least=0.45 if preset in WITH_MFU else None)


def bare_loop(shape: ModelShape, drawn: list[Batch], training: TrainingConfig, where: str) -> Callable[[], None]:
    """The loop that an engineer would write for speed: autocast, fused AdamW, flash attention, torch.compile."""
    torch.manual_seed(0)
    model = Decoder(shape).to(where)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": training.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=RATE,
        betas=(training.betas[0], training.betas[1]),
        fused=True,
    )
    loss_of = torch.compile(model.loss, dynamic=False) if training.compile == "on" else model.loss
    bf16 = training.precision == "bf16"

    def train() -> None:
        for inputs, targets in drawn:
            pair = [torch.from_numpy(ids) for ids in (inputs, targets)]
            if where == "cuda":
                pair = [ids.pin_memory().to(where, non_blocking=True) for ids in pair]
            with torch.autocast(where, dtype=torch.bfloat16) if bf16 else nullcontext():
                loss = loss_of(*pair)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), training.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return train
