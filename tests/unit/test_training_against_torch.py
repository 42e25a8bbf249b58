"""Local training and its schedule, held against plain torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support.small_models import KEYS, batches

from worldlm_ray.config.schema import TrainingConfig
from worldlm_ray.model.decoder import Decoder
from worldlm_ray.model.initial import initial_parameters
from worldlm_ray.model.shape import ModelShape
from worldlm_ray.records import perplexity
from worldlm_ray.tensors.layout import Layout
from worldlm_ray.training.local import LocalTrainer
from worldlm_ray.training.schedule import learning_rate


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def layout(shape: ModelShape) -> Layout:
    return shape.layout(KEYS)


def trainer(shape: ModelShape, layout: Layout, *, seed: int = 0, **settings: Any) -> LocalTrainer:
    made = LocalTrainer(shape, layout, TrainingConfig(**settings), threads=1, device="cpu")
    made.write(initial_parameters(shape, layout, seed=seed))
    return made


@pytest.mark.parametrize("clip", [0.0, 0.05, 1e3])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_five_steps_equal_torchs_adamw(shape: ModelShape, layout: Layout, clip: float, decay: float) -> None:
    ours = trainer(shape, layout, grad_clip=clip, weight_decay=decay, betas=[0.9, 0.95])
    reference = Decoder(shape)
    start = layout.views(ours.read())
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.copy_(torch.from_numpy(start[name]))
    matrices = [p for p in reference.parameters() if p.ndim > 1]
    vectors = [p for p in reference.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=1.0,
        betas=(0.9, 0.95),
    )
    for step, (inputs, targets) in enumerate(batches(shape, 5)):
        rate = 1e-3 * (step + 1)
        optimizer.zero_grad()
        loss = reference.loss(torch.from_numpy(inputs), torch.from_numpy(targets))
        loss.backward()
        if clip:
            norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), clip)
            assert (float(norm) > clip) == (clip < 1)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        assert float(ours.step(inputs, targets, rate)) == pytest.approx(float(loss.detach()), abs=1e-6)
    found = layout.views(ours.read())
    for name, parameter in reference.named_parameters():
        np.testing.assert_allclose(found[name], parameter.detach().numpy(), rtol=0, atol=1e-6, err_msg=name)
        assert np.abs(found[name] - start[name]).max() > 1e-3, name


def test_decay_alone_shrinks_matrices_and_not_norms(shape: ModelShape, layout: Layout) -> None:
    ours = trainer(shape, layout, weight_decay=0.5)
    before = layout.views(ours.read())
    without = trainer(shape, layout, weight_decay=0.0)
    [(inputs, targets)] = batches(shape, 1)
    for one in (ours, without):
        one.step(inputs, targets, 0.1)
    with_decay, plain = layout.views(ours.read()), layout.views(without.read())
    for name, view in before.items():
        expected = plain[name] - (0.1 * 0.5 * view if view.ndim > 1 else 0.0)
        np.testing.assert_allclose(with_decay[name], expected, rtol=0, atol=1e-6, err_msg=name)


def test_a_run_counts_its_steps_tokens_and_losses(shape: ModelShape, layout: Layout) -> None:
    one, other = trainer(shape, layout), trainer(shape, layout)
    data = batches(shape, 3)
    result = one.run(data, lambda step: 1e-3 * (step + 1))
    losses = [float(other.step(*batch, 1e-3 * (step + 1))) for step, batch in enumerate(data)]
    assert (result.steps, result.tokens) == (3, 3 * 4 * shape.context)
    assert result.loss_sum == pytest.approx(sum(losses))
    assert result.learning_rate == pytest.approx(3e-3)
    assert one.read().tobytes() == other.read().tobytes()


def test_a_run_can_be_stopped_before_any_step(shape: ModelShape, layout: Layout) -> None:
    answers = iter([False, False, True])
    result = trainer(shape, layout).run(batches(shape, 5), lambda _: 1e-3, should_stop=lambda: next(answers))
    assert result.steps == 2


def test_training_on_a_repeated_text_lowers_the_loss(shape: ModelShape, layout: Layout) -> None:
    window = np.arange(shape.context + 1, dtype=np.int64) % 5
    batch = (np.tile(window[:-1], (4, 1)), np.tile(window[1:], (4, 1)))
    ours = trainer(shape, layout)
    first = ours.run([batch], lambda _: 1e-2).loss_sum
    ours.run([batch] * 40, lambda _: 1e-2)
    last = ours.run([batch], lambda _: 1e-2).loss_sum
    assert first == pytest.approx(math.log(shape.vocab_size), abs=0.1)
    assert last < 0.5


def test_equal_seeds_and_batches_give_equal_bits(shape: ModelShape, layout: Layout) -> None:
    one, other = trainer(shape, layout), trainer(shape, layout)
    for ours in (one, other):
        ours.run(batches(shape, 3), lambda _: 1e-3)
    assert one.read().tobytes() == other.read().tobytes()


def test_read_and_write_copy(shape: ModelShape, layout: Layout) -> None:
    ours = trainer(shape, layout)
    values = ours.read()
    ours.write(values)
    values += 1
    assert not np.array_equal(ours.read(), values)
    out = np.empty_like(values)
    assert ours.read(out) is out
    assert out.tobytes() == ours.read().tobytes()


def test_evaluating_another_model_leaves_ones_own_untouched(shape: ModelShape, layout: Layout) -> None:
    ours, theirs = trainer(shape, layout, seed=0), trainer(shape, layout, seed=1)
    ours.run(batches(shape, 2), lambda _: 1e-3)
    before, data = ours.read().tobytes(), batches(shape, 2, seed=9)
    nats, tokens = ours.evaluate(data, parameters=theirs.read())
    assert (nats, tokens) == theirs.evaluate(data)
    assert nats != ours.evaluate(data)[0]
    assert tokens == 2 * 4 * shape.context
    assert ours.read().tobytes() == before


def test_ones_own_model_comes_back_when_evaluating_another_fails(shape: ModelShape, layout: Layout) -> None:
    ours = trainer(shape, layout)
    before = ours.read().tobytes()
    wrong = np.full((1, 4), shape.vocab_size + 5, np.int64)
    with pytest.raises(IndexError):
        ours.evaluate([(wrong, wrong)], parameters=np.zeros(layout.size, np.float32))
    assert ours.read().tobytes() == before


def test_evaluation_does_not_train(shape: ModelShape, layout: Layout) -> None:
    one, other = trainer(shape, layout), trainer(shape, layout)
    data = batches(shape, 4)
    one.run(data[:2], lambda _: 1e-3)
    one.evaluate(data)
    one.run(data[2:], lambda _: 1e-3)
    other.run(data, lambda _: 1e-3)
    assert one.read().tobytes() == other.read().tobytes()


def test_training_continues_to_the_same_bits_after_a_restart(shape: ModelShape, layout: Layout) -> None:
    whole, first, second = (trainer(shape, layout) for _ in range(3))
    data = batches(shape, 6)
    whole.run(data, lambda _: 1e-3)
    first.run(data[:3], lambda _: 1e-3)
    saved = {name: values.copy() for name, values in first.optimizer_state().items()}
    second.write(first.read())
    second.load_optimizer_state(saved)
    first.run(data[:1], lambda _: 1.0)  # what is saved does not follow
    second.run(data[3:], lambda _: 1e-3)
    assert second.read().tobytes() == whole.read().tobytes()


def test_optimizer_state_is_flat_fp32_and_empty_before_the_first_step(shape: ModelShape, layout: Layout) -> None:
    ours = trainer(shape, layout)
    assert ours.optimizer_state() == {}
    ours.load_optimizer_state({})
    ours.run(batches(shape, 1), lambda _: 1e-3)
    state = ours.optimizer_state()
    assert {name: values.shape for name, values in state.items()} == {
        "exp_avg": (layout.size,),
        "exp_avg_sq": (layout.size,),
        "step": (1,),
    }
    assert all(values.dtype == np.float32 for values in state.values())


def test_perplexity_too_large_for_a_float_is_infinite() -> None:
    assert perplexity(math.log(50.0)) == pytest.approx(50.0)
    assert perplexity(1e9) == math.inf


@pytest.mark.parametrize(
    ("progress", "expected"),
    [
        (-1.0, 0.0),
        (0.0, 0.0),
        (0.05, 0.5),  # half of the warm-up
        (0.1, 1.0),  # its end
        (0.325, 0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4))),  # a quarter of the decay
        (0.55, 0.6),  # its middle: half way from 1 to 0.2
        (1.0, 0.2),
        (2.0, 0.2),
    ],
)
def test_learning_rate_by_hand(progress: float, expected: float) -> None:
    training = TrainingConfig(lr=1.0, warmup_fraction=0.1, min_lr_ratio=0.2)
    assert learning_rate(training, progress) == pytest.approx(expected, abs=1e-12)


def test_learning_rate_without_a_warm_up_and_with_nothing_else() -> None:
    assert learning_rate(TrainingConfig(lr=2.0, warmup_fraction=0.0), 0.0) == 2.0
    whole = TrainingConfig(lr=2.0, warmup_fraction=1.0, min_lr_ratio=0.5)
    assert learning_rate(whole, 0.5) == 1.0
    assert learning_rate(whole, 1.0) == pytest.approx(1.0)


def test_learning_rate_never_jumps() -> None:
    training = TrainingConfig(lr=1.0)
    rates = [learning_rate(training, i / 1_000) for i in range(1_001)]
    assert max(abs(b - a) for a, b in zip(rates, rates[1:], strict=False)) < 0.021
