"""What a person sees while a run goes on, and how a person stops it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from worldlm_ray.reports.tables import amount, duration, left_of, live_table

LINE_EVERY_S = 10.0
"""Where the output is no terminal: seconds between two lines."""
NOTHING_NEW_S = 60.0
"""... while the run trains and nothing has happened since the last one."""
DRAW_EVERY_S = 0.5
"""On a terminal: seconds between two drawings."""
DRAW_SHARE = 0.05
"""Share of the time that drawing may take: of a very large world it is done less often."""
TICK_S = 0.2
"""Seconds between two looks whether something is to be said."""
SAME_S = 0.5
"""Signals that come together are one wish: `timeout` and terminals send theirs to the process and to its group."""
SHOW_CURSOR = b"\x1b[?25h"
"""What a live table on a terminal has hidden."""
TRAINING, MEASURING, SAVING = "training", "measuring the models", "writing checkpoints"
"""Phases in which something has begun; of all others, nothing is to be kept."""
CONSEQUENCES = {
    TRAINING: "writing checkpoints",
    MEASURING: "the measures that are missing are left out",
    SAVING: "writing checkpoints",
}
"""What happens when the user wants to leave in a phase."""


class Progress:
    """A live table on a terminal, a line now and then elsewhere.

    A thread beside shows how long a phase takes, and says what a signal's handler wants to say: that one may run in
    the middle of a drawing.

    Args:
        console: where to draw.
        errors: where notices go if `console` is no terminal; `console` if None.
    """

    def __init__(self, console: Console, errors: Console | None = None) -> None:
        self.console = console
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._errors = console if errors is None or self._live is not None else errors
        self._shown_at = self._drawn_s = 0.0
        self._line = ""
        """The last line, where the output is no terminal."""
        self._warned: set[tuple[str, Any]] = set()
        self._began = self._spoke_at = self._phase_at = time.monotonic()
        self._phase = self._step = ""
        self._snapshot: dict[str, Any] | None = None
        self._notices: deque[str] = deque()
        self._lock = threading.RLock()
        self._over = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
        self._ticker.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._ticker.join()
        self._say_notices()
        if self._live is not None:
            self._live.stop()

    def phase(self, name: str) -> None:
        """Say what begins now."""
        with self._lock:
            self._phase, self._step, self._phase_at = name, "", time.monotonic()
            self._print(name)

    def step(self, text: str) -> None:
        """Say how far the phase has come: `12 of 37 models`. It is shown beside the phase, not as a line of its own."""
        self._step = text

    def notice(self, text: str) -> None:
        """Have a line said soon; the only method that a signal's handler may call."""
        self._notices.append(text)

    def alert(self, text: str) -> None:
        """Say a warning about the machines of the run, once."""
        self.warn([{"node": "", "text": text}])

    def _print(self, text: str) -> None:
        now = time.monotonic()
        line = f"[{now - self._began:6.1f} s] {text}"
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)
        self._spoke_at = now

    def _tick(self) -> None:
        """What the thread beside does."""
        drawn_at = 0.0
        while not self._over.wait(TICK_S):
            with self._lock:
                self._say_notices()
                now = time.monotonic()
                if not self._phase:
                    continue
                if self._live is None:
                    if now - self._spoke_at >= (NOTHING_NEW_S if self._phase == TRAINING else LINE_EVERY_S):
                        self._print(self._still())
                elif self._phase != TRAINING and now - drawn_at >= max(1.0, self._drawn_s / DRAW_SHARE):
                    drawn_at = now
                    self._draw()

    def _still(self) -> str:
        """The phase, how far it has come, and for how long it has been going on."""
        step = f": {self._step}" if self._step else ""
        return f"{self._phase}{step}, for {duration(time.monotonic() - self._phase_at)}"

    def _draw(self) -> None:
        assert self._live is not None
        status = Text(self._still(), style="dim")
        shown = status if self._snapshot is None else Group(live_table(self._snapshot), status)
        self._live.update(shown, refresh=True)

    def _say_notices(self) -> None:
        while self._notices:
            text = self._notices.popleft()
            self._errors.print(text, style="bold", markup=False, highlight=False, soft_wrap=True)

    def show_if_due(self, snapshot: Callable[[], dict[str, Any]]) -> None:
        """Draw if enough time has passed since the last drawing; only then is the snapshot made."""
        every_s = LINE_EVERY_S if self._live is None else DRAW_EVERY_S
        if time.monotonic() - self._shown_at >= max(every_s, self._drawn_s / DRAW_SHARE):
            began = time.monotonic()
            self.show(snapshot())
            self._shown_at = time.monotonic()
            self._drawn_s = self._shown_at - began

    def warn(self, warnings: Iterable[Mapping[str, Any]]) -> None:
        """Say each warning of a run once: `node` and `text`; no node if the text says what it is about."""
        with self._lock:
            for node, text in [(warning["node"], warning["text"]) for warning in warnings]:
                if {(node, text), ("", text)} & self._warned:
                    continue
                self._warned.add((node, text))
                line = f"WARNING {node}: {text}" if node else f"WARNING {text}"
                self.console.print(line, style="bold red", markup=False, highlight=False, soft_wrap=True)
                self._spoke_at = time.monotonic()

    def show(self, snapshot: dict[str, Any]) -> None:
        """Draw a snapshot of the run; a warning of a node, or of the run's files, is a line of its own, once."""
        with self._lock:
            self.warn(snapshot.get("warnings", []))
            if snapshot.get("warnings_left_out"):
                self.warn([{"node": snapshot["run"], "text": "there are more warnings than are kept"}])
            if snapshot.get("trouble"):
                self.warn([{"node": snapshot["run"], "text": snapshot["trouble"]}])
            now = time.monotonic()
            if self._live is not None:
                self._snapshot = snapshot
                self._draw()
            elif now - self._shown_at < LINE_EVERY_S or (line := _line(snapshot)) == self._line:
                return  # too soon, or nothing has happened since
            else:
                self._line = line
                self.console.print(line, markup=False, highlight=False, soft_wrap=True)
                self._spoke_at = now
            self._shown_at = now


