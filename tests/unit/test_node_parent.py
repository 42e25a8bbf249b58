"""An inner node and its parent: exchanges, merging and budgets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.nodes import (
    NAMES,
    SPLIT,
    START,
    answer,
    body,
    exchange,
    exchanging,
    federation,
    keys,
    make,
    of,
    parent_model,
    pull,
    push,
    saved_and_loaded,
)

from worldlm_ray.aggregation.events import (
    Clock,
    Done,
    Exchange,
    Finish,
    Joined,
    Left,
    Note,
    Refresh,
    Serve,
    Started,
)
from worldlm_ray.config.schema import BudgetConfig
from worldlm_ray.records import AttentionRecord, MergeRecord

# ---- a federation and its parent ---------------------------------------------------------------------------


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
    told = answer(node, parent_model(5, 8.0, progress=0.5))
    assert body(node) == expected
    [record] = [note.record for note in of(Note, told) if isinstance(note.record, MergeRecord)]
    assert (record.node, record.version, record.m) == (node.path, 5, merge)
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
