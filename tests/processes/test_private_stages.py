"""DP-SGD under DeepSpeed held against brute force: two processes of this machine, without Ray."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from benchmarks.zero_group import PRIVATE, batches, in_group, private, start, training
from worldlm_ray.model.shape import PRESETS
from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.training.local import LocalTrainer

pytestmark = [pytest.mark.slow, pytest.mark.long]

SHAPE, RECORDS = PRESETS["nano"], 8
SIZES = [0, 1, 5, 8, 21]
"""Poisson batches of 8 expected records: none, fewer than workers, uneven, as many as expected, several parts."""
OFFLOADED = {"offload_optimizer": True}


@lru_cache
def brute_force(size: int) -> Flat:
    """The sum of clipped per-record gradients, one record after the other, over the expected number of records."""
    layout, initial = start(SHAPE)
    plain = LocalTrainer(SHAPE, layout, training(0, grad_clip=0.0), threads=1, device="cpu")
    plain.write(initial)
    [(inputs, targets)] = batches(SHAPE, steps=1, size=size, seed=size)
    total = np.zeros(layout.size, np.float64)
    for record in range(size):
        plain.step(inputs[record : record + 1], targets[record : record + 1], 0.0)
        gradient = plain.gradient.double().numpy()
        total += gradient * min(1.0, PRIVATE.max_grad_norm / np.linalg.norm(gradient))
    return (total / RECORDS).astype(np.float32)


@pytest.mark.parametrize(
    ("stage", "changes"),
    [(0, {}), (1, {}), (2, {}), (3, {}), (2, OFFLOADED), (3, OFFLOADED)],
    ids=["0", "1", "2", "3", "2-offloaded", "3-offloaded"],
)
def test_a_private_stage_clips_like_brute_force_and_adds_the_noise_it_promised(
    stage: int, changes: dict[str, Any]
) -> None:
    first, second = in_group(private, stage, "nano", SIZES, {"batch_size": RECORDS, **changes})
    for size, gradient in zip(SIZES, first["gradients"], strict=True):
        np.testing.assert_allclose(gradient, brute_force(size), atol=1e-6, rtol=0.0, err_msg=f"{size} records")
    np.testing.assert_allclose(first["with_bad"], first["without_bad"], atol=1e-7, rtol=0.0)
    expected = PRIVATE.max_grad_norm / RECORDS  # noise multiplier 1
    for noise in first["noised"]:
        assert float(noise.std()) == pytest.approx(expected, rel=0.01)
        assert abs(float(noise.mean())) < 5 * expected / len(noise) ** 0.5
        assert abs(float((noise**4).mean()) / float((noise**2).mean()) ** 2 - 3.0) < 0.1
    assert abs(np.corrcoef(first["noised"][0], first["noised"][1])[0, 1]) < 0.02
    assert np.array_equal(first["noised"][0], second["noised"][0])  # workers agree on what they step by
