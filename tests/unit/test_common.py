"""The parent's model, trained beside a client's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.worlds import TINY_MODEL, client

from worldlm_ray.client.client import Client
from worldlm_ray.exchange.messages import Model
from worldlm_ray.plan import build
from worldlm_ray.plan.plan import Plan
from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.training.local import LocalTrainer

APART = {"client": "apart"}


@pytest.fixture
def plan(tiny: Callable[..., Plan]) -> Plan:
    return tiny(budget={"rounds": 4}, merge=APART)


def a_client(plan: Plan) -> Client:
    return Client(plan, plan.root.clients[0])


def pulled(plan: Plan, *, version: int, seed: int = 0, far: bool = False) -> Model:
    """The parent's model; if it is far away, it is worse than any that has been trained."""
    scale = 1.0 if far else 0.01
    moved = np.random.default_rng(seed).normal(scale=scale, size=plan.layout.size).astype(np.float32)
    values = build.initial(plan) + (moved if version else np.float32(0.0))
    return Model(version=version, progress=0.0, finished=False, tokens=1.0, last_seq=0, values=values)


def parted(plan: Plan, *, far: bool = False) -> Client:
    """A client in its second round, in which it trains a common model beside its own."""
    client = a_client(plan)
    client.begin(pulled(plan, version=0), now_s=0.0)
    client.train()
    client.update()
    client.begin(pulled(plan, version=1, far=far), now_s=0.0)
    return client


def alone(client: Client, values: Flat, *, moments: dict[str, Flat]) -> Flat:
    """What plain training of a model on the round's batches makes of it."""
    trainer = LocalTrainer(client.plan.shape, client.plan.layout, client.training, threads=1)
    trainer.write(values)
    trainer.load_optimizer_state(moments)
    trainer.run(client._batches(0), client._rate)
    return trainer.read()


def test_both_models_are_trained_on_the_whole_batch_of_pooled_text(tiny: Callable[..., Plan], tmp_path: Path) -> None:
    """A batch of pooled text has `batch_size` sequences of each member: here twice four."""
    pool = [client(name, tmp_path, seed)["data"] for name, seed in (("a", 1), ("b", 2))]
    model = TINY_MODEL | {"key_layers": []}
    plan = tiny([{"client": "both", "data": {"pool": pool}}], budget={"rounds": 4}, merge=APART, model=model)
    pooled, parent = parted(plan), pulled(plan, version=1)
    own, moments = pooled.trainer.read(), pooled.trainer.own.optimizer_state()  # type: ignore[attr-defined]
    mine, common = (alone(pooled, values, moments=moments) for values in (own, parent.values))
    pooled.train()
    assert pooled.trainer.read().tobytes() == mine.tobytes()
    np.testing.assert_array_equal(pooled.update().values, common - parent.values)
    assert pooled.tokens == 2 * pooled.round_tokens, "no token counts twice"


def test_moments_of_the_common_model_last_until_the_client_follows(tiny: Callable[..., Plan]) -> None:
    model = TINY_MODEL | {"key_layers": []}
    client = parted(tiny(budget={"rounds": 4}, merge={"client": "validated"}, model=model), far=True)
    client.train()
    client.update()
    client.begin(pulled(client.plan, version=2, seed=2, far=True), now_s=0.0)
    before = client.trainer.optimizer_state()
    assert before["common.step"][0] == before["step"][0] == 8.0
    client.train()
    client.update()
    after = client.trainer.optimizer_state()
    same = Model(version=3, progress=0.0, finished=False, tokens=1.0, last_seq=0, values=client.trainer.read())
    client.begin(same, now_s=0.0)  # as good as its own: it follows
    assert client.trainer.beside() is None
    found = client.trainer.optimizer_state()
    assert found["step"][0] == 12.0
    np.testing.assert_array_equal(found["exp_avg"], after["common.exp_avg"])
    assert np.any(after["common.exp_avg"] != after["exp_avg"])
    np.testing.assert_array_equal(client.trainer.read(), same.values)


def test_a_round_of_two_models_that_was_interrupted_goes_on_to_the_same_bits(plan: Plan) -> None:
    whole, parts = parted(plan), parted(plan)
    whole.train()
    asked = iter([False, False, True])
    parts.train(lambda: next(asked))
    again = a_client(plan)
    again.restore(*parts.state())
    again.train()
    assert again.trainer.read().tobytes() == whole.trainer.read().tobytes()
    assert again.update().values.tobytes() == whole.update().values.tobytes()
