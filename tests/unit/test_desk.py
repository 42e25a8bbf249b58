"""Where a ZeRO client and its workers meet: one task at a time, and groups that replace each other."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from actors import zero_client
from actors.zero_client import Desk, GroupLost, ZeroTrainer
from actors.zero_worker import LEAVE, Task
from worldlm_ray.errors import RunError
from worldlm_ray.plan.plan import Plan

OLD, NEW, STRANGER = ("token", "old"), ("token", "new"), ("another", "group")


def in_thread(call: Callable[[], Any]) -> Callable[[], Any]:
    """Start a call; the returned function waits for its result or raises what it raised."""
    executor = ThreadPoolExecutor(max_workers=1)
    future = executor.submit(call)
    executor.shutdown(wait=False)
    return lambda: future.result(timeout=5)


@pytest.fixture
def desk() -> Desk:
    made = Desk("token")
    made.started(OLD, 2)
    return made


def test_a_task_is_fetched_and_answered(desk: Desk) -> None:
    answer = in_thread(lambda: desk.ask(OLD, Task("read")))
    number = desk.next(OLD, 0, 5.0)
    assert number is not None
    assert desk.task(OLD, number) == Task("read")
    assert desk.task(OLD, number) == Task("read")  # every worker fetches it
    desk.done(OLD, number, "layers")
    assert answer() == "layers"
    assert desk.next(OLD, number, 0.01) is None  # no other task yet


def test_a_group_that_is_replaced_loses_its_task_and_leaves(desk: Desk) -> None:
    answer = in_thread(lambda: desk.ask(OLD, Task("run")))
    number = desk.next(OLD, 0, 5.0)
    assert number is not None
    desk.started(NEW, 1)
    with pytest.raises(GroupLost):
        answer()
    assert desk.next(NEW, 0, 0.01) is None, "the new group must be told what is known before it trains"
    assert desk.next(OLD, 0, 0.01) == LEAVE
    desk.done(OLD, number, "too late")
    again = in_thread(lambda: desk.ask(NEW, Task("write")))
    fresh = desk.next(NEW, 0, 5.0)
    assert fresh is not None
    desk.done(NEW, fresh, None)
    assert again() is None


def test_a_group_that_says_it_failed_is_lost_at_once(desk: Desk) -> None:
    answer = in_thread(lambda: desk.ask(OLD, Task("run")))
    assert desk.next(OLD, 0, 5.0)
    desk.failed(OLD, "the other end hung up")
    with pytest.raises(GroupLost):
        answer()
    assert desk.last_error == "the other end hung up"
    waiting = in_thread(lambda: desk.wait_for_group(OLD))
    desk.started(NEW, 1)
    assert waiting() == (NEW, 1)


def test_the_group_of_an_earlier_life_of_the_client_is_sent_away(desk: Desk) -> None:
    desk.started(STRANGER, 2)
    assert desk.next(STRANGER, 0, 0.01) == LEAVE
    desk.failed(STRANGER, "nobody cares")
    assert desk.wait_for_group(None) == (OLD, 2)


def test_workers_that_cannot_start_end_the_run() -> None:
    desk = Desk("token")
    waiting = in_thread(lambda: desk.wait_for_group(None))
    desk.failed(OLD, "ValueError: no such key")
    with pytest.raises(RunError, match="cannot start: ValueError: no such key"):
        waiting()


def test_later_groups_may_fail_a_few_times_at_their_start(desk: Desk) -> None:
    desk.failed(OLD, "killed")
    waiting = in_thread(lambda: desk.wait_for_group(OLD))
    desk.failed(NEW, "a neighbour was killed")
    desk.failed(NEW, "a neighbour was killed")  # the second worker of the same group
    desk.failed(("token", "third"), "a neighbour was killed")
    desk.started(("token", "fourth"), 2)
    assert waiting() == (("token", "fourth"), 2)


def test_the_end_of_ray_trains_run_is_heard(desk: Desk) -> None:
    answer = in_thread(lambda: desk.ask(OLD, Task("run")))
    assert desk.next(OLD, 0, 5.0)
    desk.end("its workers failed: no room")
    with pytest.raises(RunError, match="no room"):
        answer()
    assert desk.next(OLD, 0, 0.01) == LEAVE


def test_tasks_of_very_many_fast_rounds_stay_as_long_as_a_round(
    desk: Desk, tiny: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tiny()
    trainer = ZeroTrainer(desk, plan, plan.root.clients[0], tell=lambda event, text: None)
    lengths: list[int] = []

    def perform(task: Task) -> float:
        lengths.append(len(task.args[1]))
        return 1.0

    monkeypatch.setattr(zero_client.ray, "put", lambda value: value)
    monkeypatch.setattr(trainer, "_perform", perform)
    batch = (np.zeros((1, 2), np.int64), np.zeros((1, 2), np.int64))
    for _ in range(100):
        assert trainer.run([batch] * 7, lambda step: 0.1).steps == 7
    assert lengths == [4, 3, *[7] * 99]
