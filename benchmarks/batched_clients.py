"""Eight small clients of one process: gradients of a step one client after the other, against all stacked by vmap.

Stacked, eight matrix products become one batched product. The benchmark says what that would bring to simulations
with many small clients, on this machine's CPU (one thread) and on its GPU if there is one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, stack_module_state, vmap

from worldlm_ray.model.decoder import Decoder
from worldlm_ray.model.shape import PRESETS

CLIENTS, ROWS, STEPS, PAIRS = 8, 16, 5, 7


def run(devices: Sequence[str] = (), presets: Sequence[str] = ("nano", "micro")) -> dict[str, Any]:
    """Time both ways in turn, and print the ratios.

    Args:
        devices: the CPU and a GPU if there is one, unless given.
        presets: sizes of the models.
    """
    rows = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    print(f"{'preset':8} {'device':6} {'one by one, s':>14} {'stacked, s':>11} {'times as fast':>14}")
    for device in devices or ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        for preset in presets:
            models, tokens = _clients(preset, device)
            stacked = _stacked(models)
            single_step, stacked_step = partial(_one_by_one, models, tokens), partial(stacked, tokens)
            pairs = [(_time(single_step), _time(stacked_step)) for _ in range(PAIRS)]
            single, batched = (statistics.median(times) / STEPS for times in zip(*pairs, strict=True))
            ratio = statistics.median(a / b for a, b in pairs)
            rows.append({"preset": preset, "device": device, "ratio": ratio})
            print(f"{preset:8} {device:6} {single:14.3f} {batched:11.3f} {ratio:14.2f}", flush=True)
    torch.set_num_threads(threads)
    return {"rows": rows}


def _clients(preset: str, device: str) -> tuple[list[Decoder], Tensor]:
    """Models with weights from different seeds, and a batch for each [clients, rows, context + 1]."""
    shape, models = PRESETS[preset], []
    for seed in range(CLIENTS):
        torch.manual_seed(seed)
        models.append(Decoder(shape).to(device))
    return models, torch.randint(shape.vocab_size, (CLIENTS, ROWS, shape.context + 1), device=device)


def _one_by_one(models: list[Decoder], tokens_CBT: Tensor) -> None:
    for model, tokens_BT in zip(models, tokens_CBT, strict=True):
        model.zero_grad()
        model.loss(tokens_BT[:, :-1], tokens_BT[:, 1:]).backward()


def _stacked(models: list[Decoder]) -> Any:
    parameters, buffers = stack_module_state(list(models))

    def loss(parameters: Any, buffers: Any, tokens_BT: Tensor) -> Tensor:
        logits = functional_call(models[0], (parameters, buffers), (tokens_BT[:, :-1],))
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens_BT[:, 1:].flatten())

    gradients = vmap(grad(loss))
    return lambda tokens_CBT: gradients(parameters, buffers, tokens_CBT)


def _time(work: Any) -> float:
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(STEPS):
        work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
