"""The device, its peak, its clock, and sizes that fit a dry run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from worldlm_ray.model.shape import PRESETS, ModelShape

VOCABULARY = 50_432
"""Tokens of the models of 75m and more: a usual vocabulary of 50k, as a multiple of 128."""
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40": 181e12, "RTX 4090": 165e12}
"""Dense bf16 operations per second by the makers' data sheets."""


def device(toy: bool) -> str:
    """`cuda`, or `cpu` at toy size.

    Raises:
        RuntimeError: torch sees no GPU.
    """
    if toy:
        return "cpu"
    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no GPU: add --dry-run for the CPU at toy size")
    return "cuda"


def shape_of(preset: str, toy: bool) -> ModelShape:
    """A preset with a vocabulary of 50k; at toy size two small layers."""
    shape = PRESETS["nano"] if toy else replace(PRESETS[preset], vocab_size=VOCABULARY)
    return replace(shape, layers=2) if toy else shape


def wait(device: str) -> None:
    """Wait until the device has done everything that was asked of it."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], *, device: str, repeats: int) -> float:
    """Median wall time of a call, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        wait(device)
        began = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def flops_per_token(shape: ModelShape, parameters: int) -> float:
    """Operations of a training step per token: 6 per parameter that multiplies, and attention's.

    Source: Chowdhery et al., PaLM, arXiv 2204.02311, appendix B. Embeddings are looked up, not multiplied.
    """
    multiplied = parameters - shape.vocab_size * shape.hidden_size
    return 6.0 * multiplied + 12.0 * shape.layers * shape.hidden_size * shape.context


def peak_flops() -> float | None:
    """Of the card, if it is known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((flops for card, flops in PEAK_FLOPS.items() if card in name), None)
