"""Two workers of a ZeRO client without Ray: processes of this machine that join over loopback."""

from __future__ import annotations

import gc
import os
import pickle
import socket
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from worldlm_ray.config.schema import PrivacyConfig, TrainingConfig
from worldlm_ray.model.initial import initial_parameters
from worldlm_ray.model.shape import PRESETS, ModelShape
from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.tensors.layout import Layout
from worldlm_ray.tensors.targets import IGNORED
from worldlm_ray.training.deepspeed_config import worker_bytes
from worldlm_ray.training.trainer import MOMENTS, Batch

WORKERS = 2
RATE = 3e-3
PRIVATE = PrivacyConfig(unit="record", noise_multiplier=1.0, max_grad_norm=0.5)
PARTITION_ALL = {
    "zero_optimization": {
        name: 0
        for name in (
            "stage3_param_persistence_threshold",
            "stage3_max_live_parameters",
            "stage3_max_reuse_distance",
            "stage3_prefetch_bucket_size",
        )
    }
}
"""Stage 3 keeps small parameters gathered unless it is told not to."""


def training(stage: int, **changes: Any) -> TrainingConfig:
    """Settings of a client at a stage, with everything partitioned that can be."""
    return TrainingConfig(zero_stage=stage, deepspeed=PARTITION_ALL if stage == 3 else {}, precision="fp32", **changes)


def batches(shape: ModelShape, *, steps: int, size: int = 16, seed: int = 0) -> list[Batch]:
    """Text that can be learned: mostly a fixed successor of every byte."""
    generator = np.random.default_rng(seed)
    successor = generator.integers(0, shape.vocab_size, shape.vocab_size)
    drawn: list[Batch] = []
    for _ in range(steps):
        tokens = generator.integers(0, shape.vocab_size, (size, shape.context + 1))
        follows = generator.random(tokens.shape) < 0.8
        for now in range(shape.context):
            chosen = follows[:, now + 1]
            tokens[chosen, now + 1] = successor[tokens[chosen, now]]
        drawn.append((tokens[:, :-1].copy(), tokens[:, 1:].copy()))
    return drawn


def with_prompts(drawn: list[Batch]) -> list[Batch]:
    """The batches with ignored targets at the beginning of each sequence: the more, the later its row."""
    for _, targets in drawn:
        for row, target_T in enumerate(targets):
            target_T[: row * len(target_T) // len(targets)] = IGNORED
    return drawn


def start(shape: ModelShape) -> tuple[Layout, Flat]:
    """A layout with a key layer, and the initial parameters."""
    layout = shape.layout(["lm_head.*"])
    return layout, initial_parameters(shape, layout, seed=0)


def in_group(work: Callable[..., Any], *args: Any, workers: int = WORKERS) -> list[Any]:
    """Call `work(*args)` in every process of a new group; returns the results by rank."""
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        start_processes(_member, (workers, port, folder, work, args), nprocs=workers, start_method=_start_method())
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(workers)]


def _start_method() -> str:
    """Without a GPU, members are forked from a server that has imported what takes seconds, once for all groups."""
    if torch.cuda.is_available():
        return "spawn"
    late = "torch._inductor.compile_fx"  # what an engine of DeepSpeed's imports when it begins
    get_context("forkserver").set_forkserver_preload(["worldlm_ray.training.zero", "opacus", late])
    return "forkserver"


def _member(rank: int, workers: int, port: int, folder: str, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(workers),
    }
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", rank=rank, world_size=workers)
    result = work(*args)
    (Path(folder) / str(rank)).write_bytes(pickle.dumps(result))
    dist.barrier()
    os._exit(0)  # gloo's threads now and then abort a process that takes its group apart


# ---- what members do ---------------------------------------------------------------------------------------------


def train(stage: int, preset: str, steps: int, changes: dict[str, Any], prompts: bool = False) -> dict[str, Any]:
    """Train, then go on in two ways: as it is, and in a fresh engine that was given parameters and moments."""
    from worldlm_ray.training.zero import ZeroWorker

    shape = PRESETS[preset]
    layout, initial = start(shape)
    settings = training(stage, **changes)
    drawn = batches(shape, steps=steps + 3)
    drawn = with_prompts(drawn) if prompts else drawn
    worker = ZeroWorker(shape, layout, settings, threads=1)
    worker.write(initial)
    losses = [worker.run([batch], [RATE]) for batch in drawn[:steps]]
    nats, tokens = worker.evaluate([(inputs[:3], targets[:3]) for inputs, targets in drawn[steps:]])
    theta = _whole(worker.read(), layout)
    moments = {name: _whole(worker.moments(name), layout) for name in MOMENTS}
    count = worker.optimizer_steps
    text = worker.sample(np.array([1, 2, 3]), tokens=5, temperature=0.8, seed=0)
    on = [worker.run([batch], [RATE]) for batch in drawn[steps:]]
    again = ZeroWorker(shape, layout, settings, threads=1)
    again.write(theta)
    for name in MOMENTS:
        again.set_moments(name, moments[name])
    again.optimizer_steps = count
    restored = [again.run([batch], [RATE]) for batch in drawn[steps:]]
    return {
        "losses": losses,
        "evaluated": nats / tokens,
        "theta": theta,
        "moments": moments,
        "steps": count,
        "text": text,
        "on": on,
        "restored": restored,
        "theta_on": _whole(worker.read(), layout),
        "theta_restored": _whole(again.read(), layout),
    }


