"""What a run says while it waits: who dies of want of memory, and what has not come up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from worldlm_ray.errors import Interrupted
from worldlm_ray.launch import calls
from worldlm_ray.launch.calls import Observer
from worldlm_ray.launch.monitor import AGAIN_S, LOOK_S, WAITING_S, Monitor, memory_warning
from worldlm_ray.launch.private.state import ActorState, Death

KILLED = (
    "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.7, ID: ab) was "
    "22.91GB used / 23.59GB limit (0.971174)\nOOM kill reason: Memory usage 24595692339B exceeded threshold of "
    "24059005542B (95.0% of 25325268992B limit)"
)
CRASHED = "Worker unexpectedly exits with a connection error code 2. End of file. There are some potential root causes."


class Cluster:
    """What Ray would say, and what was said of it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.dead: list[Death] = []
        self.known: dict[str, ActorState] = {}
        self.phases: list[str] = []
        self.warnings: list[str] = []
        self.troubles: list[str] = []
        observer = Observer(on_phase=self.phases.append, on_warning=self.warnings.append)
        self.monitor = Monitor(
            observer, deaths=lambda: list(self.dead), actors=lambda _: self.known, clock=lambda: self.now
        )

    def kill(self, number: int = 1) -> None:
        self.dead += [Death(0, True, KILLED)] * number

    def pass_time(self, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until:
            self.now += LOOK_S
            self.monitor.look()


def test_the_warning_names_the_figures() -> None:
    text = memory_warning([Death(0, True, KILLED)] * 3)
    assert text.startswith("Ray ends actors for want of memory (97% of 24 GB used, threshold 95%), 3 so far; ")


def test_a_text_of_another_version_of_ray_is_shown_as_it_is() -> None:
    text = memory_warning([Death(0, True, "The node is low on memory. Free some.\nmore")])
    assert text.startswith("Ray ends actors for want of memory (The node is low on memory), 1 so far; ")


def test_kills_are_told_within_seconds_then_once_a_minute_and_their_end_too() -> None:
    cluster = Cluster()
    cluster.monitor.begin("namespace", {}, on_trouble=cluster.troubles.append)
    cluster.pass_time(30.0)
    assert cluster.warnings == []
    cluster.kill()
    cluster.pass_time(LOOK_S)
    assert len(cluster.warnings) == 1
    for _ in range(10):
        cluster.kill()
        cluster.pass_time(LOOK_S)
    assert len(cluster.warnings) == 1
    cluster.pass_time(AGAIN_S)
    assert [text.split(", ")[2].split(";")[0] for text in cluster.warnings] == ["1 so far", "11 so far"]
    assert cluster.troubles == cluster.warnings
    cluster.pass_time(3 * AGAIN_S)
    assert cluster.troubles == [*cluster.warnings, ""]


def test_who_died_before_the_run_is_not_told() -> None:
    cluster = Cluster()
    cluster.kill(5)
    with cluster.monitor:
        pass
    cluster.pass_time(LOOK_S)
    assert cluster.warnings == []


def test_a_crash_is_no_want_of_memory_and_stands_in_the_line_of_what_is_waited_for() -> None:
    cluster = Cluster()
    names = {path: path for path in ("world", "world/a", "world/b", "world/c", "world/d")}
    cluster.monitor.begin("namespace", names, on_trouble=cluster.troubles.append)
    cluster.known = {
        "world/a": ActorState("RESTARTING", 4),
        "world/b": ActorState("PENDING_CREATION", 0),
        "world/c": ActorState("ALIVE", 0),
    }
    cluster.dead.append(Death(0, False, CRASHED))
    cluster.monitor.is_ready("world")
    cluster.pass_time(WAITING_S - LOOK_S)
    assert cluster.phases == []
    cluster.pass_time(LOOK_S)
    assert cluster.warnings == []
    assert cluster.phases == [
        "waiting for 4 of 5 nodes: world/a (is being started again, started again 4 times), world/b (has no process "
        "yet), world/c (gets ready: reads its text and its checkpoint) and 1 more; the last process that died: Worker "
        "unexpectedly exits with a connection error code 2. End of file"
    ]
    cluster.monitor.waiting.clear()
    cluster.pass_time(2 * WAITING_S)
    assert len(cluster.phases) == 1


def test_nothing_is_waited_for_once_the_run_has_begun_while_ray_was_asked() -> None:
    cluster = Cluster()
    cluster.monitor.begin("namespace", {"world": "world", "world/a": "world/a"}, on_trouble=cluster.troubles.append)

    def known(_: str) -> dict[str, ActorState]:
        if cluster.phases:
            cluster.monitor.waiting.clear()
        else:
            cluster.monitor.is_ready("world")
        return {}

    cluster.monitor.actors = known
    cluster.pass_time(3 * WAITING_S)
    assert cluster.phases == ["waiting for 1 of 2 nodes: world/a (unknown to Ray)"]


class FakeRay:
    """References that never come, but for those that are named `there`."""

    def wait(self, refs: list[str], **_: Any) -> tuple[list[str], list[str]]:
        return [ref for ref in refs if ref == "there"], [ref for ref in refs if ref != "there"]

    def get(self, refs: Any) -> Any:
        return refs


def test_waiting_ends_when_the_user_wants_to_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "ray", FakeRay())
    asked = iter([False, False, True])
    observer = Observer(should_stop=lambda: next(asked))
    with pytest.raises(Interrupted):
        observer.answer(["there", "never"])
    assert next(asked, None) is None
    assert Observer(should_stop=lambda: True).answer("there") == "there"
    actor = SimpleNamespace(ready=SimpleNamespace(remote=lambda: "never"))
    with pytest.raises(Interrupted):
        Observer(should_stop=lambda: True).ask(actor, "ready")
