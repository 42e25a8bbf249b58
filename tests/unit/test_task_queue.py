"""Where a ZeRO client and its workers meet: one task at a time, and groups that replace each other."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from actors.zero import trainer as zero_trainer
from actors.zero.tasks import LEAVE, GroupLost, Task, TaskQueue
from actors.zero.trainer import ZeroTrainer
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
def queue() -> TaskQueue:
    made = TaskQueue("token")
    made.started(OLD, 2)
    return made


def test_a_task_is_fetched_and_answered(queue: TaskQueue) -> None:
    answer = in_thread(lambda: queue.ask(OLD, Task("read")))
    number = queue.next(OLD, 0, 5.0)
    assert number is not None
    assert queue.task(OLD, number) == Task("read")
    assert queue.task(OLD, number) == Task("read")  # every worker fetches it
    queue.done(OLD, number, "layers")
    assert answer() == "layers"
    assert queue.next(OLD, number, 0.01) is None  # no other task yet


def test_a_group_that_is_replaced_loses_its_task_and_leaves(queue: TaskQueue) -> None:
    answer = in_thread(lambda: queue.ask(OLD, Task("run")))
    number = queue.next(OLD, 0, 5.0)
    assert number is not None
    queue.started(NEW, 1)
    with pytest.raises(GroupLost):
        answer()
    assert queue.next(NEW, 0, 0.01) is None, "the new group must be told what is known before it trains"
    assert queue.next(OLD, 0, 0.01) == LEAVE
    queue.done(OLD, number, "too late")
    again = in_thread(lambda: queue.ask(NEW, Task("write")))
    fresh = queue.next(NEW, 0, 5.0)
    assert fresh is not None
    queue.done(NEW, fresh, None)
    assert again() is None


def test_a_group_that_says_it_failed_is_lost_at_once(queue: TaskQueue) -> None:
    answer = in_thread(lambda: queue.ask(OLD, Task("run")))
    assert queue.next(OLD, 0, 5.0)
    queue.failed(OLD, "the other end hung up")
    with pytest.raises(GroupLost):
        answer()
    assert queue.last_error == "the other end hung up"
    waiting = in_thread(lambda: queue.wait_for_group(OLD))
    queue.started(NEW, 1)
    assert waiting() == (NEW, 1)


def test_the_group_of_an_earlier_life_of_the_client_is_sent_away(queue: TaskQueue) -> None:
    queue.started(STRANGER, 2)
    assert queue.next(STRANGER, 0, 0.01) == LEAVE
    queue.failed(STRANGER, "no effect")
    assert queue.wait_for_group(None) == (OLD, 2)


def test_workers_that_cannot_start_end_the_run() -> None:
    queue = TaskQueue("token")
    waiting = in_thread(lambda: queue.wait_for_group(None))
    queue.failed(OLD, "ValueError: no such key")
    with pytest.raises(RunError, match="cannot start: ValueError: no such key"):
        waiting()


def test_later_groups_may_fail_a_few_times_at_their_start(queue: TaskQueue) -> None:
    queue.failed(OLD, "killed")
    waiting = in_thread(lambda: queue.wait_for_group(OLD))
    queue.failed(NEW, "a neighbour was killed")
    queue.failed(NEW, "a neighbour was killed")  # the second worker of the same group
    queue.failed(("token", "third"), "a neighbour was killed")
    queue.started(("token", "fourth"), 2)
    assert waiting() == (("token", "fourth"), 2)


def test_the_end_of_ray_trains_run_is_heard(queue: TaskQueue) -> None:
    answer = in_thread(lambda: queue.ask(OLD, Task("run")))
    assert queue.next(OLD, 0, 5.0)
    queue.end("its workers failed: no room")
    with pytest.raises(RunError, match="no room"):
        answer()
    assert queue.next(OLD, 0, 0.01) == LEAVE


def test_tasks_of_very_many_fast_rounds_stay_as_long_as_a_round(
    queue: TaskQueue, tiny: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tiny()
    trainer = ZeroTrainer(queue, plan, plan.root.clients[0], tell=lambda event, text: None)
    lengths: list[int] = []

    def perform(task: Task) -> float:
        lengths.append(len(task.args[1]))
        return 1.0

    monkeypatch.setattr(zero_trainer.ray, "put", lambda value: value)
    monkeypatch.setattr(trainer, "_perform", perform)
    batch = (np.zeros((1, 2), np.int64), np.zeros((1, 2), np.int64))
    for _ in range(100):
        assert trainer.run([batch] * 7, lambda step: 0.1).steps == 7
    assert lengths == [4, 3, *[7] * 99]
