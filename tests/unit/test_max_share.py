"""No child has more than a share of an aggregation: of the backbone, and of every key layer."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.nodes import a_node
from support.worlds import client, two_levels

from worldlm_ray.aggregation import node_checkpoint
from worldlm_ray.aggregation.capped_fold import CappedFold, capped
from worldlm_ray.aggregation.events import Command, Note, Push
from worldlm_ray.aggregation.fold import OWN
from worldlm_ray.aggregation.node import Node
from worldlm_ray.aggregation.node_memory import node_bytes
from worldlm_ray.config.federated import (
    AggregationConfig,
    AttentionConfig,
    MergeConfig,
    RobustConfig,
    ServerOptimizerConfig,
)
from worldlm_ray.config.schema import BudgetConfig
from worldlm_ray.errors import CheckpointError, ConfigError
from worldlm_ray.exchange.messages import Update, pack
from worldlm_ray.plan.plan import Plan
from worldlm_ray.records import AttentionRecord
from worldlm_ray.tensors.layout import Layout


def log(value: float) -> float:
    return math.log(value) if value else -math.inf


def cut(weights: list[float], share: float, own: float) -> tuple[list[float], float]:
    """What `capped` makes of weights, without the logarithms."""
    found, rest = capped([log(weight) for weight in weights], share, own=log(own))
    return [math.exp(value) for value in found], math.exp(rest)


@pytest.mark.parametrize(
    ("weights", "share", "own", "expected", "rest"),
    [
        ([1, 1], 0.5, 0.0, [1, 1], 0.0),
        ([10, 1], 0.5, 0.0, [1, 1], 0.0),
        ([10, 1, 1], 0.5, 0.0, [2, 1, 1], 0.0),
        ([1, 100, 50, 1], 0.4, 0.0, [1, 4, 4, 1], 0.0),
        ([10, 1], 0.5, 3.0, [4, 1], 3.0),
        ([10], 0.25, 0.0, [10], 30.0),  # too few children: the node's own model has the rest
        ([10, 1], 0.4, 0.0, [1, 1], 0.5),
        ([10, 1, 0], 0.4, 0.0, [1, 1, 0], 0.5),
        ([3, 1, 2], 1.0, 0.0, [3, 1, 2], 0.0),
        ([], 0.5, 1.0, [], 1.0),
    ],
)
def test_weights_are_cut_to_the_share(
    weights: list[float], share: float, own: float, expected: list[float], rest: float
) -> None:
    found, left = cut(weights, share, own)
    assert found == pytest.approx(expected)
    assert left == pytest.approx(rest)


@given(
    weights=st.lists(st.floats(1e-6, 1e15), min_size=1, max_size=9),
    share=st.floats(0.05, 1.0),
    own=st.one_of(st.just(0.0), st.floats(1e-3, 1e6)),
)
def test_no_weight_is_above_the_share_and_as_little_as_possible_is_cut(
    weights: list[float], share: float, own: float
) -> None:
    found, rest = cut(weights, share, own)
    whole = rest + math.fsum(found)
    assert max(found) <= share * whole * (1 + 1e-6)
    assert all(0 < now <= before * (1 + 1e-9) for now, before in zip(found, weights, strict=True))
    lower = [now for now, before in zip(found, weights, strict=True) if now < before * (1 - 1e-9)]
    assert all(now == pytest.approx(max(found)) for now in lower)


def a_world(layout: Layout, **rules: Any) -> Node:
    return a_node(
        path="world",
        children=("a", "b", "c"),
        aggregation=AggregationConfig(
            **(
                {
                    "buffer_size": 3,
                    "attention": AttentionConfig(score="uniform"),
                    "server_optimizer": ServerOptimizerConfig(lr=1.0),
                }
                | rules
            )
        ),
        merge=MergeConfig(),
        has_parent=False,
        layout=layout,
        initial=np.zeros(layout.size, np.float32),
        budget=BudgetConfig(rounds=100),
    )


def push(node: Node, sender: str, tokens: int, value: float, *, seq: int = 1) -> list[Command]:
    values = np.full(node.layout.size, value, np.float32)
    message = Update(
        sender=sender, seq=seq, base_version=node.version, tokens=tokens, started_tokens=tokens, values=values
    )
    return node.handle(Push(sender=sender, packed=pack(message, node.layout), now_s=1.0))


def shares(commands: list[Command]) -> dict[str, float]:
    """Largest attention weight of every candidate."""
    [record] = [c.record for c in commands if isinstance(c, Note) and isinstance(c.record, AttentionRecord)]
    return {name: max(row[index] for row in record.weights) for index, name in enumerate(record.candidates)}


def test_a_child_with_all_the_tokens_has_its_share_and_no_more(layout: Layout) -> None:
    """Without the cap the mean is the liar's 10; with a cap of a half it is 5 + 0.25 + 0.25 times 1."""
    for share, expected in ((1.0, 10.0), (0.5, 0.5 * 10 + 0.5 * 1)):
        node = a_world(layout, max_share=share)
        push(node, "a", 10**12, 10.0)
        push(node, "b", 5, 1.0)
        commands = push(node, "c", 5, 1.0)
        assert node.version == 1
        assert node.theta == pytest.approx(np.full(layout.size, expected), rel=1e-5)
        assert shares(commands)["a"] == pytest.approx(share, rel=1e-5)


