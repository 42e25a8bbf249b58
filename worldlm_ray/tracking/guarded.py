"""A tracker that fails ends alone: the run goes on, with one warning. A tracker that may wait has a thread.

Trackers on request, such as wandb and mlflow, speak to services. A thread opens and feeds each, so that a slow service
delays nothing; beyond KEPT_CALLS waiting calls, newer ones are dropped and counted.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Mapping
from typing import Any

from worldlm_ray.records import AttentionRecord
from worldlm_ray.tracking.sinks import OpenSink, RunFacts, Sink

LOG = logging.getLogger(__name__)
KEPT_CALLS = 100_000
"""Calls that may wait for a tracker's thread."""
CLOSE_S = 60.0
"""Seconds that a run waits at its end for a tracker's thread."""

Call = tuple[str, tuple[Any, ...], dict[str, Any]]


class Guarded(Sink):
    """A sink whose errors become one text, `failure`; after that it is fed no more.

    Args:
        name: the sink's, for messages.
        open_sink: makes it.
        run: what it is told.
        in_thread: whether a thread opens and feeds it.

    Raises:
        OSError: the storage of the run refuses a sink that has no thread.
    """

    def __init__(self, name: str, open_sink: OpenSink, run: RunFacts, *, in_thread: bool) -> None:
        self._name, self._open_sink, self._run = name, open_sink, run
        self._sink: Sink | None = None
        self._dropped = 0
        self._calls: queue.Queue[Call] | None = queue.Queue(KEPT_CALLS) if in_thread else None
        self._thread = threading.Thread(target=self._feed, name=f"tracker-{name}", daemon=True)
        if in_thread:
            self._thread.start()
        else:
            self._open(storage_refuses=OSError)

    @property
    def trouble(self) -> str:  # type: ignore[override]
        """Why points wait in memory or are dropped; empty if they do not."""
        dropped = f"the tracker {self._name} is too slow: {self._dropped:,} points were dropped"
        return dropped if self._dropped else "" if self._sink is None else self._sink.trouble

    def scalars(self, node: str, kind: str, values: Mapping[str, float | None], *, now_s: float, tokens: int) -> None:
        """See `Sink.scalars`."""
        self._call("scalars", node, kind, dict(values), now_s=now_s, tokens=tokens)

    def histogram(self, node: str, name: str, counts: Mapping[int, int], *, step: int, now_s: float) -> None:
        """See `Sink.histogram`."""
        self._call("histogram", node, name, dict(counts), step=step, now_s=now_s)

    def attention(self, record: AttentionRecord) -> None:
        """See `Sink.attention`."""
        self._call("attention", record)

    def text(self, name: str, markdown: str, *, step: int, now_s: float) -> None:
        """See `Sink.text`."""
        self._call("text", name, markdown, step=step, now_s=now_s)

    def flush_if_due(self) -> None:
        """See `Sink.flush_if_due`; a thread does so by itself."""
        if self._calls is None:
            self._call("flush_if_due")

    def flush(self) -> None:
        """See `Sink.flush`; with a thread, it returns at once."""
        self._call("flush")

    def finish(self, *, now_s: float) -> None:
        """See `Sink.finish`."""
        self._call("finish", now_s=now_s)

    def close(self) -> None:
        """See `Sink.close`; a thread is waited for, but not for ever."""
        self._call("close")
        if self._calls is not None and not self.failure:
            self._thread.join(CLOSE_S)
            if self._thread.is_alive():
                self._fail(f"not done {CLOSE_S:.0f} s after the end of the run")

    def _open(self, storage_refuses: type[Exception] | tuple[()] = ()) -> None:
        try:
            self._sink = self._open_sink(self._run)
        except storage_refuses:
            raise
        except Exception as error:  # noqa: BLE001 - a boundary: a tracker never stops a run
            self._fail(_line(error))

    def _call(self, method: str, *args: Any, **values: Any) -> None:
        if self.failure:
            return
        if self._calls is None:
            self._do((method, args, values))
            return
        try:
            self._calls.put_nowait((method, args, values))
        except queue.Full:
            self._dropped += 1
            if method == "close":
                self._fail("it does not keep up")

    def _do(self, call: Call) -> None:
        method, args, values = call
        try:
            getattr(self._sink, method)(*args, **values)
        except Exception as error:  # noqa: BLE001 - a boundary: a tracker never stops a run
            self._fail(_line(error))

    def _feed(self) -> None:
        """The loop of the thread."""
        assert self._calls is not None
        self._open()
        is_closed = False
        while not is_closed and not self.failure:
            call = self._calls.get()
            self._do(call)
            is_closed = call[0] == "close"
            if self._calls.empty() and not is_closed and not self.failure:
                self._do(("flush_if_due", (), {}))

    def _fail(self, why: str) -> None:
        self.failure = f"the tracker {self._name} has failed ({why}); the run goes on without it"
        LOG.warning("%s", self.failure)


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return (text if len(text) <= 300 else f"{text[:300]}...") or type(error).__name__
