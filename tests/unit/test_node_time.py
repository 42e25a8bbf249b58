"""An inner node whose clock misbehaves: no budget and no silence has a negative length."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from support.nodes import a_node

from worldlm_ray.aggregation.events import Clock, Heartbeat, Joined, Note, Pull, Serve, Started
from worldlm_ray.aggregation.node import Node
from worldlm_ray.config.federated import AggregationConfig, MergeConfig
from worldlm_ray.config.schema import BudgetConfig, LivenessConfig
from worldlm_ray.exchange.messages import pack
from worldlm_ray.records import LifeRecord
from worldlm_ray.tensors.layout import Layout


def a_world(layout: Layout, *, seconds: float = 100.0) -> Node:
    """Of two clients that have joined, with a budget of seconds."""
    node = a_node(
        path="world",
        children=("a", "b"),
        aggregation=AggregationConfig(),
        merge=MergeConfig(),
        has_parent=False,
        layout=layout,
        initial=np.zeros(layout.size, np.float32),
        budget=BudgetConfig(seconds=seconds),
        liveness=LivenessConfig(),
    )
    return node


def progress(node: Node, now_s: float) -> tuple[float, bool]:
    """What a child hears that pulls now; the message is one that can be sent."""
    [served] = [c for c in node.handle(Pull(child="a", started_tokens=0, now_s=now_s)) if isinstance(c, Serve)]
    pack(served.model, node.layout)
    return served.model.progress, served.model.finished


def test_the_progress_of_a_budget_of_seconds_never_falls(layout: Layout) -> None:
    node = a_world(layout)
    told = [
        progress(node, now_s) for now_s in (1_000.0, 1_030.0, -2_600.0, 0.0, math.nan, math.inf, -math.inf, 1_040.0)
    ]
    assert [share for share, _ in told] == pytest.approx([0.0, *[0.3] * 6, 0.4])
    assert not any(finished for _, finished in told)
    assert progress(node, 1_100.0) == (1.0, True)


@pytest.mark.parametrize("written", [True, False])
def test_a_restart_with_a_clock_that_is_behind_makes_no_progress_negative(layout: Layout, written: bool) -> None:
    node = a_world(layout)
    progress(node, 500.0)
    progress(node, 540.0)
    meta, arrays = node.state()
    again = a_world(layout)
    again.restore(json.loads(json.dumps(meta | ({"now_s": 540.0} if written else {}))), arrays)
    again.handle(Started())
    share, finished = progress(again, 3.0)
    assert share == pytest.approx(0.4 if written else 0.0)
    assert not finished
    assert progress(again, 575.0)[0] == pytest.approx(0.75)


def test_a_clock_that_steps_silences_nobody_and_hides_no_silence(layout: Layout) -> None:
    node = a_world(layout)
    for name in ("a", "b"):
        node.handle(Joined(child=name, incarnation=1, seq=0, now_s=0.0))
    for second in range(1, 21):
        for name in ("a", "b"):
            back_s = -3_600.0 if second == 10 else 0.0
            node.handle(Heartbeat(child=name, incarnation=1, to=1, now_s=second + back_s))
    assert all(min(child.gaps) >= 0.0 for child in node.children.values())
    node.handle(Heartbeat(child="b", incarnation=1, to=1, now_s=4_000.0))
    records = [c.record for c in node.handle(Clock(now_s=4_001.0)) if isinstance(c, Note)]
    [lost] = [record for record in records if isinstance(record, LifeRecord)]
    assert (lost.node, lost.event) == ("world/a", "lost")
    assert "silent for 3981 s" in lost.detail