def test_the_score_earns_no_child_more_than_its_share_either(layout: Layout) -> None:
    node = a_world(layout, max_share=0.4, attention=AttentionConfig(score="fedatt", temperature=0.01))
    node.published.theta = np.ones(layout.size, np.float32)
    push(node, "a", 5, 100.0)  # as far away as this, the softmax is all its own
    push(node, "b", 5, 1.0)
    found = shares(push(node, "c", 5, 1.0))
    assert found["a"] == pytest.approx(0.4)
    assert found["b"] == pytest.approx(0.3)
    assert found["c"] == pytest.approx(0.3)
    assert found[OWN] == 0.0


def test_where_one_child_comes_alone_the_own_model_has_the_rest(layout: Layout) -> None:
    node = a_world(layout, max_share=0.4)
    for seq in (1, 2, 3):
        commands = push(node, "a", 5, 10.0, seq=seq)
    assert node.version == 1
    assert node.theta[: layout.backbone_size] == pytest.approx(np.full(layout.backbone_size, 4.0))
    assert sum(value for name, value in shares(commands).items() if name == "a") <= 0.4


def test_equal_children_are_blended_as_without_a_cap(layout: Layout) -> None:
    plain, capped_ = a_world(layout), a_world(layout, max_share=0.34)
    for index, sender in enumerate("abc"):
        for node in (plain, capped_):
            push(node, sender, 5, float(index))
    assert capped_.theta == pytest.approx(plain.theta)


def test_a_fold_with_a_cap_survives_a_restart(layout: Layout) -> None:
    whole, before = a_world(layout, max_share=0.5), a_world(layout, max_share=0.5)
    for node in (whole, before):
        push(node, "a", 1_000, 10.0)
        push(node, "b", 5, 1.0)
    meta, arrays = before.state()
    again = a_world(layout, max_share=0.5)
    again.restore(json.loads(json.dumps(meta)), {name: values.copy() for name, values in arrays.items()})
    assert isinstance(again.intake.fold, CappedFold)
    for node in (whole, again):
        push(node, "c", 5, 1.0)
    assert again.theta.tobytes() == whole.theta.tobytes()


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ({"max_share": 0.5}, {}, r"max_share is 1\.0, but 1 children's .*; resume with aggregation\.max_share=0\.5$"),
        ({}, {"max_share": 0.5}, r"max_share is 0\.5, but .*; resume with aggregation\.max_share=1\.0$"),
        (
            {"robust": RobustConfig(rule="median")},
            {},
            r"robust\.rule is none, but .*; resume with aggregation\.robust\.rule=median$",
        ),
        (
            {},
            {"robust": RobustConfig(rule="median")},
            r"robust\.rule is median, .* aggregation\.robust\.rule=none$",
        ),
    ],
)
def test_an_open_aggregation_of_another_kind_is_refused_by_the_key(
    layout: Layout, before: dict[str, Any], after: dict[str, Any], said: str
) -> None:
    node = a_world(layout, **before)
    push(node, "a", 5, 1.0)
    meta, arrays = node.state()
    with pytest.raises(CheckpointError, match=rf"^world: aggregation\.{said}") as caught:
        a_world(layout, **after).restore(json.loads(json.dumps(meta)), arrays)
    assert "\n" not in str(caught.value)
    a_world(layout, **before).restore(meta, arrays)  # with the old value it goes on


