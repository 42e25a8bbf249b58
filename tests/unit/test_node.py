"""The state machine of an inner node: what it accepts, when it aggregates, and to what numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.nodes import (
    FEDBUFF,
    LAYOUT,
    NAMES,
    SHAPES,
    SPLIT,
    START,
    answer,
    begun,
    body,
    exchange,
    exchanging,
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
    Answer,
    Clock,
    Command,
    Done,
    Exchange,
    Finish,
    Joined,
    Left,
    Note,
    Push,
    Refresh,
    Saved,
    Serve,
    Shared,
    Started,
    UpdateSent,
    Wake,
)
from worldlm_ray.aggregation.node import Node
from worldlm_ray.config.federated import (
    AttentionConfig,
    ServerOptimizerConfig,
    StalenessConfig,
)
from worldlm_ray.config.schema import BudgetConfig
from worldlm_ray.errors import CheckpointError, MessageError
from worldlm_ray.exchange.messages import Model, Packed, Update, pack
from worldlm_ray.records import AttentionRecord, MergeRecord, VerdictRecord
from worldlm_ray.storage import checkpoint
from worldlm_ray.tensors.buffers import Flat
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


def test_self_weight_counts_as_so_many_children() -> None:
    node = make(buffer_size=3, attention=AttentionConfig(score="uniform", self_weight=1.0))
    for name in NAMES:
        push(node, name, 1, keys=4.0)
    assert keys(node) == pytest.approx([13, 23, 33, 43])  # three quarters of the way


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


# ---- refusals ----------------------------------------------------------------------------------------------


def poisoned(index: int, value: float) -> Callable[[], Push]:
    def build() -> Push:
        message = update("b", 1, base=2)
        message.values[index] = value
        return Push(sender="b", packed=pack(message, LAYOUT), now_s=1.0)

    return build


def pushed(sender: str = "b", *, claims: str | None = None, **fields: Any) -> Callable[[], Push]:
    fields = {"seq": 1, "base": 2} | fields
    return lambda: Push(sender=sender, packed=pack(update(claims or sender, **fields), LAYOUT), now_s=1.0)


def packed_as(change: Callable[[Packed], Packed]) -> Callable[[], Push]:
    return lambda: Push(sender="b", packed=change(pack(update("b", 1, base=2), LAYOUT)), now_s=1.0)


def wrong_layout() -> Push:
    other = make_layout(SHAPES, ["head.*"], layers=0)
    return Push(sender="b", packed=pack(update("b", 1, base=2), other), now_s=1.0)


REFUSALS: dict[str, tuple[str, Callable[[], Push]]] = {
    "garbage header": ("malformed", packed_as(lambda p: Packed(b"\xc1garbage", p.values))),
    "empty header": ("malformed", packed_as(lambda p: Packed(b"", p.values))),
    "cut header": ("malformed", packed_as(lambda p: Packed(p.header[:-3], p.values))),
    "no tokens": ("malformed", pushed(tokens=0)),
    "negative tokens": ("malformed", pushed(tokens=-5)),
    "other schema": (
        "wrong_schema",
        packed_as(lambda p: Packed(p.header.replace(b"schema\x07", b"schema\x08"), p.values)),
    ),
    "other layout": ("wrong_layout", wrong_layout),
    "one value too few": ("wrong_shape", packed_as(lambda p: Packed(p.header, p.values[:-1]))),
    "two dimensions": ("wrong_shape", packed_as(lambda p: Packed(p.header, p.values[None]))),
    "double precision": ("wrong_shape", packed_as(lambda p: Packed(p.header, p.values.astype(np.float64)))),
    "a list": ("wrong_shape", packed_as(lambda p: Packed(p.header, p.values.tolist()))),
    "no buffer": ("wrong_shape", packed_as(lambda p: Packed(p.header, None))),
    "stranger": ("unknown_sender", pushed("mallory")),
    "another's name": ("unknown_sender", pushed("b", claims="c")),
    "a stranger's name": ("unknown_sender", pushed("b", claims="mallory")),
    "child that left": ("unknown_sender", pushed("gone")),
    "same seq again": ("duplicate", pushed("a", seq=4)),
    "lower seq": ("duplicate", pushed("a", seq=3)),
    "seq zero": ("duplicate", pushed(seq=0)),
    "from the future": ("future_version", pushed(base=3)),
    "too old": ("stale", pushed(base=0)),
    "nan in the backbone": ("not_finite", poisoned(0, math.nan)),
    "inf in the backbone": ("not_finite", poisoned(SPLIT - 1, math.inf)),
    "nan in the keys": ("not_finite", poisoned(SPLIT, math.nan)),
    "-inf in the keys": ("not_finite", poisoned(-1, -math.inf)),
    "too large": ("norm_exceeded", pushed(change=3.0)),  # sqrt(27) = 5.2
}


@pytest.fixture
def busy() -> Node:
    """A federation at version 2, in the middle of a fold, with momentum and an exchange under way."""
    optimizer = ServerOptimizerConfig(name="nesterov")
    node = make(
        (*NAMES, "gone"),
        parent=True,
        buffer_size=2,
        max_staleness=1,
        max_update_norm=5.0,
        push_every=2,
        server_optimizer=optimizer,
    )
    for seq, sender in enumerate(("a", "gone"), start=1):
        push(node, sender, seq, change=1.0)
    push(node, "a", 2, base=1, change=0.5)
    exchange(node, push(node, "a", 3, base=1, change=0.5))
    push(node, "a", 4, base=2, change=0.25)
    node.handle(Left(child="gone", now_s=0.5))
    assert (node.version, exchanging(node), node.intake.refused) == (2, True, {})
    assert "fold.first" in node.state()[1]
    return node


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_is_named_counted_and_leaves_no_trace(name: str, busy: Node) -> None:
    expected, event = REFUSALS[name]
    theta, before = busy.theta, fingerprint(busy, counters=False)
    commands = busy.handle(event())
    assert reason(commands) == expected
    assert busy.intake.refused == {expected: 1}
    assert fingerprint(busy, counters=False) == before
    assert busy.theta is theta


@pytest.mark.parametrize("name", ["garbage header", "stranger", "same seq again", "nan in the keys", "too large"])
def test_a_refusal_tells_the_sender_and_tracking_and_nobody_else(name: str, busy: Node) -> None:
    expected, event = REFUSALS[name]
    reply, note = busy.handle(event())
    assert isinstance(reply, Answer)
    assert not reply.verdict.accepted
    assert isinstance(note, Note)
    assert isinstance(note.record, VerdictRecord)
    assert note.record.verdict == expected
    assert note.record.sender == event().sender
    assert note.record.detail


def test_refusals_add_up_by_name(busy: Node) -> None:
    for name in ("nan in the keys", "too old", "nan in the backbone"):
        busy.handle(REFUSALS[name][1]())
    assert busy.intake.refused == {"not_finite": 2, "stale": 1}


@pytest.mark.parametrize("trigger", ["goal_achieved", "synchronous", "time_up"])
def test_every_refusal_leaves_a_node_with_any_trigger_as_it_was(trigger: str) -> None:
    node = make(trigger=trigger, buffer_size=2, quorum=2)
    push(node, "c", 1, change=1.0)
    before = fingerprint(node, counters=False)
    for event in (
        pushed("c", base=0),
        pushed(base=1),
        poisoned(0, math.nan),
        wrong_layout,
        pushed("mallory"),
    ):
        assert not of(Answer, node.handle(event()))[0].verdict.accepted
        assert fingerprint(node, counters=False) == before


def test_the_limits_themselves_are_accepted(busy: Node) -> None:
    assert reason(push(busy, "b", 1, base=1)) == "accepted"  # tau = max_staleness
    norm = np.array([3, 4, 0], np.float32)
    assert reason(push(busy, "b", 2, base=2, change=norm)) == "accepted"  # |(3, 4, 0)| = max_update_norm


def test_a_seq_may_skip_numbers() -> None:
    node = make()
    assert [reason(push(node, "a", seq)) for seq in (2, 7, 5, 8)] == [
        "accepted",
        "accepted",
        "duplicate",
        "accepted",
    ]


def test_a_refused_child_may_go_on_with_its_next_update(busy: Node) -> None:
    assert reason(push(busy, "b", 1, base=0)) == "stale"
    assert reason(push(busy, "b", 1, base=2)) == "accepted"


def test_finite_values_that_overflow_the_sum_are_refused() -> None:
    # 1e38 is a finite fp32 number, but 64 tokens times 1e38 is not: theta would become infinite.
    node = make(buffer_size=1)
    before = fingerprint(node, counters=False)
    assert reason(push(node, "a", 1, tokens=64, change=1e38)) == "not_finite"
    assert fingerprint(node, counters=False) == before


def test_finite_key_layers_that_overflow_the_blend_never_reach_theta() -> None:
    # 3e38 + 3e38 is infinite before the blend is normalised: the key part has a bound too.
    node = make(("a", "b"), buffer_size=2)
    for name in ("a", "b"):
        push(node, name, 1, keys=3e38)
    assert np.isfinite(node.theta).all()


def test_a_huge_update_does_not_poison_adam() -> None:
    # The square of 1e25 is infinite in fp32, and a variance of infinity would never come down again.
    node = make(("a",), server_optimizer=ServerOptimizerConfig(name="adam"))
    push(node, "a", 1, tokens=1, change=1e25)
    assert np.isfinite(node.optimizer.buffers["variance"]).all()


def test_a_pull_of_a_stranger_is_an_error() -> None:
    with pytest.raises(MessageError, match="unknown_sender"):
        pull(make(), "mallory")


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


# ---- a federation and its parent ---------------------------------------------------------------------------


def federation(**changes: Any) -> Node:
    return make(**({"parent": True, "buffer_size": 1} | changes))


def test_an_exchange_is_due_after_push_every_aggregations() -> None:
    node = federation(push_every=2)
    assert of(Exchange, push(node, "a", 1, tokens=10, change=1.0, started=100)) == []
    sent = exchange(node, push(node, "b", 1, base=1, tokens=20, change=2.0, started=50))
    assert (sent.sender, sent.seq, sent.base_version) == ("europe", 1, 0)
    assert (sent.tokens, sent.started_tokens) == (30, 150)
    np.testing.assert_allclose(sent.values[:SPLIT], 3.0)
    np.testing.assert_array_equal(sent.values[SPLIT:], node.theta[SPLIT:] - START[SPLIT:])


def test_there_is_one_exchange_at_a_time() -> None:
    node = federation()
    assert exchange(node, push(node, "a", 1)).seq == 1
    assert of(Exchange, push(node, "b", 1)) == []
    assert exchange(node, answer(node, parent_model(1, 0.0))).seq == 2


def test_the_first_child_of_all_waits_for_news_of_the_parent(tmp_path: Path) -> None:
    node = federation(optional=NAMES)
    assert node.children.have_never_joined
    assert of(Refresh, node.handle(Joined(child="a", now_s=1.0)))
    assert not node.children.have_never_joined
    assert of(Serve, pull(node, "a")) == [], "it would begin from what was there before the run"
    assert not of(Refresh, node.handle(Joined(child="b", now_s=1.0))), "once"
    twin = saved_and_loaded(node, tmp_path, federation(optional=NAMES))
    assert twin.handle(Started()) == [Refresh()]
    [serve] = of(Serve, answer(node, parent_model(3, 8.0, keys=5.0)))
    assert serve.model.version == 1
    np.testing.assert_array_equal(serve.model.values[:SPLIT], 8.0)
    np.testing.assert_array_equal(serve.model.values[SPLIT:], 5.0)
    sent = exchange(node, push(node, "a", 1, base=1, change=2.0, keys=1.0))
    assert sent.base_version == 3
    np.testing.assert_array_equal(sent.values[:SPLIT], 2.0)


def test_news_of_a_parent_that_has_none_keep_nobody_waiting() -> None:
    node = federation(optional=NAMES)
    node.handle(Joined(child="a", now_s=1.0))
    pull(node, "a")
    [serve] = of(Serve, answer(node, parent_model(0, 8.0)))
    assert serve.model.version == 0


@pytest.mark.parametrize("comes", ["a", "e"])
def test_who_comes_where_all_have_left_begins_from_what_the_parent_has_learned_since(comes: str) -> None:
    node = federation()
    exchange(node, push(node, NAMES[0], 1, change=2.0))
    answer(node, parent_model(1, 2.0))
    for name in NAMES:
        node.handle(Left(child=name, now_s=5.0))
    assert of(Refresh, node.handle(Joined(child=comes, now_s=9.0)))
    assert of(Serve, pull(node, comes)) == [], "what it knows is old"
    [serve] = of(Serve, answer(node, parent_model(7, 8.0)))
    np.testing.assert_array_equal(serve.model.values[:SPLIT], 8.0)
    assert not of(Refresh, node.handle(Joined(child=NAMES[1], now_s=9.0))), "a child is here"


def test_one_that_is_done_and_joins_again_asks_for_no_news() -> None:
    node = federation()
    for name in NAMES:
        node.handle(Done(child=name, now_s=5.0))
    assert not of(Refresh, node.handle(Joined(child=NAMES[0], now_s=9.0)))


def test_the_world_never_exchanges() -> None:
    node = make(buffer_size=1)
    commands = [command for seq in range(1, 4) for command in push(node, "a", seq)]
    assert of(Exchange, commands) == []


@pytest.mark.parametrize(("merge", "expected"), [(0.0, [2, 3, 4]), (0.25, [3.5, 4.25, 5]), (1.0, [8, 8, 8])])
def test_merging_moves_the_backbone_a_share_of_the_way(merge: float, expected: list[float]) -> None:
    node = federation(merge=merge)
    exchange(node, push(node, "a", 1, change=1.0))  # own: 2, 3, 4
    answer(node, parent_model(5, 8.0, progress=0.5))
    assert body(node) == expected
    assert (node.parent.base_version, node.budget.progress, exchanging(node)) == (5, 0.5, False)


@pytest.mark.parametrize("merge", [0.0, 0.25, 1.0])
def test_work_done_during_an_exchange_is_kept_and_pushed_next(merge: float) -> None:
    node = federation(merge=merge)
    exchange(node, push(node, "a", 1, change=1.0))  # the anchor is 2, 3, 4
    push(node, "b", 1, base=1, change=[0.5, -1.0, 2.0])  # meanwhile: theta is 2.5, 2, 6
    assert body(node) == [2.5, 2, 6]
    sent = exchange(node, answer(node, parent_model(1, 8.0)))
    # theta + m (parent - anchor), with parent - anchor = 6, 5, 4
    assert body(node) == [2.5 + merge * 6, 2 + merge * 5, 6 + merge * 4]
    assert sent.values[:SPLIT].tolist() == [0.5, -1.0, 2.0]
    assert (sent.tokens, sent.base_version) == (10, 1)


def test_after_a_quiet_exchange_the_next_push_holds_only_new_work() -> None:
    node = federation(merge=0.5)
    exchange(node, push(node, "a", 1, change=1.0))
    answer(node, parent_model(1, 8.0))
    sent = exchange(node, push(node, "a", 2, base=1, change=0.25))
    assert sent.values[:SPLIT].tolist() == [0.25, 0.25, 0.25]


def test_key_layers_attend_to_the_parent_by_tokens() -> None:
    # Own mean tokens 10 against the parent's 30, uniform scores: a quarter own, three quarters the parent's.
    node = federation(children=("a",), buffer_size=1)
    exchange(node, push(node, "a", 1, tokens=10, keys=4.0))
    commands = answer(node, parent_model(1, 0.0, keys=8.0, tokens=30.0))
    assert keys(node) == pytest.approx([9.5, 12, 14.5, 17])
    [record] = [n.record for n in of(Note, commands) if isinstance(n.record, AttentionRecord)]
    assert isinstance(record, AttentionRecord)
    assert (record.direction, record.candidates) == ("down", ("(own)", "(parent)"))
    assert record.weights[0] == pytest.approx([0.25, 0.75])


def test_a_parent_of_version_zero_has_nothing_to_say() -> None:
    node = federation(push_every=1)
    exchange(node, push(node, "a", 1, change=1.0))
    theta, anchor = node.theta, node.parent.anchor
    answer(node, parent_model(0, 99.0, keys=99.0))
    assert node.theta is theta
    assert node.parent.anchor is anchor
    assert not exchanging(node)


def test_a_parents_word_that_the_run_is_finished_is_passed_on() -> None:
    node = federation()
    exchange(node, push(node, "a", 1))
    answer(node, parent_model(1, 0.0, finished=True))
    [serve] = of(Serve, pull(node, "a", started=99))
    assert serve.model.finished
    assert node.started_tokens == 0  # the round that is not begun does not count


def test_a_parents_higher_seq_is_taken_over() -> None:
    node = federation()
    exchange(node, push(node, "a", 1))
    answer(node, parent_model(1, 0.0, last_seq=7))
    assert exchange(node, push(node, "a", 2, base=1)).seq == 8


def test_synchronous_children_wait_for_the_exchange() -> None:
    node = federation(trigger="synchronous")
    push(node, "a", 1)
    assert of(Serve, pull(node, "a")) == []
    push(node, "b", 1)
    last = push(node, "c", 1)
    assert of(Serve, last) == []
    exchange(node, last)
    assert of(Serve, pull(node, "b")) == []
    served = of(Serve, answer(node, parent_model(1, 8.0)))
    assert [serve.child for serve in served] == ["a", "b"]
    assert served[0].model.values[:SPLIT].tolist() == [8, 8, 8]


def test_a_federation_passes_everything_on_before_it_finishes() -> None:
    node = federation(push_every=5)
    push(node, "a", 1, tokens=10, change=1.0)
    gone = [command for name in NAMES for command in node.handle(Done(child=name, now_s=1.0))]
    assert of(Finish, gone) == []
    assert exchange(node, gone).tokens == 10
    assert of(Finish, answer(node, parent_model(1, 0.0))) == [Finish()]
    assert of(Finish, node.handle(Clock(now_s=9.0))) == []


def test_work_left_over_from_an_exchange_is_pushed_before_the_finish() -> None:
    node = federation()
    exchange(node, push(node, "a", 1))
    push(node, "b", 1, change=0.5)  # waits
    for name in NAMES:
        node.handle(Done(child=name, now_s=1.0))
    second = answer(node, parent_model(1, 0.0))
    assert of(Finish, second) == []
    assert exchange(node, second).seq == 2
    assert of(Finish, answer(node, parent_model(2, 0.0))) == [Finish()]


# ---- budgets -----------------------------------------------------------------------------------------------


def test_a_budget_of_tokens_is_finished_when_so_many_have_been_started() -> None:
    node = make(("a", "b"), budget=BudgetConfig(tokens=100))
    [first] = of(Serve, pull(node, "a", started=50))
    [second] = of(Serve, pull(node, "b", started=50))
    [third] = of(Serve, pull(node, "a", started=100))
    assert [serve.model.finished for serve in (first, second, third)] == [False, False, True]
    assert node.started_tokens == 100


def test_progress_is_the_share_of_tokens_that_were_aggregated() -> None:
    node = make(("a",), budget=BudgetConfig(tokens=100))
    push(node, "a", 1, tokens=25)
    assert of(Serve, pull(node, "a"))[0].model.progress == 0.25
    push(node, "a", 2, tokens=500)
    assert of(Serve, pull(node, "a"))[0].model.progress == 1.0


def test_a_budget_of_seconds_is_finished_at_its_time() -> None:
    # Time counts from the first pull: starting the actors and reading the text is not training.
    node = make(("a",), budget=BudgetConfig(seconds=10.0))
    [first] = of(Serve, pull(node, "a", now_s=30.0))
    [early] = of(Serve, pull(node, "a", now_s=39.9))
    [late] = of(Serve, pull(node, "a", now_s=40.0))
    assert (first.model.finished, first.model.progress) == (False, 0.0)
    assert (early.model.finished, early.model.progress) == (False, pytest.approx(0.99))
    assert (late.model.finished, late.model.progress) == (True, 1.0)


def test_all_children_of_a_synchronous_round_hear_the_same() -> None:
    node = make(("a", "b"), trigger="synchronous", budget=BudgetConfig(tokens=100))
    for name in ("a", "b"):
        pull(node, name, started=50)
    for name in ("a", "b"):
        push(node, name, 1, tokens=50, started=50)
    served = [serve for name in ("a", "b") for serve in of(Serve, pull(node, name, started=100))]
    assert [serve.model.finished for serve in served] == [True, True]


def test_a_federation_does_not_judge_the_budget() -> None:
    node = make(("a",), parent=True, budget=BudgetConfig(tokens=10))
    assert not of(Serve, pull(node, "a", started=1_000))[0].model.finished


# ---- durability --------------------------------------------------------------------------------------------


def saved_and_loaded(node: Node, place: Path, fresh: Node) -> Node:
    """A new node in the state of the old one, by way of a checkpoint on disk."""
    checkpoint.save(place, *node.state())
    loaded = checkpoint.load(place)
    assert loaded is not None
    fresh.restore(*loaded)
    return fresh


def random_push(node: Node, sender: str, seq: int, rng: np.random.Generator) -> list[Command]:
    base = max(node.version - seq % 2, 0)
    change, layers = rng.standard_normal(3), rng.standard_normal(4)
    commands = push(node, sender, seq, base=base, tokens=7 + seq, change=change, keys=layers)
    assert reason(commands) == "accepted"
    return commands


STATES: dict[str, dict[str, Any]] = {
    "fresh": {"pushes": 0},
    "between aggregations": {"buffer_size": 2, "pushes": 4},
    "mid-fold": {"buffer_size": 3, "pushes": 5},
    "momentum": {"buffer_size": 2, "pushes": 5, "server_optimizer": ServerOptimizerConfig(name="nesterov")},
    "adam": {"buffer_size": 2, "pushes": 5, "server_optimizer": ServerOptimizerConfig(name="adam")},
    "cosine": {"buffer_size": 3, "pushes": 5, "attention": AttentionConfig()},
    "federation": {"buffer_size": 1, "pushes": 5, "parent": True, "merge": 0.25},
    "federation, mid-fold": {"buffer_size": 2, "pushes": 5, "parent": True, "merge": 0.25},
}


@pytest.mark.parametrize("name", STATES)
def test_a_restored_node_continues_to_the_same_bits(name: str, tmp_path: Path) -> None:
    rules = dict(STATES[name])
    pushes, rng = rules.pop("pushes"), np.random.Generator(np.random.PCG64(5))
    node = make(**rules)
    for index in range(pushes):
        if of(Exchange, random_push(node, NAMES[index % 3], index + 1, rng)):
            begun(node)
    twin = saved_and_loaded(node, tmp_path, make(**rules))
    assert fingerprint(twin) == fingerprint(node)
    assert twin.handle(Started()) == [Exchange()] * exchanging(node)
    rest = np.random.Generator(np.random.PCG64(6))
    other = np.random.Generator(np.random.PCG64(6))
    for index in range(pushes, pushes + 7):
        random_push(node, NAMES[index % 3], index + 1, rest)
        random_push(twin, NAMES[index % 3], index + 1, other)
        if index % 2 and (node.parent is not None):
            model = parent_model(index, [3, 1, 4], keys=[9, 19, 31, 42], tokens=12.0)
            for one in (node, twin):
                if of(Exchange, answer(one, model)):
                    begun(one)
        assert fingerprint(twin) == fingerprint(node)


def test_a_fold_that_outlives_a_merge_survives_a_restart(tmp_path: Path) -> None:
    # Every update is scored by the key layers that the node has when it arrives, restored or not.
    rules: dict[str, Any] = {"buffer_size": 2, "attention": AttentionConfig()}
    node = federation(**rules)
    push(node, "a", 1, keys=[1, 0, 0, 1])
    exchange(node, push(node, "b", 1, keys=[1, 1, 0, 1]))
    push(node, "a", 2, base=1, keys=[2, 0, 0, 2])
    answer(node, parent_model(1, 8.0, keys=START[SPLIT:] - 1, tokens=1e6))
    twin = saved_and_loaded(node, tmp_path, federation(**rules))
    for one in (node, twin):
        push(one, "b", 2, base=1, keys=[0, 2, 2, 0])
    assert twin.version == node.version == 2
    assert fingerprint(twin) == fingerprint(node)


def test_held_synchronous_updates_survive_a_restart(tmp_path: Path) -> None:
    node = make(trigger="synchronous")
    push(node, "c", 1, change=[1, 2, 3], keys=5.0)
    push(node, "a", 1, change=[4, 5, 6], keys=6.0)
    twin = saved_and_loaded(node, tmp_path, make(trigger="synchronous"))
    for one in (node, twin):
        push(one, "b", 1, change=[7, 8, 9], keys=7.0)
    assert twin.version == node.version == 1
    assert twin.theta.tobytes() == node.theta.tobytes()


def test_nothing_is_sent_that_no_checkpoint_knows(tmp_path: Path) -> None:
    node = federation()
    earlier = node.covers()
    push(node, "a", 1, change=1.0)
    made = begun(node)
    node.handle(Saved(covered=earlier))
    assert not node.may_send
    assert not node.outbox.after(0), "a parent that has come back and asks what it lacks must not get it either"
    twin = saved_and_loaded(node, tmp_path, federation())
    assert twin.may_send, "its own checkpoint knows it"
    node.handle(Saved(covered=node.covers()))
    assert node.may_send
    node.handle(UpdateSent())
    assert node.in_flight is made
    assert [update.seq for update in node.outbox.after(0)] == [1]


def test_an_update_in_flight_is_sent_again_with_the_same_seq(tmp_path: Path) -> None:
    node = federation()
    first = exchange(node, push(node, "a", 1, change=1.0, tokens=17))
    push(node, "b", 1, base=1, change=2.0)
    twin = saved_and_loaded(node, tmp_path, federation())
    sent, resent = vars(first).copy(), vars(exchange(twin, twin.handle(Started()))).copy()
    np.testing.assert_array_equal(sent.pop("values"), resent.pop("values"))
    assert sent == resent
    following = exchange(twin, answer(twin, parent_model(1, 8.0)))
    assert following.seq == 2
    np.testing.assert_allclose(following.values[:SPLIT], 2.0)


def test_resuming_without_an_exchange_does_nothing() -> None:
    assert federation().handle(Started()) == []


def test_duplicates_are_known_after_a_restart(tmp_path: Path) -> None:
    node = make()
    push(node, "a", 5)
    twin = saved_and_loaded(node, tmp_path, make())
    assert reason(push(twin, "a", 5)) == "duplicate"
    assert reason(push(twin, "a", 6)) == "accepted"


def test_a_restored_node_can_still_finish(tmp_path: Path) -> None:
    node = make(buffer_size=5)
    push(node, "a", 1)
    for name in ("a", "b"):
        node.handle(Done(child=name, now_s=1.0))
    twin = saved_and_loaded(node, tmp_path, make(buffer_size=5))
    assert of(Finish, twin.handle(Done(child="c", now_s=2.0))) == [Finish()]
    assert twin.published.tokens == 10


def test_a_checkpoint_of_another_layout_is_refused(tmp_path: Path) -> None:
    other = make(layout=make_layout(SHAPES, ["head.*"], layers=0))
    with pytest.raises(CheckpointError, match="another model or another choice of key layers"):
        saved_and_loaded(make(), tmp_path, other)


def test_a_saved_state_does_not_change_with_the_node() -> None:
    node = make(buffer_size=3)
    push(node, "a", 1)
    meta, _ = node.state()
    before = json.dumps(meta, sort_keys=True)
    push(node, "a", 1)  # a duplicate
    push(node, "b", 1)
    assert json.dumps(meta, sort_keys=True) == before


def test_a_shared_copy_takes_the_place_of_the_published_model_and_nothing_else_changes() -> None:
    node = federation()
    exchange(node, push(node, "a", 1, change=1.0))
    before, copy = fingerprint(node), node.theta.copy()
    node.handle(Shared(own=node.theta, copy=copy))
    assert node.theta is node.parent.anchor
    assert np.shares_memory(node.theta, copy)
    assert not node.theta.flags.writeable
    assert fingerprint(node) == before


def test_a_shared_copy_leaves_an_anchor_of_its_own_alone() -> None:
    node = federation()
    exchange(node, push(node, "a", 1, change=1.0))
    push(node, "b", 1, change=2.0)
    before, anchor = fingerprint(node), node.parent.anchor
    assert anchor is not node.theta
    node.handle(Shared(own=node.theta, copy=node.theta.copy()))
    assert node.parent.anchor is anchor
    assert fingerprint(node) == before


def test_a_shared_copy_may_be_of_the_update_in_flight() -> None:
    node = federation()
    sent = exchange(node, push(node, "a", 1, change=1.0))
    before, copy, theta = fingerprint(node), sent.values.copy(), node.theta
    node.handle(Shared(own=sent.values, copy=copy))
    assert np.shares_memory(begun(node).values, copy)
    assert node.theta is theta
    assert fingerprint(node) == before


def test_beginning_an_exchange_again_gives_the_same_update() -> None:
    node = federation()
    sent = exchange(node, push(node, "a", 1, change=1.0))
    push(node, "b", 1, change=2.0)
    assert begun(node) is sent


def test_the_published_model_cannot_be_written() -> None:
    node = make()
    for theta in (node.theta, (push(node, "a", 1), node.theta)[1]):
        with pytest.raises(ValueError, match="read-only"):
            theta[0] = 1.0


# ---- invariants over random histories ----------------------------------------------------------------------

OPERATIONS = (
    "push",
    "push",
    "push",
    "again",
    "late",
    "nan",
    "pull",
    "pull",
    "done",
    "left",
    "joined",
    "parent",
    "clock",
)
Operation = tuple[str, int, int]


class Walk:
    """Drives a node with well-formed children and bad ones, and checks what must hold after every event."""

    def __init__(self, trigger: str, *, parent: bool) -> None:
        self.node = make(
            trigger=trigger,
            parent=parent,
            merge=0.5,
            buffer_size=2,
            quorum=2,
            time_up_s=3.0,
            max_staleness=2,
            attention=AttentionConfig(),
            server_optimizer=ServerOptimizerConfig(name="nesterov"),
        )
        self.now_s = 0.0
        self.parent_version = 0
        self.seqs = dict.fromkeys(NAMES, 0)
        self.accepted: dict[str, list[int]] = {name: [] for name in NAMES}
        self.accepted_tokens = 0
        self.published: list[tuple[Flat, bytes]] = []
        self.version = 0
        self.exchanged_tokens = 0

    def do(self, operation: Operation) -> None:
        kind, child, number = operation
        name = NAMES[child]
        self.now_s += 1.0
        if kind == "parent" and exchanging(self.node):
            self.parent_version += abs(number)
            self._after(answer(self.node, parent_model(self.parent_version, number), now_s=self.now_s))
        elif kind == "clock":
            self._after(self.node.handle(Clock(now_s=self.now_s)))
        elif kind == "pull":
            self._after(pull(self.node, name, started=10, now_s=self.now_s))
        elif kind in ("done", "left", "joined"):
            event = {"done": Done, "left": Left, "joined": Joined}[kind]
            self._after(self.node.handle(event(child=name, now_s=self.now_s)))
        elif kind in ("push", "again", "late", "nan"):
            self._push(kind, name, number)

    def _push(self, kind: str, name: str, number: int) -> None:
        if kind in ("push", "late") and self.node.synchronous and self._contributed(name):
            return  # a synchronous child waits for its pull first
        self.seqs[name] += kind != "again"
        message = update(
            name,
            self.seqs[name],
            base=max(self.node.version - (number % 5 if kind == "late" else 0), 0),
            tokens=5 + number,
            change=math.nan if kind == "nan" else float(number),
            keys=float(number),
        )
        commands = send(self.node, message, now_s=self.now_s)
        if reason(commands) == "accepted":
            assert kind != "nan"
            self.accepted[name].append(message.seq)
            self.accepted_tokens += message.tokens
        self._after(commands)

    def _contributed(self, name: str) -> bool:
        meta = self.node.state()[0]["intake"]
        return name in meta["held"] or name in meta.get("fold", {}).get("contributors", ())

    def _after(self, commands: list[Command]) -> None:
        node = self.node
        assert node.version >= self.version
        self.version = node.version
        assert np.isfinite(node.theta).all()
        if not self.published or self.published[-1][0] is not node.theta:
            self.published.append((node.theta, node.theta.tobytes()))
        meta = node.state()[0]["intake"]
        folded = meta.get("fold", {}).get("tokens", 0)
        held = sum(entry["update"]["tokens"] for entry in meta["held"].values())
        assert node.published.tokens + folded + held == self.accepted_tokens
        if of(Exchange, commands):
            self.exchanged_tokens += begun(node).tokens
        if node.parent is not None:
            assert self.exchanged_tokens + node.to_parent.unpushed_tokens == node.published.tokens
        if of(Finish, commands):
            assert not folded
            assert not held
            assert not exchanging(node)
            assert not (node.parent is not None and node.parent.unpushed_tokens)
            assert not any(child.is_active for child in node.children.values())

    def end(self) -> None:
        for seqs in self.accepted.values():
            assert all(earlier < later for earlier, later in zip(seqs, seqs[1:], strict=False))
        for theta, as_published in self.published:
            assert theta.tobytes() == as_published


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    trigger=st.sampled_from(["goal_achieved", "synchronous", "time_up"]),
    parent=st.booleans(),
    operations=st.lists(
        st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 2), st.integers(-4, 4)),
        min_size=10,
        max_size=50,
    ),
)
def test_invariants_hold_over_random_histories(trigger: str, parent: bool, operations: list[Operation]) -> None:
    walk = Walk(trigger, parent=parent)
    for operation in operations:
        walk.do(operation)
    for name in NAMES:
        walk.do(("done", NAMES.index(name), 0))
    while exchanging(walk.node):
        walk.do(("parent", 0, 1))
    assert walk.node.ended
    walk.end()


def test_the_staleness_function_of_the_config_is_used() -> None:
    node = make(buffer_size=1, staleness=StalenessConfig(fn="harmonic"))
    to_version(node, 3)
    push(node, "a", 1, base=0, change=4.0)  # 1/(1 + 3)
    assert body(node) == pytest.approx([2, 3, 4])


def test_a_federation_that_had_finished_trains_again_when_its_run_goes_on() -> None:
    node = federation()
    node.budget.finished = True
    other = federation()
    other.restore(*node.state())
    [serve] = of(Serve, pull(other, "a"))
    assert not serve.model.finished


def test_a_world_with_a_larger_budget_goes_on() -> None:
    small = make(("a",), budget=BudgetConfig(tokens=50))
    pull(small, "a", started=50)
    push(small, "a", 1, tokens=50, started=50)
    [last] = of(Serve, pull(small, "a", started=100))
    assert last.model.finished
    large = make(("a",), budget=BudgetConfig(tokens=500))
    large.restore(*small.state())
    [again] = of(Serve, pull(large, "a", started=100))
    assert (again.model.finished, again.model.progress) == (False, 0.1)


# ---- what a child is told of its own work in the model -------------------------------------------------------


def served(node: Node, child: str) -> Model:
    [command] = [command for command in of(Serve, pull(node, child)) if command.child == child]
    return command.model


def test_a_child_is_told_its_share_of_the_movement_since_its_last_pull() -> None:
    # The rate is a child's share: a third.
    node = make(buffer_size=1, server_optimizer=ServerOptimizerConfig(), staleness=FEDBUFF)
    push(node, "a", 1, change=1.0)
    push(node, "b", 1, change=1.0)
    assert served(node, "a").share == pytest.approx(1 / 3)
    assert served(node, "a").share == 0.0  # it has moved no more
    assert served(node, "c").share == 0.0
    push(node, "b", 2, base=2, change=1.0)
    assert served(node, "b").share == pytest.approx((1 / math.sqrt(2) + 1) / 3)  # the first was one version old


def test_in_a_synchronous_round_the_share_is_that_of_the_tokens() -> None:
    node = make(("a", "b"), trigger="synchronous")
    push(node, "a", 1, tokens=10)
    push(node, "b", 1, tokens=30)
    assert (served(node, "a").share, served(node, "b").share) == (0.25, 0.75)


@pytest.mark.parametrize(("merge", "expected"), [(0.0, 0.5), (0.5, 0.3125), (1.0, 0.125)])
def test_the_share_follows_the_work_through_the_parent(merge: float, expected: float) -> None:
    # Half of the federation's movement is the child's; a quarter of the parent's movement is the federation's.
    node = federation(children=("a", "b"), merge=merge, trigger="synchronous")
    push(node, "a", 1, change=1.0)
    exchange(node, push(node, "b", 1, change=1.0))
    answer(node, parent_model(1, 3.0, share=0.25))
    assert served(node, "a").share == pytest.approx(expected)


def test_work_done_during_an_exchange_keeps_its_share() -> None:
    node = federation(children=("a", "b"), buffer_size=1, server_optimizer=ServerOptimizerConfig())
    exchange(node, push(node, "a", 1, change=1.0))
    push(node, "b", 1, base=1, change=1.0)
    answer(node, parent_model(1, 3.0, share=0.25))
    # Half of each one's work is in the federation's model; of a's, a quarter of that has come back through the parent.
    assert (served(node, "a").share, served(node, "b").share) == (0.125, 0.5)


@pytest.mark.parametrize(("lead", "m"), [([2.0, 2.0, 2.0], 1.0), ([-1.0, -1.0, 2.0], 0.0)])
def test_a_federation_follows_its_parent_while_both_go_the_same_way(lead: list[float], m: float) -> None:
    node = federation(merge="adaptive")
    exchange(node, push(node, "a", 1, change=1.0))
    before = body(node)
    commands = answer(node, parent_model(1, START[:SPLIT] + np.array(lead, np.float32)))
    [record] = [n.record for n in of(Note, commands) if isinstance(n.record, MergeRecord)]
    assert (record.m, record.agreement) == (m, pytest.approx(sum(lead) / math.sqrt(3 * sum(x * x for x in lead))))
    assert body(node) == ([a + b for a, b in zip(START[:SPLIT].tolist(), lead, strict=True)] if m else before)


def test_what_an_adaptive_federation_heard_survives_a_restart() -> None:
    node, again = federation(merge="adaptive"), federation(merge="adaptive")
    exchange(node, push(node, "a", 1, change=1.0))
    answer(node, parent_model(1, 5.0))
    meta, arrays = node.state()
    again.restore(meta, arrays)
    assert again.parent.merger.last_parent_model is not None
    assert again.parent.merger.last_parent_model[:SPLIT].tolist() == [5.0, 5.0, 5.0]
