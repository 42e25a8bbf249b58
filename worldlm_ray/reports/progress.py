"""What a terminal shows during a run, and how the user stops a run."""

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
from rich.text import Text

from worldlm_ray.reports.notebook import live_of
from worldlm_ray.reports.tables import amount, duration, left_of, live_table

LINE_EVERY_S = 10.0
"""Seconds between two lines if the output is no terminal."""
NOTHING_NEW_S = 60.0
"""The same while the run trains and no event has happened since the last line."""
DRAW_EVERY_S = 0.5
"""Seconds between two drawings on a terminal."""
DRAW_SHARE = 0.05
"""Largest fraction of the time that drawing may take. A very large world is drawn less often."""
TICK_S = 0.2
"""Seconds between two checks for messages to print."""
SAME_S = 0.5
"""Seconds within which signals count as one: `timeout` and terminals signal both the process and its group."""
SHOW_CURSOR = b"\x1b[?25h"
"""Shows the cursor, which a live table on a terminal hides."""
TRAINING, MEASURING, SAVING = "training", "measuring the models", "writing checkpoints"
"""Phases in which a run has begun. In the others nothing has to be kept."""
CONSEQUENCES = {
    TRAINING: "writing checkpoints",
    MEASURING: "the measures that are missing are left out",
    SAVING: "writing checkpoints",
}
"""What happens if the user stops the run in a phase."""


class Progress:
    """A live table on a terminal, occasional lines elsewhere.

    A thread shows how long a phase takes, and prints the messages of a signal's handler, which may run in the middle of
    a drawing.

    Args:
        console: where to draw.
        errors: where notices go if `console` is no terminal; `console` if None.
    """

    def __init__(self, console: Console, errors: Console | None = None) -> None:
        self.console = console
        self._live = live_of(console)
        self._errors = console if errors is None or self._live is not None else errors
        self._shown_at = self._drawn_s = 0.0
        self._line = ""
        """The last line, if the output is no terminal."""
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
        """Show the phase that begins now."""
        with self._lock:
            self._phase, self._step, self._phase_at = name, "", time.monotonic()
            self._print(name)

    def step(self, text: str) -> None:
        """Show the progress of the phase beside its name: `12 of 37 models`."""
        self._step = text

    def notice(self, text: str) -> None:
        """Print a line soon. The only method that a signal's handler may call."""
        self._notices.append(text)

    def alert(self, text: str) -> None:
        """Print a warning about the machines of the run, once."""
        self.warn([{"node": "", "text": text}])

    def _print(self, text: str) -> None:
        now = time.monotonic()
        line = f"[{now - self._began:6.1f} s] {text}"
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)
        self._spoke_at = now

    def _tick(self) -> None:
        """The loop of the thread."""
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
        """The phase, its progress and its duration."""
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
        """Draw if enough time has passed since the last drawing. Only then a snapshot is made."""
        every_s = LINE_EVERY_S if self._live is None else DRAW_EVERY_S
        if time.monotonic() - self._shown_at >= max(every_s, self._drawn_s / DRAW_SHARE):
            began = time.monotonic()
            self.show(snapshot())
            self._shown_at = time.monotonic()
            self._drawn_s = self._shown_at - began

    def warn(self, warnings: Iterable[Mapping[str, Any]]) -> None:
        """Print each warning of a run once: `node` and `text`. The node is empty if the text names its subject."""
        with self._lock:
            for node, text in [(warning["node"], warning["text"]) for warning in warnings]:
                if {(node, text), ("", text)} & self._warned:
                    continue
                self._warned.add((node, text))
                line = f"WARNING {node}: {text}" if node else f"WARNING {text}"
                self.console.print(line, style="bold red", markup=False, highlight=False, soft_wrap=True)
                self._spoke_at = time.monotonic()

    def show(self, snapshot: dict[str, Any]) -> None:
        """Draw a snapshot of the run, and print each warning of a node or of the run's files once."""
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
                return  # too soon, or without an event since the last line
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
    """Handles Ctrl-C and SIGTERM: the first asks the run to end cleanly, the second ends the process.

    Args:
        say: prints what happens. The signal's handler calls it.
        consequence: what the first signal leads to.
        leave: ends what runs, at the second signal; it gets the signal's number. The process ends unless given.
    """

    def __init__(
        self,
        say: Callable[[str], None],
        consequence: str = "nothing has begun yet",
        *,
        leave: Callable[[int], None] | None = None,
    ) -> None:
        self._say, self._consequence, self._leave = say, consequence, leave or _end_process
        self._number: int | None = None
        """The first signal that came."""
        self._asked_at = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stop:
        self._before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self.install()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def install(self) -> None:
        """Install the handlers, also after a library has replaced them. Only the main thread may."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def phase(self, name: str) -> None:
        """Take in that the run has reached another phase."""
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
            self._leave(number)


def _end_process(number: int) -> None:
    if sys.stdout.isatty():
        os.write(1, SHOW_CURSOR)
    os._exit(128 + number)
