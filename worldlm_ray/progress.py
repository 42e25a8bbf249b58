"""What a person sees while a run goes on, and how a person stops it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live

from worldlm_ray.report import amount, duration, live_table

LINE_EVERY_S = 10.0
"""Where the output is no terminal: seconds between two lines."""
DRAW_EVERY_S = 0.5
"""On a terminal: seconds between two drawings."""
DRAW_SHARE = 0.05
"""Share of the time that drawing may take: of a very large world it is done less often."""


class Progress:
    """A live table on a terminal, a line now and then elsewhere.

    Args:
        console: where to draw.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._shown_at = self._drawn_s = 0.0
        self._line = ""
        """The last line, where the output is no terminal."""
        self._warned: set[tuple[str, Any]] = set()
        self._began = time.monotonic()

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def phase(self, name: str) -> None:
        """Say what begins now."""
        seconds = time.monotonic() - self._began
        self.console.print(f"[{seconds:6.1f} s] {name}", markup=False, highlight=False)

    def show_if_due(self, snapshot: Callable[[], dict[str, Any]]) -> None:
        """Draw if enough time has passed since the last drawing; only then is the snapshot made."""
        every_s = LINE_EVERY_S if self._live is None else DRAW_EVERY_S
        if time.monotonic() - self._shown_at >= max(every_s, self._drawn_s / DRAW_SHARE):
            began = time.monotonic()
            self.show(snapshot())
            self._shown_at = time.monotonic()
            self._drawn_s = self._shown_at - began

    def warn(self, warnings: Iterable[Mapping[str, Any]]) -> None:
        """Say each warning of a run once: `node` and `text`."""
        for warning in warnings:
            named = (warning["node"], warning["text"])
            if named not in self._warned:
                self._warned.add(named)
                line = f"WARNING {named[0]}: {named[1]}"
                self.console.print(line, style="bold red", markup=False, highlight=False, soft_wrap=True)

    def show(self, snapshot: dict[str, Any]) -> None:
        """Draw a snapshot of the run; a warning of a node, or of the run's files, is a line of its own, once."""
        now = time.monotonic()
        self.warn(snapshot.get("warnings", []))
        if snapshot.get("trouble"):
            self.warn([{"node": snapshot["run"], "text": snapshot["trouble"]}])
        if self._live is not None:
            self._live.update(live_table(snapshot), refresh=True)
        elif now - self._shown_at < LINE_EVERY_S or (line := _line(snapshot)) == self._line:
            return  # too soon, or nothing has happened since
        else:
            self._line = line
            self.console.print(line, markup=False, highlight=False)
        self._shown_at = now


def _line(snapshot: dict[str, Any]) -> str:
    nodes = snapshot["nodes"]
    world = next(iter(nodes.values()))
    loss, mean = world["loss"], world.get("clients_loss")
    own = "world's own loss not measured yet" if loss is None else f"world's own loss {loss:.3f} nats/byte"
    clients = "" if mean is None else f", clients' mean {mean:.3f}"
    refused = sum(snapshot["refused"].values())
    return (
        f"{snapshot['progress']:4.0%}  {duration(snapshot['now_s'])}  {amount(snapshot['tokens'])} tokens  "
        f"{amount(snapshot['tokens_per_s'])}/s  world version {world['version']}  {own}{clients}  "
        f"{snapshot['accepted']} updates accepted, {refused} refused"
    )


class Stop:
    """Ctrl-C or SIGTERM: the first asks the run to end cleanly, the second ends the process.

    Args:
        console: where to say what happens.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stop:
        self._before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self.install()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def install(self) -> None:
        """Put the handlers in place (again)."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def asked(self) -> bool:
        """Whether the run should end."""
        return self._asked

    def _handle(self, number: int, _: Any) -> None:
        if self._asked:
            os._exit(128 + number)
        self._asked = True
        self.console.print("stopping: writing checkpoints (once more to leave at once)", highlight=False)
