"""Targets without a loss: they change no loss, no gradient and no count."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from support.small_models import KEYS

from worldlm_ray.config.schema import TrainingConfig
from worldlm_ray.experiments.council_scores import log_probabilities
from worldlm_ray.model.decoder import cross_entropy
from worldlm_ray.model.initial import initial_parameters
from worldlm_ray.model.shape import ModelShape
from worldlm_ray.privacy.dp_sgd import RecordGradients
from worldlm_ray.tensors.targets import IGNORED, counted
from worldlm_ray.training.local import LocalTrainer

TARGETS = np.array([[3, IGNORED, 1, IGNORED], [IGNORED, IGNORED, IGNORED, 2], [1, 2, 3, 0], [0, IGNORED, 1, 1]])


def a_trainer(shape: ModelShape, **settings: Any) -> LocalTrainer:
    layout = shape.layout(KEYS)
    training = TrainingConfig(batch_size=4, weight_decay=0.0, grad_clip=0.0, **settings)
    trainer = LocalTrainer(shape, layout, training, threads=1)
    trainer.write(initial_parameters(shape, layout, seed=0))
    return trainer


def a_batch(shape: ModelShape) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    inputs = np.random.default_rng(0).integers(0, shape.vocab_size, (4, 4))
    return inputs, TARGETS


def test_a_loss_by_hand() -> None:
    logits_BTV = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.25, 0.5, 0.25]]]))
    targets_BT = torch.tensor([[0, IGNORED, 2]])
    nats = math.log(2.0) + math.log(4.0)
    assert float(cross_entropy(logits_BTV, targets_BT)) == pytest.approx(nats / 2)
    assert float(cross_entropy(logits_BTV, targets_BT, reduction="sum")) == pytest.approx(nats)
    each = cross_entropy(logits_BTV, targets_BT, reduction="none").tolist()
    assert each == pytest.approx([math.log(2.0), 0.0, math.log(4.0)])


def test_a_mean_over_nothing_is_zero_and_has_no_gradient() -> None:
    logits_BTV = torch.zeros(1, 2, 3, requires_grad=True)
    loss = cross_entropy(logits_BTV, torch.full((1, 2), IGNORED))
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == 0.0
    assert logits_BTV.grad is not None
    assert not logits_BTV.grad.any()


def test_a_mean_of_all_targets_has_the_bits_of_torchs() -> None:
    torch.manual_seed(0)
    logits_BTV, targets_BT = torch.randn(3, 7, 11), torch.randint(0, 11, (3, 7))
    torchs = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())
    assert torch.equal(cross_entropy(logits_BTV, targets_BT), torchs)


def test_an_evaluation_counts_what_it_sums(shape: ModelShape) -> None:
    trainer, (inputs, targets) = a_trainer(shape), a_batch(shape)
    nats, tokens = trainer.evaluate([(inputs, targets)])
    log_p_T = log_probabilities(trainer, [(inputs, targets)])
    assert tokens == counted(targets) == len(log_p_T) == 10
    assert nats == pytest.approx(-log_p_T.sum(), rel=1e-5)


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_of_a_batch_weigh_as_much_as_their_counted_targets(shape: ModelShape, parts: int) -> None:
    whole, cut = a_trainer(shape), a_trainer(shape, accumulation_steps=parts)
    batch = a_batch(shape)
    losses = [float(trainer.step(*batch, 0.0)) for trainer in (whole, cut)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    torch.testing.assert_close(cut.gradient, whole.gradient, rtol=1e-4, atol=1e-7)


def test_a_batch_without_a_counted_target_changes_nothing(shape: ModelShape) -> None:
    trainer, (inputs, targets) = a_trainer(shape, accumulation_steps=2), a_batch(shape)
    before = trainer.read()
    assert float(trainer.step(inputs, np.full_like(targets, IGNORED), 0.1)) == 0.0
    assert np.array_equal(trainer.read(), before)


def test_a_private_record_is_averaged_over_all_its_positions(shape: ModelShape) -> None:
    trainer, (inputs, targets) = a_trainer(shape), a_batch(shape)
    records = RecordGradients(trainer.model.root, max_grad_norm=1.0, mode="hooks")
    _, losses_B = records.norms(torch.from_numpy(inputs), torch.from_numpy(targets))
    each = [trainer.evaluate([(inputs[[row]], targets[[row]])])[0] / targets.shape[1] for row in range(len(inputs))]
    assert losses_B.tolist() == pytest.approx(each, rel=1e-5)