def private(stage: int, preset: str, sizes: list[int], changes: dict[str, Any]) -> dict[str, Any]:
    """Gradients of private steps on batches of these sizes without noise, and of an empty one with noise 1.

    A first moment after one step from zero is (1 - beta) times the gradient that the optimizer was given.
    """
    from worldlm_ray.training.zero import ZeroWorker

    shape = PRESETS[preset]
    layout, initial = start(shape)
    settings = training(stage, **changes)
    found: dict[str, Any] = {}
    for noise in (0.0, 1.0):
        worker = ZeroWorker(shape, layout, settings, threads=1, privacy=PRIVATE, noise=noise)
        worker.write(initial)
        gradients = []
        for size in sizes if noise == 0.0 else [0, 0]:
            worker.forget()
            [batch] = batches(shape, steps=1, size=size, seed=size)
            worker.run([batch], [0.0])
            gradients.append(_whole(worker.moments("exp_avg"), layout) / (1.0 - settings.betas[0]))
        found["noised" if noise else "gradients"] = gradients
        if noise == 0.0:
            found["with_bad"], found["without_bad"] = _beside_a_bad_record(worker, shape, layout, initial)
    return found


def _beside_a_bad_record(worker: Any, shape: ModelShape, layout: Layout, initial: Flat) -> list[Flat]:
    """First moments after a batch with a record whose gradient is not finite, and after the same without it."""
    poisoned = initial.copy()
    layout.views(poisoned)["model.embed_tokens.weight"][255] = np.inf
    worker.write(poisoned)
    [(inputs, targets)] = batches(shape, steps=1, size=5)
    inputs[inputs == 255], targets[targets == 255] = 254, 254
    bad = inputs.copy()
    bad[2, 7] = 255
    found = []
    for chosen in (bad, inputs):
        worker.forget()
        kept = np.arange(5) if chosen is bad else np.array([0, 1, 3, 4])
        worker.run([(chosen[kept], targets[kept])], [0.0])
        found.append(_whole(worker.moments("exp_avg"), layout))
    return found


def memory(stage: int, preset: str) -> dict[str, float]:
    """Bytes of live tensors at the height of a step, beside ZeRO's arithmetic; and what a gather takes on top."""
    from dataclasses import replace

    from worldlm_ray.training.zero import ZeroWorker

    shape = replace(PRESETS[preset], context=16)  # so that activations do not matter
    layout, initial = start(shape)
    settings = training(stage, batch_size=WORKERS)
    worker = ZeroWorker(shape, layout, settings, threads=1)
    worker.write(initial)
    [batch] = batches(shape, steps=1, size=WORKERS)
    worker.run([batch], [RATE])
    before = [weakref.ref(thing) for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    gc.freeze()  # else each look would go through all that was ever imported
    parameters = list(worker.engine.module.parameters())
    heights = [0]

    def look(*_: Any) -> None:
        tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
        tensors += [thing for each in before if (thing := each()) is not None]
        heights.append(_bytes([*tensors, *(p.grad for p in parameters if p.grad is not None)]))

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(look)
    worker.run([batch], [RATE])
    expected = worker_bytes(settings, parameters=layout.size, workers=WORKERS, cuda=False, stage=stage)
    largest = max(4 * (span.where.stop - span.where.start) for span in worker.spans)
    with _height_of_memory() as read:
        for layer in worker.read():
            del layer
    with _height_of_memory() as write:
        worker.write(initial)
    return {
        "model_bytes": 4 * layout.size,
        "layer_bytes": largest,
        "measured": max(heights),
        "expected": expected.total,
        "read_extra": read[0],
        "write_extra": write[0],
    }


def _whole(layers: Iterator[Flat], layout: Layout) -> Flat:
    """The layers as one buffer on every worker, which tests may have and a client may not."""
    found: list[Any] = [None]
    gathered = list(layers)
    if dist.get_rank() == 0:
        found = [np.concatenate(gathered)]
    dist.broadcast_object_list(found, src=0)
    [whole] = found
    return np.asarray(whole)


def _bytes(tensors: list[torch.Tensor]) -> int:
    """Bytes of the tensors' storages, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.device.type == "cpu"}
    return sum(storages.values())


@contextmanager
def _height_of_memory() -> Iterator[list[int]]:
    """Bytes by which this process's resident memory rose at most, in a list of one number."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before, result = _status("VmRSS"), [0]
    yield result
    result[0] = max(_status("VmHWM") - before, 0)


def _status(name: str) -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return 1024 * int(line.split()[1])
