"""The rule by which a node moves to its parent, on numbers computed by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from worldlm_ray.aggregation.merge import Merger, Moved, agreement
from worldlm_ray.config.checks import check_settings
from worldlm_ray.config.federated import AggregationConfig, AttentionConfig, MergeConfig
from worldlm_ray.config.loading import merge_into
from worldlm_ray.config.schema import NodeSettings
from worldlm_ray.config.values import Problems
from worldlm_ray.errors import ConfigError
from worldlm_ray.exchange.messages import Model
from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.tensors.layout import make_layout

LAYOUT = make_layout([("body.weight", (2,)), ("head.weight", (2,))], ["head.*"], layers=0)


def flat(*values: float) -> Flat:
    return np.array(values, np.float32)


def model(*values: float, **fields: Any) -> Model:
    fields = {"version": 1, "progress": 0.0, "finished": False, "tokens": 1.0, "last_seq": 0} | fields
    return Model(values=flat(*values), **fields)


def merger(m: float | str = "adaptive", **changes: Any) -> Merger:
    settings: dict[str, Any] = {
        "path": "world/a",
        "layout": LAYOUT,
        "rules": AggregationConfig(attention=AttentionConfig(score="uniform")),
        "m": m,
        "agreement": 0.6,
        "initial": flat(0, 0, 0, 0),
    }
    return Merger(**(settings | changes))


def cosine(moved: Moved, parent: Flat, heard: Flat, *, share: float = 0.0) -> float:
    return agreement(moved, parent, heard, share=share, size=2)


def test_agreement_is_the_cosine_of_both_movements() -> None:
    # Own (3, 4) from (1, 1) to (4, 5); the parent's (1, 0) from there.
    moved = Moved(now=flat(4, 5), since=flat(1, 1))
    assert cosine(moved, flat(2, 1), flat(1, 1)) == pytest.approx(3 / 5)
    assert cosine(moved, flat(0, 1), flat(1, 1)) == pytest.approx(-3 / 5)


def test_the_nodes_own_work_in_the_parents_movement_does_not_count() -> None:
    # The parent moved by the mean of (2, 0) and (0, 2); without its own half, both are at right angles.
    moved = Moved(now=flat(2, 0), since=flat(0, 0))
    assert cosine(moved, flat(1, 1), flat(0, 0)) == pytest.approx(math.sqrt(0.5))
    assert cosine(moved, flat(1, 1), flat(0, 0), share=0.5) == pytest.approx(0.0)
    told = Moved(now=flat(2, 0), change=flat(2, 0))
    assert cosine(told, flat(1, 1), flat(0, 0), share=0.5) == pytest.approx(0.0)


def test_a_node_that_went_its_own_way_is_judged_by_where_it_is() -> None:
    # Its last work (1, 0) agrees with the parent's movement, but it stands far off to the side.
    moved = Moved(now=flat(1, 9), since=flat(0, 9))
    assert cosine(moved, flat(1, 0), flat(0, 0)) == pytest.approx(1 / math.sqrt(82))
    assert cosine(moved, flat(0, 5), flat(0, 0)) > 0.9


@pytest.mark.parametrize(
    ("now", "parent", "share"), [((0, 0), (1, 1), 0.0), ((1, 1), (0, 0), 0.0), ((1, 1), (0.5, 0.5), 0.5)]
)
def test_where_either_has_not_moved_nothing_can_be_said(
    now: tuple[float, float], parent: tuple[float, float], share: float
) -> None:
    assert cosine(Moved(now=flat(*now), since=flat(0, 0)), flat(*parent), flat(0, 0), share=share) == 0.0


@pytest.mark.parametrize(("parent", "m"), [((3.0, 4.0), 1.0), ((3.0, -4.0), 0.0)])
def test_an_adaptive_node_follows_or_keeps_all_of_its_own(parent: tuple[float, float], m: float) -> None:
    rule, own = merger(), flat(3, 4.1, 7, 7)
    told = model(*parent, 1, 1)
    found, record = rule.judge(told, Moved(now=own, since=flat(0, 0, 0, 0)), now_s=2.0)
    assert (found, record.m, record.version, record.now_s) == (m, m, 1, 2.0)
    assert record.agreement is not None
    assert (record.agreement >= 0.6) == (m == 1.0)
    out = flat(0, 0, 0, 0)
    rule.backbone(found, own, own, told, out=out)
    weights = rule.keys(found, own, own, told, own_tokens=1.0, now_s=2.0, out=out)
    # Following: the parent's backbone, and key layers half and half; else nothing is touched, key layers included.
    assert out.tolist() == ([3, 4, 4, 4] if m else own.tolist())
    assert (weights is None) == (m == 0.0)


def test_each_pull_is_judged_from_the_one_before() -> None:
    rule = merger()
    rule.judge(model(10, 0, 0, 0), Moved(now=flat(9, 0, 0, 0), since=flat(0, 0, 0, 0)), now_s=0.0)
    # From (10, 0) the node went to (10, 1) and the parent to (10, 2).
    m, record = rule.judge(model(10, 2, 0, 0), Moved(now=flat(10, 1, 0, 0), since=flat(10, 0, 0, 0)), now_s=1.0)
    assert (m, record.agreement) == (1.0, pytest.approx(1.0))


def test_a_node_without_work_of_its_own_takes_the_parents() -> None:
    m, record = merger().judge(model(1, 1, 1, 1), None, now_s=0.0)
    assert (m, record.agreement) == (1.0, None)


@pytest.mark.parametrize("m", [0, 1, 0.25, "adaptive"])
def test_whole_numbers_are_numbers(m: float | str) -> None:
    merge = merge_into(MergeConfig(), {"client": m, "federation": m}, prefix="merge")
    assert (merge.client, merge.federation) == (m, m)


@pytest.mark.parametrize("m", ["all", 1.5, -1, [1]])
def test_anything_else_is_refused(m: Any) -> None:
    def check() -> None:
        problems = Problems()
        check_settings(merge_into(NodeSettings(), {"merge": {"client": m}}, prefix=""), "", problems)
        problems.check()

    with pytest.raises(ConfigError, match=r"merge\.client"):
        check()


def test_a_number_is_taken_as_it_is_and_nothing_is_remembered() -> None:
    rule = merger(0.25)
    m, record = rule.judge(model(1, 1, 1, 1), Moved(now=flat(1, 1), since=flat(0, 0)), now_s=0.0)
    assert (m, record.agreement, rule.last_parent_model) == (0.25, None, None)
