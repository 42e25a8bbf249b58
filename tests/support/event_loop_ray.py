"""A stand-in for Ray on one event loop: for asynchronous actors that are constructed directly."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import actors.drivers
import actors.inner
import actors.shared
from worldlm_ray.exchange.messages import Update, pack
from worldlm_ray.plan.plan import Plan
from worldlm_ray.records import Record
from worldlm_ray.tensors.buffers import Flat


class Ref:
    """An object reference that can be awaited, as Ray's can."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __await__(self) -> Any:
        yield from asyncio.sleep(0).__await__()
        return self.value


class Method:
    """`actor.method.remote(...)`: runs when awaited."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.remote = call


class Recorder:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.record = Method(self.records.extend)


class FakeRay:
    """The few calls of Ray that actors make."""

    def __init__(self) -> None:
        self.actors: dict[str, Any] = {"recorder": Recorder()}
        self.puts = 0

    def put(self, values: Flat) -> Ref:
        self.puts += 1
        shared = values.copy()
        shared.flags.writeable = False
        return Ref(shared)

    def get(self, ref: Ref) -> Any:
        return ref.value

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(was_current_actor_reconstructed=False)

    def get_actor(self, name: str, *, namespace: str) -> Any:
        assert namespace == "test"
        return self.actors[name]


class Handle:
    """What `ray.get_actor` gives for an actor of ours."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def __getattr__(self, name: str) -> Method:
        return Method(getattr(self.actor, name))


def an_update(plan: Plan, sender: str, seq: int = 1, tokens: int = 10) -> tuple[bytes, list[Ref]]:
    values = np.full(plan.layout.size, 0.5, np.float32)
    update = Update(sender=sender, seq=seq, base_version=0, tokens=tokens, started_tokens=tokens, values=values)
    packed = pack(update, plan.layout)
    return packed.header, [Ref(packed.values)]


async def until(condition: Callable[[], bool]) -> None:
    """Let the event loop and the threads beside it turn until something is so."""
    deadline = time.monotonic() + 20.0
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        await asyncio.sleep(0.002)


def in_place_of_ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    """A stand-in, in the modules of asynchronous actors."""
    ray = FakeRay()
    for module in (actors.shared, actors.inner, actors.drivers):
        monkeypatch.setattr(module, "ray", ray)
    return ray
