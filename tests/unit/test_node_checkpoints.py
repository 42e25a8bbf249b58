"""An inner node's checkpoints: what a restart keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.nodes import (
    NAMES,
    SHAPES,
    SPLIT,
    START,
    answer,
    begun,
    exchange,
    exchanging,
    federation,
    fingerprint,
    make,
    of,
    parent_model,
    push,
    reason,
    saved_and_loaded,
)

from worldlm_ray.aggregation.events import (
    Command,
    Done,
    Exchange,
    Finish,
    Saved,
    Saving,
    Shared,
    Started,
    UpdateSent,
)
from worldlm_ray.aggregation.node import Node
from worldlm_ray.config.federated import (
    AttentionConfig,
    ServerOptimizerConfig,
)
from worldlm_ray.errors import CheckpointError
from worldlm_ray.tensors.layout import make_layout

# ---- durability --------------------------------------------------------------------------------------------


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
    with pytest.raises(CheckpointError, match=r"^world: .*another choice of key layers; set what has changed back$"):
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


@pytest.mark.parametrize("is_saving", [True, False])
def test_a_checkpoint_that_is_being_written_keeps_the_model_as_it_was(is_saving: bool) -> None:
    node = make(buffer_size=1)
    push(node, "a", 1, change=1.0)
    if is_saving:
        node.handle(Saving())
    _, arrays = node.state()
    before = arrays["theta"].copy()
    node.handle(Shared(own=node.theta, copy=node.theta.copy()))
    push(node, "b", 1, base=1, change=2.0)
    kept = np.array_equal(arrays["theta"], before)
    assert kept == is_saving, "else the model's buffer takes the next one"


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
