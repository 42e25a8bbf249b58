"""Train and simulate from Python."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike, fspath
from typing import Any

from worldlm_ray.api.run import Run
from worldlm_ray.api.running import KEPT, Callbacks, new_run, old_run, on_ray, simulated
from worldlm_ray.api.settings import Conf, as_overrides, configured
from worldlm_ray.plan.plan import Plan
from worldlm_ray.records import Record
from worldlm_ray.reports.notebook import console_for
from worldlm_ray.reports.outcome import Outcome
from worldlm_ray.reports.progress import Progress, Stop

LOG = logging.getLogger(__name__)


def train(
    conf: Conf,
    *overrides: str,
    address: str | None = None,
    run_dir: str | PathLike[str] | None = None,
    progress: bool | None = None,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
    on_record: Callable[[Record], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    **settings: Any,
) -> Run:
    """Train a world on Ray, as `worldlm train` does.

        run = train("quickstart", budget={"tokens": 1e6}, training={"lr": 1e-3})
        run = train("my.yaml", "world.children[0].training.local_steps=20", address="auto")
        run.summary["nodes"]["world"]["loss"]

    Ctrl-C, or the interrupt of a notebook, writes checkpoints and returns the run, whose summary says `stopped`; a
    second one raises KeyboardInterrupt at once.

    Args:
        conf: a preset's name, the path of a YAML file, or a mapping with the same keys.
        overrides: such as `training.lr=1e-3`.
        address: of a Ray cluster, such as `auto`; None starts a local one.
        run_dir: folder of the run; `runs/NAME` unless given.
        progress: whether to show the run; unless given, on a terminal and in a notebook.
        on_progress: called with a snapshot, the content of status.json, about twice a second.
        on_record: called with what happened (worldlm_ray/records.py), as often. Records of a moment in which the
            recorder restarts are not passed on; `Run.metrics` has the curves whole.
        should_stop: asked as often; True ends the run early, with checkpoints and a summary.
        settings: overrides by key, with mappings for what is below.

    Raises:
        ConfigError: the configuration is wrong.
        Interrupted: stopped before the run had begun.
        RunError: the folder holds a run, the cluster cannot hold the world, or an actor failed.
    """
    callbacks = Callbacks(on_progress=on_progress, on_record=on_record, should_stop=should_stop)
    config = configured(conf, overrides, settings, run_dir=run_dir, say=LOG.info)
    with new_run(config, address=address) as plan:
        return _train(plan, address, callbacks, is_new=True, progress=progress)


def resume(
    run: Run | str | PathLike[str],
    *overrides: str,
    address: str | None = None,
    progress: bool | None = None,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
    on_record: Callable[[Record], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    **settings: Any,
) -> Run:
    """Continue a run from its checkpoints, as `worldlm train --resume` does.

        resume("quickstart", budget={"tokens": 2e6})

    Args:
        run: the run, its folder, or its name under `runs/`.
        overrides: changes, such as a larger budget.
        address: of a Ray cluster; None starts a local one.
        progress: as of `train`.
        on_progress: as of `train`.
        on_record: as of `train`.
        should_stop: as of `train`.
        settings: overrides by key.

    Raises:
        RunError: there is no such run, it has ended at its full budget, or an actor failed.
    """
    callbacks = Callbacks(on_progress=on_progress, on_record=on_record, should_stop=should_stop)
    folder = str(run.folder) if isinstance(run, Run) else fspath(run)
    with old_run(folder, [*overrides, *as_overrides(settings)], address=address) as plan:
        return _train(plan, address, callbacks, is_new=False, progress=progress)


def simulate(
    conf: Conf,
    *overrides: str,
    run_dir: str | PathLike[str] | None = None,
    progress: bool | None = None,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
    on_record: Callable[[Record], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    **settings: Any,
) -> Run:
    """Train a world in this process under a virtual clock, as `worldlm simulate` does.

        simulate("quickstart", budget={"rounds": 4}, on_record=print)

    Args:
        conf: a preset's name, the path of a YAML file, or a mapping with the same keys.
        overrides: such as `training.lr=1e-3`.
        run_dir: folder of the run; `runs/NAME` unless given.
        progress: as of `train`.
        on_progress: as of `train`.
        on_record: called with every record of the run (worldlm_ray/records.py).
        should_stop: asked after every event; True ends the run early.
        settings: overrides by key, with mappings for what is below.

    Raises:
        ConfigError: the configuration is wrong.
        RunError: the folder holds a run, or cannot be written.
    """
    callbacks = Callbacks(on_progress=on_progress, on_record=on_record, should_stop=should_stop)
    config = configured(conf, overrides, settings, run_dir=run_dir, say=LOG.info)
    with new_run(config, simulated=True) as plan, _watched(plan, progress, KEPT) as (shown, stop):
        outcome, _ = simulated(plan, progress=shown, stop=stop, callbacks=callbacks)
    return _run(plan, outcome)


def _train(plan: Plan, address: str | None, callbacks: Callbacks, *, is_new: bool, progress: bool | None) -> Run:
    with _watched(plan, progress) as (shown, stop):
        outcome = on_ray(plan, address=address, is_new=is_new, progress=shown, stop=stop, callbacks=callbacks)
    return _run(plan, outcome)


@contextmanager
def _watched(
    plan: Plan, progress: bool | None, consequence: str = "nothing has begun yet"
) -> Iterator[tuple[Progress, Stop]]:
    """The display of a run, and its handling of Ctrl-C."""
    for line in plan.warnings:
        LOG.warning("%s", line)

    def leave(_: int) -> None:
        raise KeyboardInterrupt

    shown = Progress(console_for(progress))
    with shown, Stop(shown.notice, consequence, leave=leave) as stop:
        yield shown, stop


def _run(plan: Plan, outcome: Outcome) -> Run:
    return Run(plan.run_dir, outcome.samples)
