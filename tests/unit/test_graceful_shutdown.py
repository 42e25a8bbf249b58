"""Actors whose process is told to end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

import actors.graceful_shutdown
from actors.graceful_shutdown import GracefulShutdown


class Speaker(GracefulShutdown):
    """Says what it was made to say."""

    def __init__(self, words: Callable[[], object]) -> None:
        self.words = words

    def shut_down(self) -> None:
        self.words()


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Why the process was to end, each time; it does not."""
    found: list[str] = []
    monkeypatch.setattr(actors.graceful_shutdown, "end_process", found.append)
    return found


def wait_for(ends: list[str], number: int = 1) -> None:
    deadline = threading.Event()
    for _ in range(1000):
        if len(ends) >= number:
            return
        deadline.wait(0.005)
    raise AssertionError("the process did not end")


def test_words_are_said_once_and_the_process_ends(ends: list[str]) -> None:
    said: list[str] = []
    actor = Speaker(lambda: said.append("here is my checkpoint"))
    actor._reclaim()
    actor._reclaim()
    wait_for(ends)
    assert (said, ends) == (["here is my checkpoint"], ["told to end"])
    assert actor.reclaimed


def test_whoever_cannot_speak_ends_all_the_same(ends: list[str]) -> None:
    Speaker(lambda: 1 / 0)._reclaim()
    wait_for(ends)
    assert ends == ["told to end, without a checkpoint: ZeroDivisionError('division by zero')"]


def test_whoever_speaks_for_too_long_ends(ends: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors.graceful_shutdown, "ENOUGH_S", 0.05)
    free = threading.Event()
    Speaker(free.wait)._reclaim()
    wait_for(ends)
    assert ends == ["told to end, and late"]
    free.set()
    wait_for(ends, 2)


def test_an_asynchronous_actor_speaks_on_its_loop_where_nothing_else_happens_then(ends: list[str]) -> None:
    said: list[threading.Thread] = []

    async def live() -> None:
        actor = Speaker(lambda: said.append(threading.current_thread()))
        actor.loop = asyncio.get_running_loop()
        await asyncio.to_thread(actor._reclaim)
        await asyncio.sleep(0.0)
        assert ends == ["told to end"]

    asyncio.run(live())
    assert said == [threading.current_thread()]
