"""The progress of a comparison, by method and seed, with the remaining time.

Each run is a process that writes its status.json about once a second. The progress is read from these files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.text import Text

from worldlm_ray.reports.notebook import live_of
from worldlm_ray.reports.progress import LINE_EVERY_S
from worldlm_ray.reports.tables import duration

WAITING, TRAINING, MEASURING, DONE = "waiting", "training", "measuring", "done"
TRAINING_SHARE = 0.9
"""Fraction of a run's time, about. The rest goes into measuring every model on every text."""
KNOWN_FRACTION = 0.02
"""Fraction of a run that must be done before the remaining time is estimated."""
BAR = 24
"""Characters of a bar."""


@dataclass(frozen=True, kw_only=True)
class RunProgress:
    """The progress of one run."""

    method: str
    seed: int
    state: str
    trained: float = 0.0
    """Fraction of its budget that is spent, 0 to 1."""

    @property
    def fraction(self) -> float:
        """Fraction of its whole work, 0 to 1."""
        if self.state == DONE:
            return 1.0
        return TRAINING_SHARE * (1.0 if self.state == MEASURING else self.trained)


def headline(runs: Sequence[RunProgress], *, before: float, elapsed_s: float) -> str:
    """Runs done, fraction of all work, and the remaining time.

    Args:
        runs: their progress.
        before: sum of their fractions when this process began, from earlier processes.
        elapsed_s: seconds since then.
    """
    total = sum(run.fraction for run in runs)
    done = sum(run.state == DONE for run in runs)
    text = f"{done} of {len(runs)} runs, {total / len(runs):.0%}"
    if done == len(runs) or total - before < KNOWN_FRACTION:
        return text
    left_s = elapsed_s * (len(runs) - total) / (total - before)
    return f"{text}, about {duration(left_s)} left"


class ComparisonProgress:
    """Bars on a terminal, occasional lines elsewhere.

    Args:
        console: where to draw.
        clock: monotonic seconds.
    """

    def __init__(self, console: Console, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.console, self._clock = console, clock
        self._live = live_of(console)
        self._began = self._said_at = clock()
        self._before: float | None = None
        self._line = ""

    def __enter__(self) -> ComparisonProgress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, runs: Sequence[RunProgress]) -> None:
        """Draw the progress of the runs."""
        if self._before is None:
            self._before = sum(run.fraction for run in runs)
        head = headline(runs, before=self._before, elapsed_s=self._clock() - self._began)
        active = [run for run in runs if run.state in (TRAINING, MEASURING)]
        if self._live is not None:
            self._live.update(Text("\n".join([*map(_bar, active), head])), refresh=True)
            return
        if self._clock() - self._said_at < LINE_EVERY_S:
            return
        line = "; ".join([head, *(f"{_name(run)} {_how_far(run)}" for run in active)])
        if line != self._line:
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)
            self._line, self._said_at = line, self._clock()


def _name(run: RunProgress) -> str:
    return f"{run.method}, seed {run.seed}:"


def _how_far(run: RunProgress) -> str:
    return run.state if run.state == MEASURING else f"{run.trained:.0%}"


def _bar(run: RunProgress) -> str:
    filled = round(BAR * run.fraction)
    return f"[{'#' * filled}{'.' * (BAR - filled)}] {_name(run)} {_how_far(run)}"
