"""The state machine of an inner node: what it accepts, when it aggregates, and to what numbers."""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from support.nodes import (
    FEDBUFF,
    NAMES,
    SHAPES,
    SPLIT,
    START,
    answer,
    body,
    exchange,
    federation,
    fingerprint,
    keys,
    make,
    of,
    parent_model,
    pull,
    push,
    reason,
    send,
    to_version,
    update,
)

from worldlm_ray.aggregation.events import (
    Clock,
    Done,
    Finish,
    Joined,
    Left,
    Note,
    Serve,
    Wake,
)
from worldlm_ray.config.federated import (
    AttentionConfig,
    ServerOptimizerConfig,
)
from worldlm_ray.exchange.messages import Update
from worldlm_ray.records import AttentionRecord
from worldlm_ray.tensors.layout import make_layout

# ---- the numbers of an aggregation -------------------------------------------------------------------------


def test_staleness_shortens_the_step_as_in_fedbuff() -> None:
    # Updates of 1, 2, 3 with 10, 20, 30 tokens at tau 0, 1, 3, and s = (1 + tau)^-0.5:
    # (10*1*1 + 20*2*0.70711 + 30*3*0.5) / (10 + 20 + 30) = 83.28427 / 60 = 1.3880712
    # Dividing by the discounted weight, as FedScale does, gives 83.28427 / 39.14214 = 2.1277.
    node = make(buffer_size=3, staleness=FEDBUFF)
    to_version(node, 3)
    push(node, "a", 1, base=3, tokens=10, change=1.0)
    push(node, "b", 1, base=2, tokens=20, change=2.0)
    push(node, "c", 1, base=0, tokens=30, change=3.0)
    assert node.version == 4
    assert body(node) == pytest.approx([1 + 1.3880712, 2 + 1.3880712, 3 + 1.3880712], rel=1e-6)


@pytest.mark.parametrize(("tau", "step"), [(0, 4.0), (1, 4 / math.sqrt(2)), (3, 2.0)])
def test_a_lone_stale_update_makes_a_shorter_step(tau: int, step: float) -> None:
    node = make(buffer_size=1, staleness=FEDBUFF)
    to_version(node, 3)
    push(node, "a", 1, base=3 - tau, change=4.0)
    assert body(node) == pytest.approx([1 + step, 2 + step, 3 + step], rel=1e-6)


def test_staleness_is_in_the_prior_of_key_layers() -> None:
    # s = 1/2 at tau 3: 30 stale tokens weigh as much as 15 fresh ones. No child is absent.
    node = make(("a", "b"), buffer_size=2, staleness=FEDBUFF)
    to_version(node, 3)
    push(node, "a", 1, base=3, tokens=15, keys=0.0)
    push(node, "b", 1, base=0, tokens=30, keys=8.0)
    assert keys(node) == pytest.approx([14, 24, 34, 44])


