"""What a person sees while a run goes on, and how a person stops it."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from worldlm_ray.reports import progress
from worldlm_ray.reports.progress import MEASURING, TRAINING, Progress, Stop

SNAPSHOT: dict[str, Any] = {"run": "r", "progress": 0.5, "now_s": 1.0, "tokens": 10, "tokens_per_s": 1.0}
SNAPSHOT |= {"refused": {}, "accepted": 0, "nodes": {}, "trouble": ""}


class Pipe(Console):
    """A console that is no terminal; `waits_for` gives what it has once a text is in it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(file=io.StringIO(), width=80, **options)

    @property
    def text(self) -> str:
        assert isinstance(self.file, io.StringIO)
        return self.file.getvalue()

    def waits_for(self, wanted: Callable[[str], bool]) -> str:
        pause, deadline = threading.Event(), time.monotonic() + 20.0
        while not wanted(self.text):
            assert time.monotonic() < deadline, self.text
            pause.wait(0.01)
        return self.text


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "TICK_S", 0.01)


def test_a_long_phase_says_on_a_pipe_how_long_it_takes_and_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.05)
    out = Pipe()
    with Progress(out) as shown:
        shown.phase(MEASURING)
        shown.step("12 of 37 are measured")
        text = out.waits_for(lambda text: text.count("measuring the models: 12 of 37 are measured, for 0 s") >= 2)
    assert text.splitlines()[0].endswith("s] measuring the models")


def test_training_that_brings_nothing_new_says_so_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    monkeypatch.setattr(progress, "NOTHING_NEW_S", 0.1)
    out = Pipe()
    with Progress(out) as shown:
        shown.phase(TRAINING)
        out.waits_for(lambda text: "training, for 0 s" in text)
    assert len(out.text.splitlines()) < 10


def test_a_terminal_shows_the_phase_below_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    out = Pipe(force_terminal=True)
    with Progress(out) as shown:
        shown.phase("starting 3 nodes")
        out.waits_for(lambda text: "starting 3 nodes, for" in text)
        shown.notice("stopping: nothing has begun yet")
        text = out.waits_for(lambda text: "stopping: nothing has begun yet" in text)
    assert "\x1b" in text


def test_a_notice_goes_to_the_errors_of_a_pipe_unbroken() -> None:
    out, errors, long = Pipe(), Pipe(), "x" * 200
    with Progress(out, errors) as shown:
        shown.notice(long)
        errors.waits_for(lambda text: f"{long}\n" in text)
    assert out.text == ""


def test_an_alert_is_said_once_though_the_runs_files_repeat_it() -> None:
    out = Pipe()
    with Progress(out) as shown:
        shown.alert("Ray ends actors for want of memory")
        shown.warn([{"node": "r", "text": "Ray ends actors for want of memory"}])
        shown.warn([{"node": "world/a", "text": "another"}])
    assert out.text.splitlines() == ["WARNING Ray ends actors for want of memory", "WARNING world/a: another"]


class Left(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Codes with which the process would have ended."""
    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        raise Left

    monkeypatch.setattr(os, "_exit", leave)
    return codes


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_asks_and_the_second_leaves(
    number: signal.Signals, code: int, exits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(progress, "SAME_S", 0.0)
    before = signal.getsignal(number)
    with Stop(said.append) as stop:
        assert not stop.asked()
        signal.raise_signal(number)
        assert stop.asked()
        assert stop.code == code
        assert said == ["stopping: nothing has begun yet (once more to leave at once)"]
        with pytest.raises(Left):
            signal.raise_signal(number)
        assert exits == [code]
    assert signal.getsignal(number) is before


def test_signals_that_come_together_are_one_wish(exits: list[int]) -> None:
    said: list[str] = []
    with Stop(said.append) as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # `timeout` signals the process and then its group
        assert (len(said), exits, stop.code) == (1, [], 143)


@pytest.mark.parametrize(
    ("phases", "consequence"),
    [
        (["connecting to host:6379"], "nothing has begun yet"),
        (["starting Ray", TRAINING], "writing checkpoints"),
        ([TRAINING, "nothing was heard of the run for 60 s"], "writing checkpoints"),
        ([TRAINING, MEASURING], "the measures that are missing are left out"),
    ],
)
def test_the_answer_says_what_happens_in_this_phase(phases: list[str], consequence: str) -> None:
    said: list[str] = []
    with Stop(said.append) as stop:
        for phase in phases:
            stop.phase(phase)
        signal.raise_signal(signal.SIGINT)
    assert said == [f"stopping: {consequence} (once more to leave at once)"]
