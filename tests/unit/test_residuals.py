"""Residual routing: what becomes a residual, who is offered it, what rises, and what it weighs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import msgpack
import numpy as np
import pytest
from support.nodes import a_node, begun, pulled

from worldlm_ray.aggregation.events import ParentModel, Pull, Push
from worldlm_ray.aggregation.merge import Merger
from worldlm_ray.aggregation.node import Node
from worldlm_ray.aggregation.residuals import Pool
from worldlm_ray.config.federated import AggregationConfig, AttentionConfig, MergeConfig, ResidualsConfig
from worldlm_ray.config.schema import BudgetConfig
from worldlm_ray.errors import MessageError
from worldlm_ray.exchange.messages import (
    Packed,
    Residual,
    Update,
    pack,
    read_header,
    unpack_model,
    unpack_update,
)
from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.tensors.layout import make_layout

SHAPES = [("body.weight", (1,)), ("neck.weight", (2,)), ("head.weight", (2,))]
LAYOUT = make_layout(SHAPES, ["neck.*", "head.*"], layers=0)
ZERO = np.zeros(4, np.float32)


def flat(*values: float) -> Flat:
    return np.array(values, np.float32)


def pool(*, private: bool = False, **settings: Any) -> Pool:
    config = ResidualsConfig(**({"per_round": 2, "threshold": 0.0, "max_age": 4, "pool": 3} | settings))
    return Pool("world/europe", AggregationConfig(residuals=config), LAYOUT, origin=ZERO, private=private)


def residual(origin: str = "world/asia/japan", layer: str = "head", *values: float, age: int = 0) -> Residual:
    return Residual(origin=origin, layer=layer, tokens=10.0, age=age, values=flat(*(values or (1, 0))))


def look(pool: Pool, child: str, keys: Flat, scores: tuple[float, float], passed: tuple[Residual, ...] = ()) -> None:
    pool.look(child, keys, scores, tokens=10.0, passed=passed)


def test_outliers_become_residuals_at_the_aggregation_the_worst_first() -> None:
    ours = pool(per_round=2)
    look(ours, "a", flat(1, 0, 2, 0), (0.5, -0.2))
    look(ours, "b", flat(3, 0, 4, 0), (-0.9, -0.1))
    assert ours.held == []
    ours.settle()
    assert [(r.origin, r.layer, r.values.tolist(), r.age) for r in ours.held] == [
        ("world/europe/b", "neck", [3, 0], 0),
        ("world/europe/a", "head", [2, 0], 0),
    ]


def test_a_child_is_offered_what_fits_it_and_is_not_its_own() -> None:
    ours = pool(offers=1)
    look(ours, "a", flat(0, 0, 1, 0), (1.0, -1.0))
    ours.settle()
    for child, keys in (("a", flat(0, 0, 1, 0)), ("b", flat(0, 0, 1, 1)), ("c", flat(0, 0, -1, 1))):
        look(ours, child, keys, (1.0, 1.0))
    assert [r.origin for r in ours.offer("b")] == ["world/europe/a"]
    assert ours.offer("a") == ours.offer("c") == ours.offer("stranger") == ()


def test_residuals_age_and_go_and_the_newer_replaces_the_older() -> None:
    ours = pool(max_age=2, pool=2)
    look(ours, "a", ZERO, (1.0, 1.0), (residual("x"), residual("y"), residual("z")))
    assert [r.origin for r in ours.held] == ["y", "z"]
    look(ours, "a", ZERO, (1.0, 1.0), (residual("y", "head", 5, 5),))
    assert [(r.origin, r.values.tolist()) for r in ours.held] == [("z", [1, 0]), ("y", [5, 5])]
    for age in (1, 2):
        ours.settle()
        assert [r.age for r in ours.held] == [age, age]
    ours.settle()
    assert ours.held == []


def test_what_fits_nobody_in_half_of_its_time_rises() -> None:
    ours = pool(max_age=4)
    passed = (residual("world/asia/x", "head", 1, 0), residual("world/asia/y", "head", 0, 1))
    look(ours, "a", flat(0, 0, -1, -1), (1.0, 1.0), passed)
    look(ours, "b", flat(0, 0, 2, -1), (1.0, 1.0))  # fits x, not y
    assert ours.rise() == ()
    ours.settle()
    ours.settle()
    assert [r.origin for r in ours.rise()] == ["world/asia/y"]
    assert [r.origin for r in ours.held] == ["world/asia/x"]


def test_one_child_twice_in_a_fold_leaves_one_residual() -> None:
    ours = pool(pool=1)
    look(ours, "a", flat(0, 0, 1, 0), (1.0, -0.5))
    look(ours, "a", flat(0, 0, 2, 0), (1.0, -0.4))
    ours.settle()
    assert [r.values.tolist() for r in ours.held] == [[2, 0]]


def test_switched_off_nothing_is_offered_that_is_left_of_before() -> None:
    ours, off = pool(), pool(per_round=0)
    ours.held = [residual()]
    ours.fits = {"a": {residual().name: 1.0}}
    assert len(ours.offer("a")) == 1
    off.restore(*ours.state())
    assert off.offer("a") == ()
    assert off.rise() == ()


@pytest.mark.parametrize("off", [{"per_round": 0}, {"private": True}])
def test_switched_off_nothing_is_kept(off: dict[str, Any]) -> None:
    ours = pool(**off)
    look(ours, "a", ZERO, (-1.0, -1.0), (residual(),))
    ours.settle()
    assert ours.held == []


def test_a_pool_survives_a_restart() -> None:
    ours, again = pool(), pool()
    look(ours, "a", flat(0, 0, 1, 0), (1.0, -1.0), (residual(),))
    look(ours, "b", flat(1, 2, 3, 4), (-0.5, 1.0))
    again.restore(*ours.state())
    for each in (ours, again):
        each.settle()
    assert [(r.name, r.age, r.values.tolist()) for r in again.held] == [
        (r.name, r.age, r.values.tolist()) for r in ours.held
    ]
    assert again.fits == ours.fits


def test_a_residual_is_a_candidate_of_its_layer_discounted_by_age() -> None:
    rules = AggregationConfig(attention=AttentionConfig(score="uniform"))
    merger = Merger(path="world/a", layout=LAYOUT, rules=rules, initial=np.zeros(5, np.float32))
    told = pulled(flat(0, 4, 4, 4, 4), residuals=(residual("world/b", "head", 16, 0, age=3),))
    out = np.zeros(5, np.float32)
    record = merger.keys(np.zeros(5, np.float32), np.zeros(5, np.float32), told, own_tokens=10.0, now_s=0.0, out=out)
    # tokens 10, 10 and 10/sqrt(1 + 3): weights 0.4, 0.4, 0.2 for the head; the neck is half and half.
    assert out.tolist() == pytest.approx([0, 2, 2, 0.4 * 4 + 0.2 * 16, 0.4 * 4])
    assert record is not None
    assert record.candidates == ("(own)", "(parent)", "residual of world/b")
    assert record.weights[1] == pytest.approx((0.4, 0.4, 0.2))


def node(**rules: Any) -> Node:
    rules = {"buffer_size": 1, "residuals": ResidualsConfig(per_round=2, max_age=1)} | rules
    return a_node(
        path="world/europe",
        children=("a", "b"),
        aggregation=AggregationConfig(**rules),
        merge=MergeConfig(),
        has_parent=True,
        layout=LAYOUT,
        initial=np.zeros(5, np.float32),
        budget=BudgetConfig(rounds=9),
    )


def push(ours: Node, child: str, seq: int, *keys: float) -> None:
    """An update that would bring the key layers here."""
    values = flat(0, *keys) - flat(0, *ours.theta[1:])
    update = Update(sender=child, seq=seq, base_version=ours.version, tokens=10, started_tokens=0, values=values)
    ours.handle(Push(sender=child, packed=pack(update, LAYOUT), now_s=0.0))


def test_a_layer_that_does_not_fit_reaches_the_sibling_that_it_fits_or_rises() -> None:
    ours = node(residuals=ResidualsConfig(per_round=2, max_age=2))
    ours.published.theta = flat(0, 1, 0, 1, 0)
    push(ours, "a", 1, 1, 0, -1, 1)  # its head points the other way
    assert [r.name for r in ours.residuals.held] == ["head of world/europe/a"]
    push(ours, "b", 1, 1, 0, -1, 2)
    [serve] = [c for c in ours.handle(Pull(child="b", started_tokens=0, now_s=0.0)) if hasattr(c, "model")]
    assert [r.name for r in serve.model.residuals] == ["head of world/europe/a"]
    assert unpack_model(pack(serve.model, LAYOUT), LAYOUT, residuals=1).residuals[0].values.tolist() == [-1, 1]
    begun(ours)
    ours.handle(ParentModel(model=replace(serve.model, version=0), now_s=0.0))
    ours.residuals.fits.clear()
    push(ours, "a", 2, 1, 0, -1, 2)
    assert [r.name for r in begun(ours).residuals] == ["head of world/europe/a"]


def broken(change: dict[str, Any]) -> Packed:
    update = Update(
        sender="a",
        seq=1,
        base_version=0,
        tokens=1,
        started_tokens=0,
        values=np.zeros(5, np.float32),
        residuals=(residual(),),
    )
    packed = pack(update, LAYOUT)
    header = read_header(packed.header)
    header["residuals"][0] |= change
    return Packed(msgpack.packb(header), packed.values)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layer": "tail"}, "wrong_shape"),
        ({"values": b"\0" * 4}, "wrong_shape"),
        ({"values": np.array([math.nan, 0], np.float32).tobytes()}, "not_finite"),
        ({"age": -1}, "malformed"),
        ({"tokens": math.inf}, "malformed"),
        ({"more": 1}, "malformed"),
    ],
)
def test_a_broken_residual_is_refused_with_its_update(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(MessageError) as error:
        unpack_update(broken(change), LAYOUT, residuals=1)
    assert error.value.reason == reason
