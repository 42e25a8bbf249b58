"""How a run goes, for the command line and for Python alike: its folder is claimed, a backend runs, its end is kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from worldlm_ray.config.schema import RunConfig
from worldlm_ray.errors import Interrupted, WorldLMError
from worldlm_ray.plan import rundir
from worldlm_ray.plan.plan import Plan, make_plan
from worldlm_ray.records import Record
from worldlm_ray.reports.outcome import Outcome
from worldlm_ray.reports.progress import Progress, Stop

KEPT = "what there is by now is kept"
"""What the first Ctrl-C leads to in a simulation."""
PROGRESS_EVERY_S = 0.5
"""Wall seconds between two calls of `on_progress` in a simulation."""


@dataclass(frozen=True, kw_only=True)
class Callbacks:
    """What a caller wants to hear of a run, in the process that watches it."""

    on_progress: Callable[[dict[str, Any]], None] | None = None
    """Called with a snapshot (the content of status.json) about twice a second."""
    on_record: Callable[[Record], None] | None = None
    """Called with every record; on Ray about twice a second, with those that the recorder has heard meanwhile."""
    should_stop: Callable[[], bool] = lambda: False
    """Asked often; True ends the run early, with a summary."""


@contextmanager
def new_run(config: RunConfig, *, address: str | None = None, simulated: bool = False) -> Iterator[Plan]:
    """The plan of a new run, whose folder this process holds meanwhile.

    Raises:
        ConfigError: the configuration is wrong.
        RunError: the folder holds a run, or cannot be made.
    """
    # On a cluster every machine looks for the texts of its own clients.
    plan = rundir.create(make_plan(config, check_data=address is None), simulated=simulated)
    with rundir.held_anew(plan):
        yield plan


@contextmanager
def old_run(run: str, overrides: Sequence[str], *, address: str | None = None) -> Iterator[Plan]:
    """The plan of a run that goes on, whose folder this process holds meanwhile.

    Raises:
        RunError: there is no such run, it has ended, or another process drives it.
    """
    with rundir.held(rundir.find(run)):
        yield rundir.resume(run, list(overrides), check_data=address is None)


def on_ray(
    plan: Plan,
    *,
    address: str | None,
    is_new: bool,
    progress: Progress,
    stop: Stop,
    callbacks: Callbacks,
) -> Outcome:
    """Train on Ray; a new run that could not begin leaves no folder.

    Args:
        plan: the run; its folder is held.
        address: of a Ray cluster; None starts a local one.
        is_new: whether the folder was made for this call.
        progress: shows the run.
        stop: says whether the user has stopped it.
        callbacks: the caller's.

    Raises:
        Interrupted: stopped before the run had begun.
        WorldLMError: it could not begin, or has failed.
    """
    from worldlm_ray import launch  # takes seconds, in which a signal must find its handler

    def phase(name: str) -> None:
        progress.phase(name)
        stop.phase(name)

    def show(snapshot: dict[str, Any]) -> None:
        progress.show(snapshot)
        if callbacks.on_progress is not None:
            callbacks.on_progress(snapshot)

    try:
        outcome = launch.train(
            plan,
            address=address,
            on_progress=show,
            on_phase=phase,
            on_step=progress.step,
            on_warning=progress.alert,
            should_stop=lambda: stop.asked() or callbacks.should_stop(),
            on_record=callbacks.on_record,
        )
    except (Interrupted, WorldLMError):
        if is_new:
            rundir.discard(plan)
        raise
    progress.warn(outcome.summary["warnings"])
    return outcome


def simulated(plan: Plan, *, progress: Progress, stop: Stop, callbacks: Callbacks) -> tuple[Outcome, int]:
    """Simulate; a run that could not begin leaves no folder.

    Args:
        plan: the run; its folder is held.
        progress: shows the run.
        stop: says whether the user has stopped it.
        callbacks: the caller's.

    Returns:
        The outcome, and how many events were handled.

    Raises:
        WorldLMError: the run has failed.
    """
    from worldlm_ray.simulation.simulator import simulate
    from worldlm_ray.tracking.status import record_failure
    from worldlm_ray.training.local import too_many_cores

    progress.phase("simulating")
    if warning := too_many_cores({spec.path: spec.settings.resources for spec in plan.root.clients}):
        progress.alert(warning)
    events, told_at = 0, -math.inf

    def look(simulation: Any) -> None:
        nonlocal events, told_at
        events = simulation.events
        progress.warn(simulation.tracker.warnings)
        progress.show_if_due(simulation.tracker.snapshot)
        if callbacks.on_progress is not None and time.monotonic() - told_at >= PROGRESS_EVERY_S:
            callbacks.on_progress(simulation.tracker.snapshot())
            told_at = time.monotonic()

    try:
        outcome = simulate(
            plan,
            on_progress=look,
            on_record=callbacks.on_record or (lambda _: None),
            should_stop=lambda: stop.asked() or callbacks.should_stop(),
        )
    except BaseException as error:
        rundir.discard(plan, began=events > 0)
        record_failure(plan.run_dir, str(error) or type(error).__name__)
        raise
    progress.warn(outcome.summary["warnings"])
    return outcome, events
