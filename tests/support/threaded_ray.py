"""A stand-in for Ray whose calls run in threads: for actors that are constructed directly."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from worldlm_ray.records import Record
from worldlm_ray.tensors.buffers import Flat


class Ref:
    """An object reference: of a value that is there, or of a call that runs in a thread."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.ready, self.value, self.error = threading.Event(), None, None
        threading.Thread(target=self._run, args=(call,), daemon=True).start()

    def _run(self, call: Callable[[], Any]) -> None:
        try:
            self.value = call()
        except Exception as error:  # noqa: BLE001 - as Ray: the caller that asks for the value gets it
            self.error = error
        self.ready.set()


class Remote:
    """An actor's handle: `handle.method.remote(...)`."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.actor, name)
        return SimpleNamespace(remote=lambda *arguments: Ref(lambda: method(*arguments)))


class FakeRay:
    """The few calls of Ray that a client makes."""

    def __init__(self) -> None:
        self.actors: dict[str, Any] = {}
        self.records: list[Record] = []
        self.actors["recorder"] = SimpleNamespace(record=SimpleNamespace(remote=self.records.extend))

    def put(self, values: Flat) -> Ref:
        shared = values.copy()
        shared.flags.writeable = False
        return Ref(lambda: shared)

    def get(self, ref: Ref) -> Any:
        assert ref.ready.wait(20.0)
        if ref.error is not None:
            raise ref.error
        return ref.value

    def wait(self, refs: list[Ref], *, timeout: float) -> tuple[list[Ref], list[Ref]]:
        if not isinstance(refs[0], Ref):
            raise TypeError("expected a list of references")
        return (refs, []) if refs[0].ready.wait(timeout) else ([], refs)

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(was_current_actor_reconstructed=False)

    def get_actor(self, name: str, *, namespace: str) -> Any:
        return self.actors[name]
