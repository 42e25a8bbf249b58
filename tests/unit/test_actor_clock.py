"""How a process of a run learns the run time: which actor it asks, and what it does without an answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import GetTimeoutError, RayActorError

import actors.shared
from actors.shared import RECORDER, settle
from worldlm_ray.plan.rundir import STATUS
from worldlm_ray.run_clock import Anchor, RunClock, Stamp


class Cluster:
    """Actors by name, each with its answer: a run time, or an error."""

    def __init__(self, **answers: float | Exception) -> None:
        self.answers, self.asked = answers, list[str]()

    def get_actor(self, name: str, *, namespace: str) -> Any:
        self.asked.append(name)
        if name not in self.answers:
            raise ValueError(f"there is no actor {name} in {namespace}")
        return SimpleNamespace(run_time_s=SimpleNamespace(remote=lambda: self.answers[name]))

    def get(self, answer: float | Exception, *, timeout: float) -> float:
        assert timeout > 0.0
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Cluster, str], RunClock]:
    """The clock of a process on another machine than the one that its address was made on."""

    def make(cluster: Cluster, path: str) -> RunClock:
        monkeypatch.setattr(actors.shared, "ray", cluster)
        elsewhere = RunClock(Anchor(Stamp("elsewhere", 1e6), 10.0))
        return settle(elsewhere, "test", path, tmp_path)

    return make


def test_the_recorder_is_asked_first(settled: Callable[[Cluster, str], RunClock]) -> None:
    cluster = Cluster(recorder=500.0, world=900.0)
    clock = settled(cluster, "world/europe/a")
    assert set(cluster.asked) == {RECORDER}
    assert 500.0 <= clock.now_s() < 520.0


@pytest.mark.parametrize("error", [RayActorError(), GetTimeoutError()])
def test_a_recorder_that_is_dead_or_silent_is_passed_over(
    settled: Callable[[Cluster, str], RunClock], error: Exception
) -> None:
    cluster = Cluster(**{"recorder": error, "world/europe": 500.0})
    clock = settled(cluster, "world/europe/a")
    assert cluster.asked[:2] == [RECORDER, "world/europe"]
    assert 500.0 <= clock.now_s() < 520.0


def test_a_recorder_that_was_moved_asks_the_world(settled: Callable[[Cluster, str], RunClock]) -> None:
    cluster = Cluster(world=500.0)
    assert 500.0 <= settled(cluster, RECORDER).now_s() < 520.0
    assert set(cluster.asked) == {"world"}


def test_where_nobody_answers_the_run_folder_is_asked(
    settled: Callable[[Cluster, str], RunClock], tmp_path: Path
) -> None:
    (tmp_path / STATUS).write_text('{"now_s": 300.0}')
    cluster = Cluster()
    assert 300.0 <= settled(cluster, "world").now_s() < 320.0
    assert cluster.asked == [RECORDER]


def test_on_the_same_machine_nobody_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cluster = Cluster(recorder=500.0)
    monkeypatch.setattr(actors.shared, "ray", cluster)
    assert settle(RunClock.starting(7.0), "test", "world/a", tmp_path).now_s() < 27.0
    assert not cluster.asked
