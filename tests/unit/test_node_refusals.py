"""An inner node refuses an update: by name, counted, and without a trace."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.nodes import (
    LAYOUT,
    NAMES,
    SHAPES,
    SPLIT,
    exchange,
    exchanging,
    fingerprint,
    make,
    of,
    pull,
    push,
    reason,
    update,
)

from worldlm_ray.aggregation.events import (
    Answer,
    Left,
    Note,
    Push,
)
from worldlm_ray.aggregation.node import Node
from worldlm_ray.config.federated import (
    ServerOptimizerConfig,
)
from worldlm_ray.errors import MessageError
from worldlm_ray.exchange.messages import Packed, pack
from worldlm_ray.records import VerdictRecord
from worldlm_ray.tensors.layout import make_layout

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
        packed_as(lambda p: Packed(p.header.replace(b"schema\x09", b"schema\x08"), p.values)),
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