def test_an_open_aggregation_of_an_earlier_version_is_told_apart(layout: Layout) -> None:
    node = a_world(layout, max_share=0.5)
    push(node, "a", 5, 1.0)
    meta, arrays = node.state()
    del meta["intake"]["fold"]["kind"], meta["intake"]["fold"]["rules"]
    with pytest.raises(CheckpointError, match=r"^world: aggregation\.max_share is 1\.0, .*its value of before$"):
        a_world(layout).restore(meta, arrays)


def test_kept_updates_are_not_copied_for_a_checkpoint(layout: Layout) -> None:
    node = a_world(layout, max_share=0.5)
    push(node, "a", 5, 1.0)
    assert {name for name in node.state()[1] if name.startswith("fold.") and not node_checkpoint.changes(name)} == {
        "fold.kept.0"
    }


def test_another_share_does_not_end_an_open_aggregation(layout: Layout) -> None:
    node = a_world(layout, max_share=0.5)
    push(node, "a", 5, 1.0)
    again = a_world(layout, max_share=0.4)
    again.restore(*node.state())
    assert again.state()[0]["intake"]["fold"]["contributors"] == ["a"]


def test_a_child_that_comes_twice_has_one_share(layout: Layout) -> None:
    node = a_world(layout, max_share=0.5)
    push(node, "a", 100, 1.0)
    push(node, "a", 100, 1.0, seq=2)
    push(node, "b", 1, 3.0)
    assert node.theta[0] == pytest.approx(0.5 * 1 + 0.5 * 3)


# ---- configuration -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"max_share": 0.0}, r"^aggregation\.max_share: got 0"),
        ({"max_share": 1.5}, r"^aggregation\.max_share: got 1\.5"),
        (
            {"max_share": 0.5},
            r"^world\.aggregation\.max_share: got 0\.5, but an aggregation of world .* one child",
        ),
        ({"max_share": 0.4, "buffer_size": 2}, r"raise buffer_size, or set it to 0\.5 or more here$"),
        ({"max_share": 0.4, "trigger": "synchronous"}, r"may have 2 children, with 0\.5 each"),
        ({"max_share": 0.5, "trigger": "time_up"}, r"raise quorum"),
        (
            {"max_share": 0.5, "trigger": "synchronous", "robust": {"rule": "median"}},
            r"robust\.rule median gives all children one weight; set it to 1 here$",
        ),
    ],
)
def test_a_share_that_cannot_be_kept_is_refused(tiny: Callable[..., Plan], rules: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(aggregation=rules)


def test_a_share_under_client_level_privacy_is_refused(tiny: Callable[..., Plan], tmp_path: Path) -> None:
    private = {"unit": "client", "noise_multiplier": 1.0}
    children = [client("a", tmp_path, 1), client("b", tmp_path, 2)]
    with pytest.raises(ConfigError, match="client-level privacy gives all children one weight"):
        tiny(children, privacy=private, aggregation={"max_share": 0.5, "buffer_size": 2})


def test_a_federation_may_have_another_share(tiny: Callable[..., Plan], tmp_path: Path) -> None:
    children = two_levels(tmp_path)
    children[0]["aggregation"] = {"max_share": 1.0, "buffer_size": 1}
    plan = tiny(children, aggregation={"max_share": 0.5, "buffer_size": 2})
    assert plan.node("world/north").settings.aggregation.max_share == 1.0
    assert plan.node("world/south").settings.aggregation.max_share == 0.5


def test_the_kept_updates_are_in_the_memory_that_show_prints() -> None:
    size: dict[str, Any] = {"backbone": 10, "keys": 0, "children": 9, "is_world": True}
    plain = node_bytes(AggregationConfig(buffer_size=4), **size)
    assert node_bytes(AggregationConfig(buffer_size=4, max_share=0.5), **size) == plain + 4 * 40
