"""A child's side of the protocol: answers that are none, and links that fail on purpose."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.threaded_ray import FakeRay, Ref
from support.worlds import client

import actors.drivers
import actors.shared
from actors.drivers import FaultyLink, RayLink, References, carried, wait_for
from actors.shared import Address
from worldlm_ray.client.client import Client
from worldlm_ray.errors import MessageError
from worldlm_ray.exchange.messages import Update
from worldlm_ray.exchange.replies import Verdict, Welcome
from worldlm_ray.plan.plan import Plan
from worldlm_ray.protocol import child
from worldlm_ray.protocol.child import Lost, Send, Sleep, Uplink
from worldlm_ray.records import LifeRecord, Record
from worldlm_ray.run_clock import RunClock

Tiny = Callable[..., Plan]
PATH = "world/a"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    ray = FakeRay()
    for module in (actors.shared, actors.drivers):
        monkeypatch.setattr(module, "ray", ray)
    return ray


def a_plan(tiny: Tiny, folder: Path, **changes: Any) -> Plan:
    return tiny([client("a", folder, 1)], **changes)


class Liar:
    """A parent's handle: every method gives what it was told to, at once."""

    def __init__(self, **answers: Any) -> None:
        self.answers = {"join": Welcome(incarnation=1, last_seq=0, durable_seq=0)} | answers

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: Ref(lambda: self.answers[name]))


class Linked:
    """A client's steps, as references of a link to the given parent."""

    def __init__(self, fake: FakeRay, plan: Plan, parent: Liar, told: list[Record]) -> None:
        fake.actors["world"] = parent
        address, client_ = Address(plan, PATH, RunClock.starting(), "test"), Client(plan, plan.node(PATH))
        self.link = RayLink(address, client_)
        self.uplink = Uplink(plan, PATH, client_, tell=told.append, now_s=address.clock.now_s)

    def __getattr__(self, name: str) -> Callable[..., References[Any]]:
        return lambda *arguments: carried(getattr(self.uplink, name)(*arguments), self.link)


@pytest.mark.parametrize("lie", [None, 7, Welcome(incarnation=-1, last_seq=0, durable_seq=0)])
def test_a_parent_whose_welcome_is_none_is_asked_again(fake: FakeRay, tiny: Tiny, tmp_path: Path, lie: Any) -> None:
    parent = Liar(join=lie)
    steps = Linked(fake, a_plan(tiny, tmp_path), parent, []).join()
    asked = next(steps)
    assert steps.send(fake.get(asked)) == Sleep(child.AGAIN_S), "it waits before it asks again"
    parent.answers["join"] = Welcome(incarnation=1, last_seq=0, durable_seq=0)
    asked = next(steps)
    with pytest.raises(StopIteration):
        steps.send(fake.get(asked))


@pytest.mark.parametrize("lie", [None, {"durable_seq": "9"}, {"reason": None}])
def test_a_parent_whose_verdict_is_none_is_joined_again(fake: FakeRay, tiny: Tiny, tmp_path: Path, lie: Any) -> None:
    fields: dict[str, Any] = {"reason": "accepted", "seq": 1, "base_version": 0, "version": 1, "tau": 0}
    parent = Liar(push=None if lie is None else Verdict(**(fields | lie)))
    plan = a_plan(tiny, tmp_path)
    link = Linked(fake, plan, parent, [])
    values = np.zeros(plan.layout.size, np.float32)
    update = Update(sender="a", seq=1, base_version=0, tokens=1, started_tokens=1, values=values)
    wait_for(link.join())
    steps = link.push(update)
    joined = steps.send(fake.get(next(steps)))
    with pytest.raises(StopIteration):
        steps.send(fake.get(joined))


@pytest.mark.parametrize("lie", [None, 5, (b"", []), (b"", [1e9]), (b"", [None]), (b"", "ab"), ("", ["x"], 3)])
def test_a_pull_that_brings_no_model_says_why_and_ends_nothing(
    fake: FakeRay, tiny: Tiny, tmp_path: Path, lie: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "AGAIN_S", 0.0)
    told: list[Record] = []
    link = Linked(fake, a_plan(tiny, tmp_path), Liar(pull=lie), told)
    wait_for(link.join())
    until_s = time.monotonic() + 20.0
    error = wait_for(link.pull(), lambda: time.monotonic() > until_s)
    assert isinstance(error, MessageError)
    assert error.reason == "malformed"
    warnings = [record for record in told if isinstance(record, LifeRecord) and record.event == "warning"]
    assert warnings == [], "the child's gate warns, once"


# ---- faults wrap the link ------------------------------------------------------------------------------------------


class Counting(Liar):
    """A parent's handle that counts its calls."""

    def __init__(self, **answers: Any) -> None:
        super().__init__(**answers)
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        def remote(*arguments: Any) -> Ref:
            self.calls.append((name, arguments))
            return Ref(lambda: self.answers.get(name))

        return SimpleNamespace(remote=remote)


def over_a_faulty_link(fake: FakeRay, tiny: Tiny, folder: Path, fault: str) -> tuple[Counting, FaultyLink]:
    plan, parent = a_plan(tiny, folder, faults=[fault]), Counting()
    linked = Linked(fake, plan, parent, [])
    return parent, FaultyLink(linked.link, plan.faults, PATH, lambda: 5.0)


DONE = Send("done", ("a", 1, 1))


@pytest.mark.parametrize(("kind", "heard"), [("cut", 0), ("drop", 1)])
def test_a_call_that_is_cut_is_not_heard_and_one_that_is_dropped_is(
    fake: FakeRay, tiny: Tiny, tmp_path: Path, kind: str, heard: int
) -> None:
    parent, link = over_a_faulty_link(fake, tiny, tmp_path, f"0s {kind} {PATH} for 10s")
    with pytest.raises(Lost, match="on purpose"):
        wait_for(link.carry(DONE))
    assert len(parent.calls) == heard


def test_a_call_that_is_repeated_is_heard_twice(fake: FakeRay, tiny: Tiny, tmp_path: Path) -> None:
    parent, link = over_a_faulty_link(fake, tiny, tmp_path, f"0s repeat {PATH} for 10s")
    wait_for(link.carry(DONE))
    assert parent.calls == [("done", ("a", 1, 1))] * 2


def test_a_call_that_is_delayed_waits_first(fake: FakeRay, tiny: Tiny, tmp_path: Path) -> None:
    parent, link = over_a_faulty_link(fake, tiny, tmp_path, f"0s delay {PATH} by 2s for 10s")
    steps = link.carry(DONE)
    assert next(steps) == Sleep(2.0)
    assert parent.calls == []
    next(steps)
    assert len(parent.calls) == 1


def test_an_update_whose_header_is_damaged_is_sent_with_its_own_buffer(
    fake: FakeRay, tiny: Tiny, tmp_path: Path
) -> None:
    parent, link = over_a_faulty_link(fake, tiny, tmp_path, f"0s corrupt {PATH} for 10s")
    values = np.ones(3, np.float32)
    update = Update(sender="a", seq=1, base_version=0, tokens=1, started_tokens=1, values=values)
    wait_for(link.carry(Send("push", ("a", 1, 1, b"header", update))))
    [(_, (*_, header, [ref]))] = parent.calls
    assert header != b"header"
    np.testing.assert_array_equal(fake.get(ref), values)


def test_what_is_over_does_nothing(fake: FakeRay, tiny: Tiny, tmp_path: Path) -> None:
    parent, link = over_a_faulty_link(fake, tiny, tmp_path, f"0s cut {PATH} for 5s")
    wait_for(link.carry(DONE))
    assert len(parent.calls) == 1
