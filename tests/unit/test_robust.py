"""Aggregation that does not trust the children, and children that fall silent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.nodes import NAMES, SPLIT, START, make, of, push

from worldlm_ray.aggregation.children import patience_s
from worldlm_ray.aggregation.events import Clock, Heartbeat, Joined, Note
from worldlm_ray.config.federated import RobustConfig, StalenessConfig
from worldlm_ray.config.schema import LivenessConfig
from worldlm_ray.errors import ConfigError
from worldlm_ray.plan.plan import Plan
from worldlm_ray.records import LifeRecord

FIVE = ("a", "b", "c", "d", "e")
MEDIAN = {"robust": RobustConfig(rule="median"), "trigger": "synchronous"}
TRIMMED = {"robust": RobustConfig(rule="trimmed_mean", trim=0.2), "trigger": "synchronous"}


def of_five(rules: dict[str, Any], changes: list[float]) -> np.ndarray:
    node = make(FIVE, **rules)
    for name, change in zip(FIVE, changes, strict=True):
        push(node, name, 1, change=change, keys=change)
    assert node.version == 1
    return node.theta - START


def test_a_median_is_what_the_middle_child_says() -> None:
    np.testing.assert_allclose(of_five(MEDIAN, [1.0, 2.0, 3.0, 4.0, 1e6]), 3.0)


def test_a_trimmed_mean_drops_both_ends() -> None:
    np.testing.assert_allclose(of_five(TRIMMED, [-1e6, 2.0, 3.0, 4.0, 1e6]), 3.0)


@pytest.mark.parametrize("rules", [MEDIAN, TRIMMED])
def test_one_poisoned_child_of_five_moves_the_others_by_no_more_than_they_differ(rules: dict[str, Any]) -> None:
    honest = [0.9, 1.0, 1.1, 1.2]
    moved = of_five(rules, [*honest, -1e9])
    assert (moved >= min(honest) - 1e-6).all()
    assert (moved <= max(honest) + 1e-6).all()


def test_tokens_that_a_child_claims_buy_no_weight() -> None:
    node = make(FIVE, **MEDIAN)
    for name, change in zip(FIVE, [1.0, 2.0, 3.0, 4.0, 9.0], strict=True):
        push(node, name, 1, change=change, tokens=10**9 if name == "e" else 1)
    np.testing.assert_allclose(node.theta[:SPLIT] - START[:SPLIT], 3.0)


def test_a_child_that_pushes_often_is_heard_once() -> None:
    node = make(FIVE, robust=RobustConfig(rule="median"), buffer_size=5, staleness=StalenessConfig(fn="constant"))
    for seq in (1, 2, 3):
        push(node, "e", seq, change=100.0)
    for name in ("a", "b"):
        push(node, name, 1, change=1.0)
    np.testing.assert_allclose(node.theta[:SPLIT] - START[:SPLIT], 1.0)


def test_clipping_bounds_what_one_child_can_move() -> None:
    node = make(("a", "b"), robust=RobustConfig(clip_norm=1.0), trigger="synchronous")
    push(node, "a", 1, change=0.0, keys=0.0)
    push(node, "b", 1, change=1e6, keys=1e6)
    moved = node.theta - START
    # Uniform attention and equal tokens: half of the weight, so half of the bound.
    assert np.linalg.norm(moved) <= 0.5 * 1.0 + 1e-5
    assert np.linalg.norm(moved) > 0.4


def test_a_robust_fold_survives_a_restart() -> None:
    node, calm = (make(FIVE, **MEDIAN) for _ in range(2))
    for one in (node, calm):
        for name in ("a", "b"):
            push(one, name, 1, change=2.0)
    twin = make(FIVE, **MEDIAN)
    meta, arrays = node.state()
    twin.restore(meta, {name: np.array(values) for name, values in arrays.items()})
    for one in (twin, calm):
        for name, change in (("c", 5.0), ("d", 7.0), ("e", 9.0)):
            push(one, name, 1, change=change)
    assert twin.theta.tobytes() == calm.theta.tobytes()


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"robust": {"rule": "median"}}, "median of 1 updates trusts them all"),
        ({"robust": {"trim": 0.5}}, "below 0.5"),
        ({"robust": {"clip_norm": 0}}, "above 0"),
        ({"robust": {"rule": "mode"}}, "expected one of"),
        ({"robust": {"rule": "median"}, "buffer_size": 3, "residuals": {"per_round": 1}}, "does not score"),
    ],
)
def test_wrong_settings_say_so(tiny: Callable[..., Plan], rules: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(aggregation=rules)


# ---- silence -------------------------------------------------------------------------------------------------------


LIVENESS = LivenessConfig(k=6.0, grace_s=5.0)


def beats(node: Any, name: str, times: list[float]) -> None:
    for now_s in times:
        node.handle(Heartbeat(child=name, now_s=now_s))


def synchronous() -> Any:
    node = make(NAMES, trigger="synchronous", liveness=LIVENESS)
    for name in NAMES:
        node.handle(Joined(child=name, now_s=0.0))
    return node


def test_patience_is_the_childs_own_rhythm() -> None:
    assert patience_s([], LIVENESS) == 5.0
    assert patience_s([1.0] * 16, LIVENESS) == 5.0, "never shorter than the grace"
    slow = [20.0, 22.0, 18.0, 20.0, 21.0, 19.0, 20.0, 20.0]
    assert patience_s(slow, LIVENESS) == pytest.approx(20.0 + 6.0 * 0.5)
    assert patience_s([*slow, 500.0], LIVENESS) < 40.0, "one long gap does not change the rhythm"


def test_a_synchronous_node_waits_no_longer_for_a_silent_child_and_takes_it_back() -> None:
    node = synchronous()
    push(node, "a", 1, now_s=1.0)
    push(node, "b", 1, now_s=1.0)
    assert node.version == 0, "c may still come"
    beats(node, "a", [2.0, 3.0, 4.0, 5.0])
    beats(node, "b", [2.0, 3.0, 4.0, 5.0])
    commands = node.handle(Clock(now_s=5.5))
    lost = [note.record for note in of(Note, commands) if isinstance(note.record, LifeRecord)]
    assert [(record.node, record.event) for record in lost] == [("world/c", "lost")]
    assert node.version == 1
    back = node.handle(Heartbeat(child="c", now_s=9.0))
    assert [note.record.detail for note in of(Note, back) if isinstance(note.record, LifeRecord)] == ["is back"]
    push(node, "a", 2, base=1, now_s=10.0)
    push(node, "b", 2, base=1, now_s=10.0)
    assert node.version == 1, "c is waited for again"
    push(node, "c", 1, now_s=11.0)
    assert node.version == 2


def test_time_in_which_a_node_was_dead_is_no_silence_of_its_children() -> None:
    node = synchronous()
    meta, arrays = node.state()
    twin = synchronous()
    twin.restore(meta, {name: np.array(values) for name, values in arrays.items()})
    twin.handle(Clock(now_s=1_000.0))
    assert all(child.is_active for child in twin.children.values())
    for now_s in (1_002.0, 1_004.0, 1_006.0):
        beats(twin, "a", [now_s])
    twin.handle(Clock(now_s=1_006.0))
    assert [child.is_active for child in twin.children.values()] == [True, False, False], "from then on it is"