@pytest.mark.parametrize("score", ["uniform", "cosine"])
@pytest.mark.parametrize("trigger", ["goal_achieved", "synchronous"])
def test_equal_fresh_children_reduce_to_the_plain_mean(score: str, trigger: str, rng: np.random.Generator) -> None:
    node = make(
        trigger=trigger,
        buffer_size=3,
        attention=AttentionConfig(score=score),
        server_optimizer=ServerOptimizerConfig(),
    )
    changes, layers = rng.standard_normal((3, 3)), rng.standard_normal((3, 4))
    for name, change, layer in zip(NAMES, changes, layers, strict=True):
        push(node, name, 1, change=change, keys=layer)
    np.testing.assert_allclose(node.theta[:SPLIT], START[:SPLIT] + changes.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(node.theta[SPLIT:], START[SPLIT:] + layers.mean(axis=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("score", ["uniform", "cosine", "dot", "fedamp", "fedatt"])
def test_children_that_agree_are_followed_whatever_the_score(score: str) -> None:
    node = make(buffer_size=3, attention=AttentionConfig(score=score))
    for seq in (1, 2):
        for name in NAMES:
            push(node, name, seq, base=seq - 1, change=1.0, keys=[1, -1, 3, 4])
    assert body(node) == [3, 4, 5]
    assert keys(node) == pytest.approx([12, 18, 36, 48])


def test_children_count_by_their_tokens() -> None:
    node = make(("a", "b"), buffer_size=2)
    push(node, "a", 1, tokens=30, change=1.0, keys=0.0)
    push(node, "b", 1, tokens=10, change=5.0, keys=8.0)
    assert body(node) == pytest.approx([3, 4, 5])  # (30*1 + 10*5) / 40 = 2
    assert keys(node) == pytest.approx([12, 22, 32, 42])


def test_attention_gives_more_to_the_child_that_moved_the_same_way() -> None:
    node = make(("a", "b"), buffer_size=2, attention=AttentionConfig(score="cosine", temperature=0.5))
    for name in ("a", "b"):
        push(node, name, 1, keys=[1, 0, 0, 1])
    # Both layers have moved by (1, 0) and (0, 1). a moves on; b goes across: cosines 1 and 0.
    push(node, "a", 2, base=1, keys=[1, 0, 0, 1])
    push(node, "b", 2, base=1, keys=[-1, 2, 2, -1])
    share = math.exp(2) / (math.exp(2) + 1)
    expected = START[SPLIT:] + [2 * share, 2 * (1 - share), 2 * (1 - share), 2 * share]
    assert keys(node) == pytest.approx(expected.tolist(), rel=1e-5)


def test_the_nodes_own_key_layers_stand_for_absent_children() -> None:
    # One of three children: its keys weigh a third, the node's own two thirds.
    node = make(buffer_size=1)
    push(node, "a", 1, keys=3.0)
    assert keys(node) == pytest.approx([11, 21, 31, 41])


def test_attention_weighs_absent_children_by_what_they_last_were() -> None:
    # One by one, a and b end where they would have ended together: neither is drowned by the node's own layers, which
    # of course are most like themselves.
    attention = AttentionConfig(score="cosine", temperature=0.5)
    node = make(("a", "b"), buffer_size=1, attention=attention)
    push(node, "a", 1, keys=[1, 0, 0, 1])
    push(node, "b", 1, base=1, keys=[1, 0, 0, 1])
    before = node.theta[SPLIT:].copy()
    push(node, "a", 2, base=2, keys=[1, 0, 0, 1])  # cosine 1
    [record] = [
        n.record
        for n in of(Note, push(node, "b", 2, base=2, keys=[-1, 2, 2, -1]))
        if isinstance(n.record, AttentionRecord)
    ]
    moved = before + np.float32([1, 0, 0, 1]) / 2 - START[SPLIT:]
    share = math.exp(cosine(moved[:2] + [-1, 2], moved[:2]) / 0.5)
    assert record.candidates == ("b", "(own)")
    assert record.weights[0][0] == pytest.approx(share / (share + math.exp(1 / 0.5)), rel=1e-5)


def test_a_stale_child_does_not_take_back_what_its_siblings_did() -> None:
    node = make(("a", "b"), buffer_size=1)
    for seq in range(1, 5):
        push(node, "a", seq, base=seq - 1, keys=2.0)
    assert keys(node) == pytest.approx([14, 24, 34, 44])
    push(node, "b", 1, base=0, keys=2.0)  # trained from the model before all that
    assert keys(node) == pytest.approx([15, 25, 35, 45])


def test_what_a_federation_sends_of_its_key_layers_is_their_change_against_its_parents() -> None:
    node = federation(children=("a",), buffer_size=1)
    sent = exchange(node, push(node, "a", 1, keys=4.0))
    assert sent.values[SPLIT:].tolist() == [4, 4, 4, 4]
    answer(node, parent_model(1, 0.0, keys=START[SPLIT:] + 2, tokens=10.0))
    assert keys(node) == pytest.approx([13, 23, 33, 43])
    twin = federation(children=("a",), buffer_size=1)
    twin.restore(*node.state())
    for one in (node, twin):
        sent = exchange(one, push(one, "a", 2, base=1, keys=1.0))
        assert sent.values[SPLIT:].tolist() == pytest.approx([2, 2, 2, 2])


def cosine(a: Any, b: Any) -> float:
    return float(np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))


@pytest.mark.parametrize(("lr", "step"), [(None, 1.0), (1.0, 3.0)])
def test_the_default_rate_is_a_childs_share_of_a_round(lr: float | None, step: float) -> None:
    node = make(buffer_size=1, server_optimizer=ServerOptimizerConfig(lr=lr))
    push(node, "a", 1, change=3.0)
    assert body(node) == pytest.approx([1 + step, 2 + step, 3 + step])


def test_attention_weights_are_reported_for_every_candidate() -> None:
    node = make(buffer_size=2)
    push(node, "a", 1)
    [record] = [n.record for n in of(Note, push(node, "b", 1)) if isinstance(n.record, AttentionRecord)]
    assert (record.direction, record.layers) == ("up", ("model.embed", "head"))
    assert record.candidates == ("a", "b", "(own)")
    assert [sum(row) for row in record.weights] == pytest.approx([1, 1])


def test_a_world_without_key_layers_averages_everything() -> None:
    layout = make_layout(SHAPES, [], layers=0)
    node = make(("a", "b"), layout=layout, buffer_size=2)
    for name, change in (("a", 1.0), ("b", 3.0)):
        values = np.full(layout.size, change, np.float32)
        send(node, Update(sender=name, seq=1, base_version=0, tokens=5, started_tokens=0, values=values))
    np.testing.assert_allclose(node.theta, START + 2)


# ---- triggers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_full_buffer_triggers_an_aggregation(size: int) -> None:
    node = make(buffer_size=size)
    versions = []
    for name in NAMES * 2:
        push(node, name, len(versions) + 1)
        versions.append(node.version)
    assert versions == [count // size for count in range(1, 7)]
    assert node.published.tokens == 10 * size * node.version


def test_one_child_may_fill_the_buffer_alone() -> None:
    node = make(buffer_size=2)
    push(node, "a", 1, change=1.0)
    push(node, "a", 2, change=3.0)
    assert node.version == 1
    assert body(node) == [3, 4, 5]


def synchronous_bits(trigger: str) -> set[bytes]:
    rng = np.random.Generator(np.random.PCG64(3))
    sent = [
        update(name, 1, tokens=tokens, change=rng.standard_normal(3), keys=rng.standard_normal(4) * 50)
        for name, tokens in zip(NAMES, (7, 11, 13), strict=True)
    ]
    found = set()
    for order in permutations(sent):
        node = make(trigger=trigger, buffer_size=3, attention=AttentionConfig(score="dot", temperature=1e3))
        for message in order:
            assert node.version == 0
            send(node, message)
        assert node.version == 1
        found.add(node.theta.tobytes())
    return found


def test_the_order_of_arrival_does_not_change_the_bits_of_a_synchronous_round() -> None:
    assert len(synchronous_bits("synchronous")) == 1
    assert len(synchronous_bits("goal_achieved")) > 1  # the same numbers do tell orders apart


def test_synchronous_pulls_wait_for_the_round_and_are_then_served_together() -> None:
    node = make(trigger="synchronous")
    assert [s.child for s in of(Serve, pull(node, "a"))] == ["a"]
    push(node, "a", 1)
    assert of(Serve, pull(node, "a")) == []
    push(node, "c", 1)
    assert of(Serve, pull(node, "c")) == []
    assert [s.child for s in of(Serve, pull(node, "b"))] == ["b"]  # it has not contributed yet
    served = of(Serve, push(node, "b", 1))
    assert [(s.child, s.model.version) for s in served] == [("a", 1), ("c", 1)]


def test_asynchronous_pulls_never_wait() -> None:
    node = make(buffer_size=3)
    push(node, "a", 1)
    [serve] = of(Serve, pull(node, "a"))
    assert (serve.model.version, serve.model.last_seq) == (0, 1)
    assert serve.model.values is node.theta


@pytest.mark.parametrize("first", ["a", "c"])
def test_a_synchronous_round_takes_one_update_of_each_child(first: str) -> None:
    # "a" is folded in at once, "c" is held for its turn: neither may push again before the version is made.
    node = make(trigger="synchronous")
    push(node, first, 1, tokens=10, change=3.0)
    before = fingerprint(node, counters=False)
    assert reason(push(node, first, 2, tokens=10, change=5.0)) == "out_of_turn"
    assert fingerprint(node, counters=False) == before
    for name in {"a", "b", "c"} - {first}:
        push(node, name, 1, tokens=10)
    assert (node.version, node.published.tokens, node.intake.accepted) == (1, 30, 3)


def test_time_up_waits_for_its_time() -> None:
    node = make(trigger="time_up", time_up_s=10.0, quorum=2)
    assert of(Wake, push(node, "a", 1, now_s=5.0)) == [Wake(at_s=15.0)]
    push(node, "b", 1, now_s=6.0)
    assert node.handle(Clock(now_s=14.9)) == []
    assert node.version == 0
    node.handle(Clock(now_s=15.0))
    assert node.version == 1


def test_time_up_waits_for_its_quorum() -> None:
    node = make(trigger="time_up", time_up_s=10.0, quorum=2)
    push(node, "a", 1, now_s=5.0)
    assert node.handle(Clock(now_s=15.0)) == []
    push(node, "b", 1, now_s=99.0)
    assert node.version == 1


def test_time_starts_anew_with_the_first_update_after_an_aggregation() -> None:
    node = make(trigger="time_up", time_up_s=10.0)
    push(node, "a", 1, now_s=5.0)
    node.handle(Clock(now_s=15.0))
    assert of(Wake, push(node, "b", 1, now_s=17.0)) == [Wake(at_s=27.0)]
    node.handle(Clock(now_s=20.0))
    assert node.version == 1


# ---- children that go and come -----------------------------------------------------------------------------


@pytest.mark.parametrize("event", [Done, Left])
def test_the_last_child_to_go_drains_the_buffer_and_finish_comes_once(event: type[Done] | type[Left]) -> None:
    node = make(buffer_size=5)
    push(node, "a", 1, change=3.0)
    commands = [command for name in NAMES for command in node.handle(event(child=name, now_s=1.0))]
    commands += node.handle(Clock(now_s=2.0))
    commands += node.handle(event(child="a", now_s=3.0))
    assert node.version == 1
    assert node.published.tokens == 10
    assert of(Finish, commands) == [Finish()]


def test_nothing_to_drain_still_finishes() -> None:
    node = make()
    commands = [command for name in NAMES for command in node.handle(Done(child=name, now_s=1.0))]
    assert commands == [Finish()]


@pytest.mark.parametrize("event", [Done, Left])
def test_a_child_that_went_no_longer_blocks_synchronous_rounds(event: type[Done] | type[Left]) -> None:
    node = make(trigger="synchronous")
    push(node, "a", 1)
    push(node, "c", 1)
    pull(node, "c")
    commands = node.handle(event(child="b", now_s=1.0))
    assert node.version == 1
    assert [s.child for s in of(Serve, commands)] == ["c"]
    push(node, "a", 2, base=1)
    push(node, "c", 2, base=1)
    assert node.version == 2


def test_what_a_child_had_pushed_stays_when_it_leaves() -> None:
    node = make(trigger="synchronous")
    push(node, "c", 1, tokens=30, change=2.0)
    node.handle(Left(child="c", now_s=1.0))
    push(node, "a", 1)
    push(node, "b", 1)
    assert node.published.tokens == 50
    assert body(node) == pytest.approx([1 + 60 / 50, 2 + 60 / 50, 3 + 60 / 50])


def test_a_child_that_left_is_a_stranger_until_it_joins_again() -> None:
    node = make()
    node.handle(Left(child="a", now_s=1.0))
    assert reason(push(node, "a", 1)) == "unknown_sender"
    node.handle(Joined(child="a", now_s=2.0))
    assert reason(push(node, "a", 1)) == "accepted"


def test_a_new_child_may_join() -> None:
    node = make(trigger="synchronous")
    node.handle(Joined(child="d", now_s=1.0))
    for name in NAMES:
        push(node, name, 1)
    assert node.version == 0
    push(node, "d", 1)
    assert node.version == 1


def test_a_child_that_comes_back_keeps_its_seq() -> None:
    node = make()
    push(node, "a", 3)
    node.handle(Left(child="a", now_s=1.0))
    node.handle(Joined(child="a", now_s=2.0))
    assert reason(push(node, "a", 3)) == "duplicate"
