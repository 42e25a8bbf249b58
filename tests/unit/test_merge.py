"""The rule by which a node moves to its parent, on numbers computed by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from worldlm_ray.aggregation.merge import Merger
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


def model(*values: float) -> Model:
    return Model(version=1, progress=0.0, finished=False, tokens=1.0, last_seq=0, values=flat(*values))


def merger(**attention: Any) -> Merger:
    rules = AggregationConfig(attention=AttentionConfig(score="uniform", **attention))
    return Merger(path="world/a", layout=LAYOUT, rules=rules, initial=flat(0, 0, 0, 0))


@pytest.mark.parametrize(("m", "body"), [(0.0, [3, 5]), (0.25, [4, 4]), (1.0, [7, 1])])
def test_the_backbone_moves_part_of_the_way_and_key_layers_are_blended(m: float, body: list[float]) -> None:
    rule, own, told = merger(), flat(3, 5, 8, 8), model(7, 1, 2, 2)
    out = flat(0, 0, 0, 0)
    assert rule.backbone(m, own, own, told, out=out) is None, "the anchor is the merged model itself"
    record = rule.keys(own, own, told, own_tokens=1.0, now_s=2.0, out=out)
    assert out.tolist() == [*body, 5, 5]  # of the key layers, half and half
    assert record is not None
    assert (record.node, record.version, record.now_s) == ("world/a", 1, 2.0)
    assert record.weights == ((0.5, 0.5),)


def test_what_was_learned_since_the_push_is_kept_whole() -> None:
    rule, told = merger(), model(7, 1, 2, 2)
    anchor = flat(3, 5, 8, 8)
    own, out = anchor + flat(10, 20, 30, 40), flat(0, 0, 0, 0)
    moved = rule.backbone(0.25, own, anchor, told, out=out)
    rule.keys(own, anchor, told, own_tokens=1.0, now_s=2.0, out=out)
    assert out.tolist() == [4 + 10, 4 + 20, 5 + 30, 5 + 40]
    assert moved is not None
    assert moved[:2].tolist() == [4, 4]


def test_personal_key_layers_stay() -> None:
    own, out = flat(3, 5, 8, 8), flat(0, 0, 0, 0)
    assert merger(personal=True).keys(own, own, model(7, 1, 2, 2), own_tokens=1.0, now_s=2.0, out=out) is None
    assert out[2:].tolist() == [8, 8]


@pytest.mark.parametrize("m", [0, 1, 0.25])
def test_whole_numbers_are_numbers(m: float) -> None:
    merge = merge_into(MergeConfig(), {"client": m, "federation": m}, prefix="merge")
    assert (merge.client, merge.client_m, merge.federation) == (m, m, m)


@pytest.mark.parametrize("name", ["validated", "apart"])
def test_a_client_of_two_models_trains_all_of_its_parents(name: str) -> None:
    merge = merge_into(MergeConfig(), {"client": name}, prefix="merge")
    assert (merge.has_base, merge.client_m, merge.models_per_token) == (True, 1.0, 2)


@pytest.mark.parametrize(
    ("key", "m"),
    [*(("client", m) for m in ("all", 1.5, -1, [1])), *(("federation", m) for m in ("validated", 1.5, -1, [1]))],
)
def test_anything_else_is_refused(key: str, m: Any) -> None:
    def check() -> None:
        problems = Problems()
        check_settings(merge_into(NodeSettings(), {"merge": {key: m}}, prefix=""), "", problems)
        problems.check()

    with pytest.raises(ConfigError, match=rf"merge\.{key}"):
        check()
