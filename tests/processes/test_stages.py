"""DeepSpeed's workers held against a plain client: two processes of this machine, without Ray."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.zero_group import RATE, batches, in_group, memory, start, train, training, with_prompts
from worldlm_ray.model.shape import PRESETS
from worldlm_ray.training.local import LocalTrainer
from worldlm_ray.training.trainer import MOMENTS

pytestmark = [pytest.mark.slow, pytest.mark.long]

SHAPE, STEPS = PRESETS["nano"], 50


def plain_after(steps: int) -> tuple[LocalTrainer, list[float]]:
    layout, initial = start(SHAPE)
    plain = LocalTrainer(SHAPE, layout, training(0), threads=1, device="cpu")
    plain.write(initial)
    return plain, [plain.run([batch], lambda _: RATE).loss_sum for batch in batches(SHAPE, steps=steps)]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_stage_agrees_with_the_plain_client_and_comes_back_bit_for_bit(stage: int) -> None:
    plain, losses = plain_after(STEPS)
    first, second = in_group(train, stage, "nano", STEPS, {})
    assert first["losses"] == second["losses"]
    assert np.max(np.abs(np.subtract(first["losses"], losses))) < 1e-5
    np.testing.assert_allclose(first["theta"], plain.read(), atol=5e-5)
    state = plain.optimizer_state()
    assert first["steps"] == STEPS == int(state["step"][0])
    for name in MOMENTS:
        np.testing.assert_allclose(first["moments"][name], state[name], atol=1e-6)
    held_out = [(inputs[:3], targets[:3]) for inputs, targets in batches(SHAPE, steps=STEPS + 3)[STEPS:]]
    nats, tokens = plain.evaluate(held_out)
    assert first["evaluated"] == pytest.approx(nats / tokens, abs=1e-5)
    assert first["text"] == second["text"]
    # A fresh engine with the parameters and moments of the old one goes on as the old one does.
    assert first["restored"] == first["on"]
    assert np.array_equal(first["theta_restored"], first["theta_on"])


def test_what_two_workers_learned_goes_on_in_a_plain_client() -> None:
    found = in_group(train, 3, "nano", 5, {})[0]
    layout, _ = start(SHAPE)
    plain = LocalTrainer(SHAPE, layout, training(0), threads=1, device="cpu")
    plain.write(found["theta"])
    plain.load_optimizer_state(found["moments"] | {"step": np.array([found["steps"]], np.float32)})
    losses = [plain.run([batch], lambda _: RATE).loss_sum for batch in batches(SHAPE, steps=8)[5:]]
    np.testing.assert_allclose(losses, found["on"], atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [{"accumulation_steps": 4}, {"activation_checkpointing": True}, {"offload_optimizer": True}],
    ids=lambda changes: next(iter(changes)),
)
@pytest.mark.parametrize("stage", [2, 3])
def test_saving_memory_changes_no_result(stage: int, changes: dict[str, Any]) -> None:
    _, losses = plain_after(5)
    found = in_group(train, stage, "nano", 5, changes)[0]
    np.testing.assert_allclose(found["losses"], losses, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"accumulation_steps": 4}], ids=["whole", "in parts"])
def test_workers_with_unequally_many_counted_targets_take_the_steps_of_one(changes: dict[str, Any]) -> None:
    layout, initial = start(SHAPE)
    plain = LocalTrainer(SHAPE, layout, training(0), threads=1, device="cpu")
    plain.write(initial)
    drawn = with_prompts(batches(SHAPE, steps=8))
    losses = [plain.run([batch], lambda _: RATE).loss_sum for batch in drawn[:5]]
    nats, tokens = plain.evaluate([(inputs[:3], targets[:3]) for inputs, targets in drawn[5:]])
    found = in_group(train, 2, "nano", 5, changes, True)[0]
    np.testing.assert_allclose(found["losses"], losses, atol=1e-5)
    np.testing.assert_allclose(found["theta"], plain.read(), atol=5e-5)
    assert found["evaluated"] == pytest.approx(nats / tokens, abs=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_worker_holds_what_the_arithmetic_of_zero_says(stage: int) -> None:
    for found in in_group(memory, stage, "mini"):
        assert found["measured"] == pytest.approx(found["expected"], rel=0.1)
        assert found["read_extra"] <= found["layer_bytes"] + found["model_bytes"]
