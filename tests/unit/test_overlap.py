"""Rounds that begin before the exchange of the one before has come back: one client, and simulated worlds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.worlds import two_levels

from worldlm_ray.client.client import Client
from worldlm_ray.errors import ConfigError
from worldlm_ray.exchange.messages import Model
from worldlm_ray.exchange.replies import Verdict, Welcome
from worldlm_ray.experiments.methods import configure
from worldlm_ray.plan import build
from worldlm_ray.plan.plan import Plan, make_plan
from worldlm_ray.tensors.buffers import Flat

Tiny = Callable[..., Plan]
OVERLAP = {"overlap": True}
ROUND_TOKENS = 4 * 4 * 16
LINK = {"tokens_per_s": ROUND_TOKENS / 2.0, "latency_s": 0.2}
"""A round takes 2 s, an exchange 0.8 s and a little."""


def one(plan: Plan) -> Client:
    return Client(plan, plan.root.clients[0])


def model(plan: Plan, values: Flat, *, version: int, **changes: Any) -> Model:
    base: dict[str, Any] = {"progress": 0.0, "finished": False, "tokens": float(ROUND_TOKENS), "last_seq": 0}
    return Model(version=version, values=values, **(base | changes))


def some_steps(each: Client, steps: int) -> None:
    ahead = iter(range(steps + 1))
    each.train(lambda: next(ahead) >= steps)


def elsewhere(plan: Plan, seed: int = 0) -> Flat:
    """A model that others have made."""
    return build.initial(plan) + np.random.default_rng(seed).normal(0.0, 0.05, plan.layout.size).astype(np.float32)


def in_mid_exchange(plan: Plan, steps: int = 2) -> tuple[Client, Flat, Flat]:
    """A client with so many steps of its second round; the model that it pushed, and its model now."""
    each = one(plan)
    each.begin(model(plan, build.initial(plan), version=0), now_s=0.0)
    each.train()
    each.update()
    pushed = each.trainer.read()
    each.begin_ahead()
    some_steps(each, steps)
    return each, pushed, each.trainer.read()


# ---- one client ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [0.0, 0.25, 1.0])
def test_what_was_trained_meanwhile_is_kept_and_sent_once(tiny: Tiny, m: float) -> None:
    plan = tiny(exchange=OVERLAP, merge={"client": m})
    each, pushed, now = in_mid_exchange(plan)
    parent, part = elsewhere(plan), slice(0, plan.layout.backbone_size)
    each.merge(model(plan, parent, version=7), now_s=0.0)
    moved = (1 - m) * pushed[part] + m * parent[part]
    np.testing.assert_allclose(each.trainer.read()[part], moved + (now - pushed)[part], atol=1e-6)
    merged = each.trainer.read()
    each.train()
    update = each.update()
    # Both stretches of the round are in the update, and nothing of what came from the parent.
    trained = (now - pushed) + (each.trainer.read() - merged)
    np.testing.assert_allclose(update.values[part], trained[part], atol=1e-6)
    assert np.abs(trained[part]).max() > 1e-4
    assert (update.base_version, update.seq, update.tokens) == (7, 2, each.round_tokens)


def test_an_update_is_as_old_as_the_last_merge(tiny: Tiny) -> None:
    plan = tiny(exchange=OVERLAP)
    each, _, _ = in_mid_exchange(plan)
    each.merge(model(plan, elsewhere(plan), version=7), now_s=0.0)
    each.train()
    assert each.update().base_version == 7
    each.begin_ahead()
    each.train()
    assert each.update().base_version == 7, "nothing newer was merged, whatever the parent has by now"


def test_key_layers_are_blended_with_the_parents_and_progress_is_kept(tiny: Tiny) -> None:
    plan = tiny(exchange=OVERLAP, aggregation={"attention": {"score": "uniform"}})
    each, pushed, now = in_mid_exchange(plan)
    parent, keys = elsewhere(plan), slice(plan.layout.backbone_size, None)
    each.merge(model(plan, parent, version=1), now_s=0.0)
    blend = 0.5 * (pushed[keys] + parent[keys])
    np.testing.assert_allclose(each.trainer.read()[keys], blend + (now - pushed)[keys], atol=1e-6)
    each.train()
    expected = each.trainer.read()[keys] - parent[keys]
    np.testing.assert_array_equal(each.update().values[keys], expected)


def test_what_a_codec_loses_goes_with_the_next_update(tiny: Tiny) -> None:
    plan = tiny(exchange=OVERLAP | {"codec": "int4"}, merge={"client": 0.5}, budget={"rounds": 9})
    each, part = one(plan), slice(0, plan.layout.backbone_size)
    each.begin(model(plan, build.initial(plan), version=0), now_s=0.0)
    sent, trained = np.zeros(plan.layout.size, np.float32), np.zeros(plan.layout.size, np.float32)
    for version in range(1, 5):
        before = each.trainer.read()
        some_steps(each, 2)
        trained += each.trainer.read() - before
        if version > 1:
            each.merge(model(plan, elsewhere(plan, version), version=version), now_s=0.0)
        before = each.trainer.read()
        each.train()
        trained += each.trainer.read() - before
        sent += each.update().values
        each.begin_ahead()
    assert each.link.codec_error is not None
    assert np.abs(each.link.codec_error).max() > 0.0
    np.testing.assert_allclose((sent[part] + each.link.codec_error), trained[part], atol=1e-5)


def test_before_the_first_step_a_merge_is_the_plain_one_to_the_bit(tiny: Tiny) -> None:
    found = []
    for overlap in (False, True):
        plan = tiny(exchange={"overlap": overlap}, merge={"client": 0.3})
        each, parent = one(plan), elsewhere(plan)
        each.begin(model(plan, build.initial(plan), version=0), now_s=0.0)
        each.train()
        each.update()
        if overlap:
            each.begin_ahead()
            each.merge(model(plan, parent, version=1), now_s=0.0)
        else:
            each.begin(model(plan, parent, version=1), now_s=0.0)
        each.train()
        found.append((each.trainer.read().tobytes(), each.update().values.tobytes()))
    assert found[0] == found[1]


@pytest.mark.parametrize("steps", [2, 4])
def test_a_round_trained_from_a_diverged_model_is_given_up(tiny: Tiny, steps: int) -> None:
    plan = tiny(exchange=OVERLAP, budget={"rounds": 5})
    each, _, _ = in_mid_exchange(plan, steps)
    assert each.steps == 4 + steps
    each.answered(1, Verdict(reason="not_finite", seq=1, base_version=0, version=0, tau=0))
    parent = elsewhere(plan)
    each.merge(model(plan, parent, version=3), now_s=0.0)
    assert (each.began, each.round, each.steps, each.tokens) == (False, 1, 4, each.round_tokens)
    assert each.trainer.read().tobytes() == parent.tobytes()
    assert each.trainer.optimizer_state() == {}
    each.begin(model(plan, parent, version=3), now_s=0.0)
    each.train()
    change = each.trainer.read() - parent
    np.testing.assert_array_equal(
        each.update().values[: plan.layout.backbone_size], change[: plan.layout.backbone_size]
    )


@pytest.mark.parametrize("steps", [0, 2, 4])
@pytest.mark.parametrize("durable", [False, True])
def test_a_client_goes_on_from_the_middle_of_an_exchange_to_the_same_bits(
    tiny: Tiny, steps: int, durable: bool
) -> None:
    plan = tiny(exchange=OVERLAP, merge={"client": 0.5}, budget={"rounds": 5})
    each, _, _ = in_mid_exchange(plan, steps)
    if durable:
        each.outbox.durable(1)
    meta, arrays = each.state()
    again = one(plan)
    again.restore(meta, {name: np.array(values) for name, values in arrays.items()})
    again.welcomed(Welcome(incarnation=1, last_seq=1, durable_seq=0))
    found = []
    for life in (each, again):
        life.merge(model(plan, elsewhere(plan), version=2), now_s=0.0)
        if not life.is_whole:
            life.train()
        assert (life.round, life.steps, life.is_whole) == (2, 8, True)
        found.append((life.update().values.tobytes(), life.trainer.read().tobytes()))
    assert found[0] == found[1]


def test_a_whole_round_that_the_parent_has_by_now_is_counted_once(tiny: Tiny) -> None:
    plan = tiny(exchange=OVERLAP, budget={"rounds": 5})
    each, _, _ = in_mid_exchange(plan, steps=4)
    again = one(plan)
    again.restore(*each.state())  # another life went on from this checkpoint, and pushed
    again.welcomed(Welcome(incarnation=1, last_seq=2, durable_seq=2))
    assert (again.round, again.seq, again.began, again.in_flight) == (2, 2, False, None)


def test_the_rate_goes_on_as_if_nobody_had_asked_the_parent(tiny: Tiny) -> None:
    plan = tiny(exchange=OVERLAP, budget={"tokens": 4 * 5 * ROUND_TOKENS})
    each = one(plan)
    rates = []
    each.begin(model(plan, build.initial(plan), version=0), now_s=0.0)
    for rounds in range(1, 4):
        each.train()
        rates.append(each.learning_rate)
        each.update()
        each.begin_ahead()
        some_steps(each, 2)
        rates.append(each.learning_rate)
        # All clients are as fast as this one: half a round later half a round more is spent.
        each.merge(model(plan, build.initial(plan), version=rounds, progress=(rounds + 0.5) / 5), now_s=0.0)
    plain = one(tiny(budget={"tokens": 4 * 5 * ROUND_TOKENS}))
    expected = []
    for rounds in range(4):
        plain.begin(model(plan, build.initial(plan), version=0, progress=rounds / 5), now_s=0.0)
        for steps in (2, 2):
            some_steps(plain, steps)
            expected.append(plain.learning_rate)
        plain.began = False
    assert rates == pytest.approx(expected[1:-1])


# ---- who may ---------------------------------------------------------------------------------------------------


def test_under_a_synchronous_parent_it_is_refused(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"exchange\.overlap.*world is synchronous") as caught:
        tiny([{"client": "a", "data": {"corpus": "python_reference"}}], exchange=OVERLAP, aggregation=SYNCHRONOUS)
    assert caught.value.cure


def test_a_client_with_workers_is_refused(tiny: Tiny) -> None:
    big = {"client": "a", "data": {"corpus": "python_reference"}, "training": {"zero_stage": 2}}
    with pytest.raises(ConfigError, match=r"exchange\.overlap.*DeepSpeed"):
        tiny([big], exchange=OVERLAP)


def test_a_cost_model_is_refused(tiny: Tiny) -> None:
    tiny(simulation={"train": False})
    with pytest.raises(ConfigError, match=r"exchange\.overlap.*simulation\.train"):
        tiny(exchange=OVERLAP, simulation={"train": False})


SYNCHRONOUS = {"trigger": "synchronous"}


@pytest.mark.parametrize("method", ["fedavg", "diloco", "hierfavg", "worldlm+synchronous", "pooled"])
def test_synchronous_methods_leave_it_out(tiny: Tiny, method: str) -> None:
    plan = make_plan(configure(tiny(exchange=OVERLAP).config, method))
    assert not any(spec.settings.exchange.overlap for spec in plan.root.clients)


def test_asynchronous_methods_keep_it(tiny: Tiny, tmp_path: Path) -> None:
    children = two_levels(tmp_path)
    children[0]["exchange"] = {"codec": "int8"}
    for method in ("worldlm+overlap", "halos+overlap"):
        plan = make_plan(configure(tiny(children).config, method))
        assert all(spec.settings.exchange.overlap for spec in plan.root.clients)
