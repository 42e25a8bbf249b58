"""What two of DeepSpeed's workers do with adapters: pickled by name to the processes of a group."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.zero_group import PRIVATE, RATE, batches, training
from worldlm_ray.model.pretrained_shape import PretrainedShape
from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.tensors.layout import Layout


def train(stage: int, shape: PretrainedShape, layout: Layout, initial: Flat, steps: int) -> dict[str, Any]:
    """Losses of the steps and the adapters after them."""
    from worldlm_ray.training.zero import ZeroWorker

    worker = ZeroWorker(shape, layout, training(stage), threads=1)
    worker.write(initial)
    losses = [worker.run([batch], [RATE]) for batch in batches(shape, steps=steps)]  # type: ignore[arg-type]
    return {"losses": losses, "theta": np.concatenate(list(worker.read()))}


def private(stage: int, shape: PretrainedShape, layout: Layout, initial: Flat, records: int) -> Flat:
    """The gradient of one private step without noise: a first moment from zero is (1 - beta) times that."""
    from worldlm_ray.training.zero import ZeroWorker

    settings = training(stage, batch_size=records)
    worker = ZeroWorker(shape, layout, settings, threads=1, privacy=PRIVATE, noise=0.0)
    worker.write(initial)
    [batch] = batches(shape, steps=1, size=records)  # type: ignore[arg-type]
    worker.run([batch], [0.0])
    moments: Flat = np.concatenate(list(worker.moments("exp_avg"))) / (1.0 - settings.betas[0])
    return moments
