"""APFL (arXiv 2003.13461, algorithm 1): a personal model and the parent's, trained side by side and mixed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from support.drift import Drift

from worldlm_ray.client.client import Client
from worldlm_ray.exchange.messages import Model
from worldlm_ray.experiments.methods import configure
from worldlm_ray.plan import build
from worldlm_ray.plan.plan import Plan, make_plan
from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.training.local import LocalTrainer
from worldlm_ray.training.mixed import MixedTrainer
from worldlm_ray.training.trainer import Batch, RoundResult

BATCH: Batch = (np.zeros((1, 1), np.int64), np.zeros((1, 1), np.int64))


class Bowl(Drift):
    """Plain descent of x^2 / 2: the gradient at x is x."""

    def __init__(self) -> None:
        super().__init__(1, 1.0)

    def run(self, batches: object, rate: Callable[[int], float], **named: object) -> RoundResult:
        [_] = batches  # type: ignore[misc]
        self.theta -= np.float32(rate(0)) * self.theta
        return RoundResult(steps=1, tokens=1, loss_sum=float(self.theta[0]), train_s=1.0, learning_rate=rate(0))


def values(number: float) -> Flat:
    return np.array([number], np.float32)


def test_both_models_step_from_where_they_were_and_a_pull_moves_the_parents_alone() -> None:
    trainer = MixedTrainer(Bowl(), Bowl, alpha=0.25)
    trainer.write(values(4.0))
    trainer.train_beside(values(2.0), own=trainer.read())  # v = 4, w = 2
    assert trainer.read() == pytest.approx(0.25 * 4.0 + 0.75 * 2.0)
    result = trainer.run([BATCH, BATCH], lambda _: 0.1)
    # v = 4 - 0.1 * 2.5 = 3.75, w = 2 - 0.1 * 2 = 1.8, m = 0.25 * 3.75 + 0.75 * 1.8 = 2.2875
    # v = 3.75 - 0.1 * 2.2875 = 3.52125, w = 1.62, m = 2.0953125
    assert trainer.beside() == pytest.approx(1.62)
    assert trainer.read() == pytest.approx(2.0953125)
    assert (result.steps, result.tokens, result.learning_rate, result.train_s) == (2, 2, 0.1, 4.0)
    trainer.train_beside(values(1.0), own=trainer.read())
    assert trainer.read() == pytest.approx(0.25 * 3.52125 + 0.75 * 1.0)


def test_no_batch_is_taken_after_a_stop() -> None:
    trainer = MixedTrainer(Bowl(), Bowl, alpha=0.5)
    trainer.write(values(4.0))
    trainer.train_beside(values(2.0), own=trainer.read())
    assert trainer.run([BATCH], lambda _: 0.1, should_stop=lambda: True).steps == 0
    assert trainer.read() == pytest.approx(3.0)


def pulled(plan: Plan, version: int) -> Model:
    moved = np.random.default_rng(version).normal(scale=0.05, size=plan.layout.size).astype(np.float32)
    start = build.initial(plan) + (moved if version else np.float32(0.0))
    return Model(version=version, progress=0.0, finished=False, tokens=1.0, last_seq=0, values=start)


def in_second_round(plan: Plan) -> Client:
    client = Client(plan, plan.root.clients[0])
    client.begin(pulled(plan, 0), now_s=0.0)
    client.train()
    client.update()
    client.begin(pulled(plan, 1), now_s=0.0)
    return client


@pytest.fixture
def plan(tiny: Callable[..., Plan]) -> Plan:
    return make_plan(configure(tiny(budget={"rounds": 4}).config, "apfl"))


def test_a_round_of_a_client_is_that_of_two_models_kept_apart(plan: Plan) -> None:
    client = Client(plan, plan.root.clients[0])
    client.begin(pulled(plan, 0), now_s=0.0)
    client.train()
    client.update()
    v, w = client.trainer.read(), pulled(plan, 1).values
    trainers = [LocalTrainer(plan.shape, plan.layout, client.training, threads=1) for _ in range(2)]
    for each in trainers:
        each.load_optimizer_state(client.trainer.optimizer_state())
    client.begin(pulled(plan, 1), now_s=0.0)
    mixture = 0.5 * v + 0.5 * w
    np.testing.assert_allclose(client.trainer.read(), mixture, atol=1e-6)
    of_mixture, of_common = trainers
    of_common.write(w)
    for step, batch in enumerate(client._batches(0)):
        of_mixture.write(mixture)
        of_mixture.run([batch], lambda _, step=step: client._rate(step))
        v = v + (of_mixture.read() - mixture)
        of_common.run([batch], lambda _, step=step: client._rate(step))
        mixture = 0.5 * v + 0.5 * of_common.read()
    client.train()
    np.testing.assert_allclose(client.trainer.read(), mixture, atol=1e-5)
    pushed = client.update().values
    np.testing.assert_allclose(pushed, of_common.read() - w, atol=1e-6)
    assert np.abs(mixture - of_common.read()).max() > 1e-3


def test_a_round_that_was_interrupted_goes_on_to_the_same_bits(plan: Plan) -> None:
    whole, parts = in_second_round(plan), in_second_round(plan)
    whole.train()
    asked = iter([False, False, True])
    parts.train(lambda: next(asked))
    again = Client(plan, plan.root.clients[0])
    again.restore(*parts.state())
    again.train()
    assert again.trainer.read().tobytes() == whole.trainer.read().tobytes()
    assert again.update().values.tobytes() == whole.update().values.tobytes()
