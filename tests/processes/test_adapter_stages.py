"""Adapters of a pre-trained model under DeepSpeed, held against a plain client and against brute force."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.adapter_stages import private, train
from support.pretrained import save_pretrained

from benchmarks.zero_group import PRIVATE, RATE, batches, in_group, training
from worldlm_ray.config.schema import LoraConfig, ModelConfig
from worldlm_ray.huggingface import read_object
from worldlm_ray.model.pretrained_shape import PretrainedShape
from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.tensors.layout import Layout
from worldlm_ray.training.local import LocalTrainer

pytest.importorskip("peft")
pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.filterwarnings("ignore")]
STEPS, RECORDS = 6, 4


def made(folder: Path) -> tuple[PretrainedShape, Layout, Flat]:
    """A small model, its layout, and adapters that change it already."""
    from worldlm_ray.model.pretrained import read_shape

    base = save_pretrained(folder / "base")
    model = ModelConfig(backend="transformers", trainable="lora", lora=LoraConfig(r=4), context=16)
    file = base / "config.json"
    shape, _, _ = read_shape(read_object(file), model, file=file, folder=base, cache_dir=str(folder / "cache"))
    layout = shape.layout([])
    values = np.random.default_rng(0).normal(0.0, 0.1, layout.size).astype(np.float32)
    return shape, layout, values


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_workers_train_adapters_as_a_plain_client_does(tmp_path: Path, stage: int) -> None:
    shape, layout, initial = made(tmp_path)
    plain = LocalTrainer(shape, layout, training(0), threads=1, device="cpu")
    plain.write(initial)
    drawn = batches(shape, steps=STEPS)  # type: ignore[arg-type]
    losses = [plain.run([batch], lambda _: RATE).loss_sum for batch in drawn]
    first, second = in_group(train, stage, shape, layout, initial, STEPS)
    assert first["losses"] == second["losses"]
    np.testing.assert_allclose(first["losses"], losses, atol=1e-5)
    np.testing.assert_allclose(first["theta"], plain.read(), atol=5e-5)
    assert np.abs(plain.read() - initial).max() > 1e-3


@pytest.mark.parametrize("stage", [1, 3])
def test_private_workers_clip_adapters_as_brute_force_does(tmp_path: Path, stage: int) -> None:
    shape, layout, initial = made(tmp_path)
    plain = LocalTrainer(shape, layout, training(0, grad_clip=0.0), threads=1, device="cpu")
    plain.write(initial)
    [(inputs, targets)] = batches(shape, steps=1, size=RECORDS)  # type: ignore[arg-type]
    total = np.zeros(layout.size)
    for record in range(RECORDS):
        plain.step(inputs[record : record + 1], targets[record : record + 1], 0.0)
        gradient = plain.gradient.double().numpy()
        total += gradient * min(1.0, PRIVATE.max_grad_norm / np.linalg.norm(gradient))
    found = in_group(private, stage, shape, layout, initial, RECORDS)
    np.testing.assert_allclose(found[0], total / RECORDS, atol=1e-6, rtol=0.0)
