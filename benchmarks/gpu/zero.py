"""DeepSpeed's stages 0 to 3 in one process on one device, with offloading and bf16, against the plain client."""

from __future__ import annotations

import os
import socket
import time
import warnings
from dataclasses import replace
from typing import Literal

import numpy as np
import torch.distributed as dist

from benchmarks.gpu.card import device, shape_of
from benchmarks.gpu.rows import Rows
from benchmarks.zero_group import RATE, batches, start, training
from worldlm_ray.training.local import LocalTrainer

LOSS_FP32, LOSS_BF16 = 1e-3, 0.05
"""Largest difference of a step's loss from the plain client's, nats per token: see correctness.py."""


def measure(rows: Rows, toy: bool) -> None:
    """The same batches through every stage."""
    warnings.simplefilter("ignore")
    _join(device(toy))
    _one_precision(rows, "fp32", LOSS_FP32, toy)
    if not toy:
        _one_precision(rows, "bf16", LOSS_BF16, toy)
    os._exit(0)  # gloo's threads now and then abort a process that takes its group apart


def _one_precision(rows: Rows, precision: Literal["fp32", "bf16"], bound: float, toy: bool) -> None:
    from worldlm_ray.training.zero import ZeroWorker

    where, shape = device(toy), shape_of("75m", toy)
    layout, initial = start(shape)
    drawn = batches(shape, steps=2 if toy else 20, size=4 if toy else 16)
    settings = replace(training(0), precision=precision, compile="off", batch_size=len(drawn[0][0]))
    plain = LocalTrainer(shape, layout, settings, threads=2, device=where)
    plain.write(initial)
    began = time.perf_counter()
    reference = [plain.run([batch], lambda _: RATE).loss_sum for batch in drawn]
    plain_s = time.perf_counter() - began
    del plain
    stages = [(stage, False) for stage in ((0, 3) if toy else range(4))] + ([] if toy else [(2, True)])
    for stage, is_offloaded in stages:
        staged = replace(training(stage), precision=precision, batch_size=settings.batch_size)
        staged = replace(staged, offload_optimizer=is_offloaded)
        worker = ZeroWorker(shape, layout, staged, threads=2, cuda=where == "cuda")
        worker.write(initial)
        began = time.perf_counter()
        losses = [worker.run([batch], [RATE]) for batch in drawn]
        took_s = time.perf_counter() - began
        name = f"stage {stage}{', optimizer offloaded' if is_offloaded else ''}, {precision}"
        gap = float(np.max(np.abs(np.subtract(losses, reference))))
        rows.add(f"{name}: loss against the plain client's", gap, "nats per token", most=bound, must=True)
        rows.add(f"{name}: time over the plain client's", took_s / plain_s)
        del worker


def _join(where: str) -> None:
    """A group of one process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "LOCAL_RANK": "0"}
    os.environ["WORLD_SIZE"] = "1"
    dist.init_process_group("nccl" if where == "cuda" else "gloo", rank=0, world_size=1)
