"""Kin experts: what a layer with several experts computes, and the trainer of such a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.experts import plan_of, tokens, trainer_with_experts
from support.pretrained import KINDS, save_pretrained

from worldlm_ray.training.making import plain_trainer

pytest.importorskip("transformers")
pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("freeze_a", [False, True])
@pytest.mark.parametrize("kind", ["llama_tied_gqa", "gpt2", "gpt_neox"])
def test_a_layer_is_the_sum_of_its_experts_by_the_router(tmp_path: Path, kind: str, freeze_a: bool) -> None:
    assert kind in KINDS
    plan = plan_of(tmp_path, save_pretrained(tmp_path / "base", kind), freeze_a=freeze_a)
    assert any(".lora_A." in entry.name for entry in plan.layout.entries) is not freeze_a
    trainer = trainer_with_experts(plan)
    mixture = trainer.experts.mixtures[1]
    layer, router = mixture.layer, mixture.router
    x = torch.randn(3, 5, layer.in_features, generator=torch.Generator().manual_seed(1))
    found = layer(x)

    gates = torch.softmax(x @ router.weight.T + router.bias, -1)
    expected = layer.base_layer(x)
    own_a = layer.lora_A["default"].weight
    assert len(mixture.others_a) == (0 if freeze_a else 2)
    others_a = mixture.others_a or [own_a, own_a]
    for k, (a, b) in enumerate(
        zip([own_a, *others_a], [layer.lora_B["default"].weight, *mixture.others_b], strict=True)
    ):
        change = x @ a.T @ b.T
        expected = expected + gates[..., k : k + 1] * change * layer.scaling["default"]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert gates.shape[-1] == 3
    assert float((found - layer.base_layer(x)).abs().max()) > 1e-3


def test_gradients_of_routers_equal_finite_differences(tmp_path: Path, base: Path) -> None:
    trainer = trainer_with_experts(plan_of(tmp_path, base, freeze_a=True))
    inputs, targets = tokens(8)[:, :-1], tokens(8)[:, 1:]

    def loss() -> Any:
        return torch.nn.functional.cross_entropy(trainer.model(inputs).flatten(0, 1).double(), targets.flatten())

    parameters = list(trainer.experts.routers.parameters())
    gradients = torch.autograd.grad(loss(), parameters)
    step = 1e-2  # layers compute in fp32: of a smaller one rounding would be left
    for parameter, gradient in list(zip(parameters, gradients, strict=True))[::5]:
        place = int(gradient.abs().argmax())
        flat, losses = parameter.data.view(-1), []
        before = float(flat[place])
        for value in (before + step, before - step):
            flat[place] = value
            losses.append(float(loss()))
        flat[place] = before
        assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(float(gradient.view(-1)[place]), rel=1e-2)


def test_routers_begin_with_the_own_expert_ahead(tmp_path: Path, base: Path) -> None:
    trainer: Any = plain_trainer((plan := plan_of(tmp_path, base)).shape, plan.layout, plan.root.clients[0].settings)
    for router in trainer.experts.routers:
        assert not router.weight.any()
        assert router.bias.tolist() == [0.0, -1.0, -1.0]


def test_a_model_of_a_node_above_is_measured_without_experts(tmp_path: Path, base: Path) -> None:
    plan = plan_of(tmp_path, base)
    trainer = trainer_with_experts(plan)
    batch = [(tokens()[:, :-1].numpy(), tokens()[:, 1:].numpy())]
    mixed, theta = trainer.evaluate(batch)[0], trainer.read()
    alone = trainer.evaluate(batch, parameters=theta)[0]
    assert alone != mixed
    trainer.take_experts({name: np.zeros_like(theta) for name in trainer.experts.others})
    trainer.experts.router[:] = 0.0
    for router in trainer.experts.routers:
        router.bias.data[0] = 50.0
    assert trainer.evaluate(batch)[0] == pytest.approx(alone, rel=1e-6)


def test_a_trainer_comes_back_from_its_state(tmp_path: Path, base: Path) -> None:
    plan = plan_of(tmp_path, base)
    first, second = (trainer_with_experts(plan, seed=seed) for seed in (0, 1))
    batch = (tokens(4)[:, :-1].numpy(), tokens(4)[:, 1:].numpy())
    first.run([batch] * 2, lambda _: 1e-2)
    second.write(first.read())
    second.load_optimizer_state(first.optimizer_state())
    for trainer in (first, second):
        trainer.run([batch] * 2, lambda _: 1e-2)
    for name, values in first.optimizer_state().items():
        np.testing.assert_array_equal(second.optimizer_state()[name], values, err_msg=name)
    np.testing.assert_array_equal(first.read(), second.read())
