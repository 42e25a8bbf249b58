"""What an actor still does when its process is told to end (SIGTERM), as on a machine that is reclaimed."""

from __future__ import annotations

import asyncio
import ctypes
import signal
import threading
from typing import Any, Self

import ray

from actors.shared import SHUTDOWN_S, end_process

ENOUGH_S = SHUTDOWN_S + 5.0
"""After so many seconds the process ends, whatever it still does."""


class GracefulShutdown:
    """An actor that leaves a checkpoint when its process is told to end, and ends within the notice of its machine.

    Ray's own way is to take no more calls and to wait for those that the process has under way, for as long as they
    take: a pull that waits for a slow sibling, or a client and its workers, who wait for each other for ever.
    """

    loop: asyncio.AbstractEventLoop | None = None
    """An asynchronous actor's: it shuts down there, and nothing else happens there any more."""
    reclaimed = False
    """Whether the process has been told to end: what it does from now on is no answer to anybody who asked."""

    def __new__(cls, *_arguments: Any, **_named: Any) -> Self:
        """Set the signal's handler: of an asynchronous actor, Ray calls this alone on the main thread."""
        self = super().__new__(cls)
        is_actor = ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None
        if is_actor and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda *_: self._reclaim())
        return self

    def shut_down(self) -> None:
        """Leave a checkpoint, within `SHUTDOWN_S`."""
        raise NotImplementedError

    def _reclaim(self) -> None:
        if self.reclaimed:
            return
        self.reclaimed = True
        late = threading.Timer(ENOUGH_S, end_process, ["told to end, and late"])
        late.daemon = True
        late.start()
        if self.loop is None:
            threading.Thread(target=self._speak, daemon=True).start()
        else:
            self.loop.call_soon_threadsafe(self._speak)

    def _speak(self) -> None:
        try:
            self.shut_down()
            end_process("told to end")
        except Exception as error:  # noqa: BLE001 - a boundary: whatever it is, the process ends
            end_process(f"told to end, without a checkpoint: {error!r}")


def stay_to_the_end() -> None:
    """Have this process ignore SIGTERM: it ends with the one that it works for, which still needs it.

    Through the C library, since Python would do it on the main thread only, which is Ray's.
    """
    ctypes.CDLL(None).signal(int(signal.SIGTERM), ctypes.c_void_p(int(signal.SIG_IGN)))