def _line(snapshot: dict[str, Any]) -> str:
    nodes = snapshot["nodes"]
    world = next(iter(nodes.values()))
    loss, mean = world["loss"], world.get("clients_loss")
    own = "world's own loss not measured yet" if loss is None else f"world's own loss {loss:.3f} nats/byte"
    if loss is not None and world.get("loss_version") not in (None, world["version"]):
        own += f" at version {world['loss_version']}"
    clients = "" if mean is None else f", clients' mean {mean:.3f}"
    refused = sum(snapshot["refused"].values())
    times = ", ".join(filter(None, (duration(snapshot["now_s"]), left_of(snapshot))))
    return (
        f"{snapshot['progress']:4.0%}  {times}  {amount(snapshot['tokens'])} tokens  "
        f"{amount(snapshot['tokens_per_s'])}/s  world version {world['version']}  {own}{clients}  "
        f"{snapshot['accepted']} updates accepted, {refused} refused"
    )


class Stop:
    """Ctrl-C or SIGTERM: the first asks the run to end cleanly, the second ends the process.

    Args:
        say: told what happens; called by the signal's handler.
        consequence: what the first signal leads to.
    """

    def __init__(self, say: Callable[[str], None], consequence: str = "nothing has begun yet") -> None:
        self._say, self._consequence = say, consequence
        self._number: int | None = None
        """The first signal that came."""
        self._asked_at = 0.0
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

    def phase(self, name: str) -> None:
        """The run has come to another phase."""
        self._consequence = CONSEQUENCES.get(name, self._consequence)

    def asked(self) -> bool:
        """Whether the run should end."""
        return self._number is not None

    @property
    def code(self) -> int:
        """Exit code of a run that was stopped: 130 after Ctrl-C, 143 after SIGTERM, as shells count them."""
        return 128 + (signal.SIGINT if self._number is None else self._number)

    def _handle(self, number: int, _: Any) -> None:
        now = time.monotonic()
        if self._number is None:
            self._number, self._asked_at = number, now
            self._say(f"stopping: {self._consequence} (once more to leave at once)")
        elif now - self._asked_at > SAME_S:
            if sys.stdout.isatty():
                os.write(1, SHOW_CURSOR)
            os._exit(128 + number)
