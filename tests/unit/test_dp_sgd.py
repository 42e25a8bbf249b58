"""Clipped gradients against brute force, noise, and the choice of records."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.worlds import client
from torch import Tensor, nn
from torch.nn import functional

from worldlm_ray.config.schema import PrivacyConfig, TrainingConfig
from worldlm_ray.data import prepare
from worldlm_ray.errors import PrivacyError
from worldlm_ray.model.decoder import Decoder, cross_entropy
from worldlm_ray.model.initial import initial_parameters
from worldlm_ray.model.shape import ModelShape
from worldlm_ray.plan.plan import Plan
from worldlm_ray.privacy.dp_sgd import Mode, RecordGradients, self_test
from worldlm_ray.training.private import PrivateTrainer

Tiny = Callable[..., Plan]
PRIVATE = PrivacyConfig(unit="record", noise_multiplier=1.0, max_grad_norm=0.3)
MODES: list[Mode] = ["ghost", "hooks"]


def text(shape: ModelShape, records: int) -> tuple[Any, Any]:
    drawn = np.random.default_rng(0).integers(0, shape.vocab_size, (records, shape.context + 1))
    return drawn[:, :-1].copy(), drawn[:, 1:].copy()


def trainer(shape: ModelShape, *, mode: Mode = "hooks", noise: float = 0.0, batch_size: int = 6) -> PrivateTrainer:
    privacy = replace(PRIVATE, grad_sample_mode=mode)
    layout = shape.layout([])
    settings = TrainingConfig(batch_size=batch_size, weight_decay=0.0)
    made = PrivateTrainer(shape, layout, settings, privacy, noise=noise, threads=1, device="cpu")
    made.write(initial_parameters(shape, layout, seed=0))
    return made


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("records", [0, 1, 6, 29])  # 29 is more than one pass takes
def test_a_step_is_that_of_brute_force_clipping(shape: ModelShape, mode: Mode, records: int) -> None:
    private = trainer(shape, mode=mode)
    inputs, targets = text(shape, records)
    model = Decoder(shape)
    model.load_state_dict({name: value.clone() for name, value in private.model.state_dict().items()})
    expected = torch.zeros(private.layout.size)
    clipped = 0
    for index in range(records):
        loss = model.loss(torch.from_numpy(inputs[index : index + 1]), torch.from_numpy(targets[index : index + 1]))
        flat = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        clipped += float(flat.norm()) > PRIVATE.max_grad_norm
        expected += flat * min(1.0, PRIVATE.max_grad_norm / float(flat.norm()))
    private.step(inputs, targets, 0.0)
    in_model_order = torch.cat([p.grad.flatten() for p in private.model.parameters() if p.grad is not None])
    torch.testing.assert_close(in_model_order, expected / 6, atol=1e-6, rtol=0.0)
    assert records == 0 or clipped


def test_the_noise_has_its_standard_deviation(shape: ModelShape) -> None:
    private = trainer(shape, noise=2.0)
    empty = text(shape, 0)
    drawn = torch.cat([private.gradient.clone() for _ in range(20) if private.step(*empty, 0.0) is not None])
    assert float(drawn.std()) == pytest.approx(2.0 * 0.3 / 6, rel=0.01)
    assert abs(float(drawn.mean())) < 5 * 0.1 / math.sqrt(len(drawn))


def test_two_trainers_never_draw_the_same_noise(shape: ModelShape) -> None:
    one, other = trainer(shape, noise=1.0), trainer(shape, noise=1.0)
    one.step(*text(shape, 0), 0.0)
    other.step(*text(shape, 0), 0.0)
    assert not torch.equal(one.gradient, other.gradient)


@pytest.mark.parametrize("mode", MODES)
def test_a_record_that_is_not_finite_counts_for_nothing(shape: ModelShape, mode: Mode) -> None:
    private = trainer(shape, mode=mode)
    inputs, targets = text(shape, 4)
    private.step(inputs[:3], targets[:3], 0.0)
    without = private.gradient.clone()
    bad = int(inputs[3, 0])
    inputs[:3][inputs[:3] == bad] = (bad + 1) % shape.vocab_size
    targets[:3][targets[:3] == bad] = (bad + 1) % shape.vocab_size
    private.step(inputs[:3], targets[:3], 0.0)
    without = private.gradient.clone()
    with torch.no_grad():
        private.model.get_submodule("model.embed_tokens").weight[bad] = math.inf  # type: ignore[index]
    private.step(inputs, targets, 0.0)
    assert torch.isfinite(private.gradient).all()
    torch.testing.assert_close(private.gradient, without, atol=1e-6, rtol=0.0)


class Tied(Decoder):
    """Uses the embedding's weight as a function's argument, which no hook can see."""

    def forward(self, tokens_BT: Tensor) -> Tensor:
        hidden_BTC = self.model(tokens_BT)
        return self.lm_head(hidden_BTC) + functional.linear(hidden_BTC, self.model.embed_tokens.weight)


class Twice(Decoder):
    """Runs its head twice."""

    def forward(self, tokens_BT: Tensor) -> Tensor:
        hidden_BTC = self.model(tokens_BT)
        return self.lm_head(hidden_BTC) + self.lm_head(-hidden_BTC) * 0.5


@pytest.mark.parametrize("mode", MODES)
def test_the_self_test_passes_the_decoder_and_finds_a_functionally_tied_weight(shape: ModelShape, mode: Mode) -> None:
    self_test(Decoder(shape), vocab_size=shape.vocab_size, length=8, mode=mode)
    with pytest.raises(PrivacyError, match="a weight is used outside its module"):
        self_test(Tied(shape), vocab_size=shape.vocab_size, length=8, mode=mode)


def test_models_without_known_per_record_gradients_are_refused(shape: ModelShape) -> None:
    with pytest.raises(PrivacyError, match="more or less than once"):
        self_test(Twice(shape), vocab_size=shape.vocab_size, length=8, mode="hooks")
    shared = Decoder(shape)
    shared.lm_head.weight = shared.model.embed_tokens.weight
    with pytest.raises(PrivacyError, match="shared by 2 modules"):
        RecordGradients(shared, max_grad_norm=1.0, mode="hooks")
    with pytest.raises(PrivacyError, match=r"\(BatchNorm1d\) has no rule"):
        RecordGradients(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), max_grad_norm=1.0, mode="hooks")


def test_losses_of_records_are_means_over_their_tokens(shape: ModelShape) -> None:
    private = trainer(shape)
    inputs, targets = (torch.from_numpy(ids) for ids in text(shape, 3))
    _, loss_B = private._records.norms(inputs, targets)
    expected = [cross_entropy(private.model(inputs[i : i + 1]), targets[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(loss_B, torch.stack(expected).detach())


def test_poisson_batches_take_every_record_with_the_same_probability(tmp_path: Path, tiny: Tiny) -> None:
    plan = tiny([client("a", tmp_path, 1)])
    dataset = prepare(plan.root.clients[0].settings.data, context=16, key="data")
    dataset = replace(dataset, train=np.arange(17 * 200 + 5, dtype=np.uint16))  # no two records are alike
    count, rate = dataset.records(context=16), 0.05
    generator = np.random.default_rng(0)
    sizes, seen = [], np.zeros(count)
    records = {dataset.train[i * 17 : i * 17 + 16].tobytes(): i for i in range(count)}
    for inputs, targets in dataset.poisson_batches(generator, steps=400, rate=rate, context=16):
        sizes.append(len(inputs))
        np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
        for row in inputs:
            seen[records[row.astype(dataset.train.dtype).tobytes()]] += 1
    assert np.mean(sizes) == pytest.approx(count * rate, rel=0.05)
    assert np.var(sizes) == pytest.approx(count * rate * (1 - rate), rel=0.2)
    assert seen.min() > 0.3 * 400 * rate
    assert seen.max() < 2.5 * 400 * rate


def test_an_empty_batch_is_possible(tmp_path: Path, tiny: Tiny) -> None:
    plan = tiny([client("a", tmp_path, 1)])
    dataset = prepare(plan.root.clients[0].settings.data, context=16, key="data")
    [(inputs, targets)] = dataset.poisson_batches(np.random.default_rng(0), steps=1, rate=0.0, context=16)
    assert inputs.shape == targets.shape == (0, 16)
