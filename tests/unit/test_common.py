"""The parent's model, trained beside a client's own once they have parted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.worlds import TINY_MODEL, client

from worldlm_ray.client.client import Client
from worldlm_ray.errors import ConfigError
from worldlm_ray.exchange.messages import Model
from worldlm_ray.plan import build
from worldlm_ray.plan.plan import Plan
from worldlm_ray.records import MergeRecord
from worldlm_ray.training.local import LocalTrainer

PARTED = {"client": "adaptive", "agreement": 1.0, "common_fraction": 0.25}
"""No client agrees that much."""


@pytest.fixture
def plan(tiny: Callable[..., Plan]) -> Plan:
    return tiny(budget={"rounds": 4}, merge=PARTED)


def a_client(plan: Plan) -> Client:
    return Client(plan, plan.root.clients[0])


def pulled(plan: Plan, *, version: int, seed: int = 0) -> Model:
    moved = np.random.default_rng(seed).normal(scale=0.01, size=plan.layout.size).astype(np.float32)
    values = build.initial(plan) + (moved if version else np.float32(0.0))
    return Model(version=version, progress=0.0, finished=False, tokens=1.0, last_seq=0, values=values)


def parted(plan: Plan) -> Client:
    """A client in its second round, in which it has left its parent."""
    client = a_client(plan)
    client.begin(pulled(plan, version=0), now_s=0.0)
    client.train()
    client.update()
    client.begin(pulled(plan, version=1), now_s=0.0)
    return client


def alone(client: Client, values: np.ndarray, rows: slice, *, moments: dict[str, np.ndarray]) -> np.ndarray:
    """What plain training of a model on some rows of the round's batches makes of it."""
    trainer = LocalTrainer(client.plan.shape, client.plan.layout, client.training, threads=1)
    trainer.write(values)
    trainer.load_optimizer_state(moments)
    batches = ((x[rows], y[rows]) for x, y in client._batches(0))
    trainer.run(batches, client._rate)
    return trainer.read()


def test_the_batch_is_shared_by_the_clients_own_model_and_its_parents(plan: Plan) -> None:
    client, parent = parted(plan), pulled(plan, version=1)
    own, moments = client.trainer.read(), client.trainer.optimizer_state()
    mine = alone(client, own, slice(1, None), moments=moments)
    common = alone(client, parent.values, slice(0, 1), moments=moments)
    client.train()
    assert client.trainer.read().tobytes() == mine.tobytes()
    np.testing.assert_array_equal(client.update().values, common - parent.values)
    assert client.tokens == 2 * client.round_tokens


@pytest.mark.parametrize(("fraction", "rows"), [(None, (slice(None), slice(None))), (0.25, (slice(2, None), slice(2)))])
def test_shares_are_of_the_whole_batch_of_pooled_text(
    tiny: Callable[..., Plan], tmp_path: Path, fraction: float | None, rows: tuple[slice, slice]
) -> None:
    """A batch of pooled text has `batch_size` sequences of each member: here twice four."""
    pool = [client(name, tmp_path, seed)["data"] for name, seed in (("a", 1), ("b", 2))]
    merge = {"client": "apart", "common_fraction": fraction}
    model = TINY_MODEL | {"key_layers": []}
    plan = tiny([{"client": "both", "data": {"pool": pool}}], budget={"rounds": 4}, merge=merge, model=model)
    pooled, parent = parted(plan), pulled(plan, version=1)
    own, moments = pooled.trainer.read(), pooled.trainer.own.optimizer_state()  # type: ignore[attr-defined]
    mine = alone(pooled, own, rows[0], moments=moments)
    common = alone(pooled, parent.values, rows[1], moments=moments)
    pooled.train()
    assert pooled.trainer.read().tobytes() == mine.tobytes()
    np.testing.assert_array_equal(pooled.update().values, common - parent.values)


def test_a_client_that_follows_trains_one_model_with_all_of_its_text(tiny: Callable[..., Plan]) -> None:
    merge = PARTED | {"agreement": -1.0}
    plain, ours = (tiny(budget={"rounds": 4}, merge=merge | {"common_fraction": f}) for f in (0, 0.5))
    assert parted(ours).trainer.beside() is None
    states = []
    for each in (plain, ours):
        client = parted(each)
        client.train()
        states.append((client.trainer.read().tobytes(), client.update().values.tobytes()))
    assert states[0] == states[1]


def test_moments_of_the_common_model_last_while_the_client_is_away(plan: Plan) -> None:
    client = parted(plan)
    client.train()
    client.update()
    client.begin(pulled(plan, version=2, seed=2), now_s=0.0)
    assert client.trainer.optimizer_state()["common.step"][0] == 8.0
    client.merger.agreement = -1.0  # it agrees with anybody again
    client.train()
    client.update()
    client.begin(pulled(plan, version=3, seed=3), now_s=0.0)
    assert client.trainer.beside() is None
    backbone = slice(0, plan.layout.backbone_size)
    np.testing.assert_array_equal(client.trainer.read()[backbone], pulled(plan, version=3, seed=3).values[backbone])


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


def test_what_the_client_pushed_is_not_taken_for_the_others_movement(plan: Plan) -> None:
    """A parent that moved by nothing but the client's own common work gives it nothing to agree with."""
    client, parent = parted(plan), pulled(plan, version=1)
    client.train()
    moved = (parent.values + client.update().values).astype(np.float32)
    answer = Model(version=2, progress=0.0, finished=False, tokens=1.0, last_seq=1, values=moved, share=1.0)
    [record] = client.begin(answer, now_s=0.0)
    assert isinstance(record, MergeRecord)
    assert record.agreement == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"merge": PARTED | {"client": 0.5}}, "merge.common_fraction"),
        ({"merge": PARTED | {"common_fraction": 1.0}}, "merge.common_fraction"),
        ({"merge": PARTED, "training": {"batch_size": 1}}, "merge.common_fraction"),
        ({"merge": PARTED | {"common_fraction": 2.0}}, "merge.common_fraction"),
        ({"merge": PARTED, "privacy": {"unit": "record", "noise_multiplier": 1.0}}, "merge.common_fraction"),
        ({"merge": PARTED, "resources": {"workers": 2}}, "merge.common_fraction"),
    ],
)
def test_worlds_in_which_no_common_model_can_be_trained(
    tiny: Callable[..., Plan], changes: dict[str, object], key: str
) -> None:
    with pytest.raises(ConfigError, match=key):
        tiny(**changes)
