"""`worldlm compare`: several methods on one world, at equal work, with the same seeds.

Every (method, seed) is a simulated run in a separate folder. All methods share the initial weights and the order of
text. With a budget in rounds, every client takes equally many optimizer steps in every method. With a budget in tokens,
all clients together do, and in asynchronous methods fast clients take more of them. At the end every model is measured
on every client's held-out text:

    OUT/runs/METHOD-SEED/    the run folder, and measures.json once it is done (a comparison can be continued)
    OUT/results.json         one row per method, seed and client; also the configuration, the commands and the versions
    OUT/commands.txt         when and how the comparison was begun and continued
    OUT/report/              tables, plots and one HTML page: see worldlm_ray/experiments/comparison_report.py

Losses are in nats per byte. `own` is a client's own model on its text, `world` is the world's model on that text.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from worldlm_ray.config.loading import to_mapping, to_yaml
from worldlm_ray.config.schema import RunConfig
from worldlm_ray.errors import ConfigError, RunError
from worldlm_ray.experiments.comparison_progress import RunProgress
from worldlm_ray.experiments.comparison_run import progress_of, read, run_one
from worldlm_ray.experiments.stages import stages
from worldlm_ray.plan import rundir, tree
from worldlm_ray.plan.border_checks import check_one_cluster
from worldlm_ray.plan.plan import make_plan
from worldlm_ray.storage.paths import pasted

COMMANDS = "commands.txt"
LOOK_EVERY_S = 1.0
"""Seconds between two checks of the progress of the runs."""
PACKAGES = ("worldlm_ray", "torch", "numpy")
"""Packages whose versions a report states."""


def compare(
    config: RunConfig,
    methods: Sequence[str],
    seeds: Sequence[int],
    *,
    out: Path,
    jobs: int = 1,
    command: str = "",
    on_done: Callable[[str, int, float], None] = lambda method, seed, own: None,
    on_progress: Callable[[list[RunProgress]], None] = lambda runs: None,
) -> list[dict[str, Any]]:
    """Run what is missing and gather all results.

    Args:
        config: the world; its budget must be in rounds or in tokens.
        methods: names of methods, see worldlm_ray/experiments/methods.py.
        seeds: one run per method and seed.
        out: folder of the comparison.
        jobs: processes to run at a time.
        command: what the user typed, for the report.
        on_done: called with method, seed and mean own loss of each finished run.
        on_progress: called about once a second with the progress of all runs.

    Returns:
        Rows of results.json.

    Raises:
        ConfigError: a method is unknown or impossible on this world, or the budget is in seconds.
        RunError: `out` holds a comparison of another configuration, or cannot be written.
    """
    methods = list(dict.fromkeys(methods))
    check(config, methods)
    same_settings(settings_of(config), out / "world.json", what="a comparison")
    note(command, out)
    tasks = [Task(config=config, method=method, seed=seed, out=out) for seed in seeds for method in methods]
    run_all(tasks, jobs=jobs, on_done=lambda task, own: on_done(task.method, task.seed, own), on_progress=on_progress)
    found = [read(out, task.method, task.seed) for task in tasks]
    rows = [{"method": entry["method"], "seed": entry["seed"], **row} for entry in found for row in entry["clients"]]
    results = {"about": _about(config, out), "rows": rows, "runs": found}
    (out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    return rows


def check(config: RunConfig, methods: Sequence[str]) -> None:
    """Check methods on a world: every error of the configuration shows before the first run.

    Raises:
        ConfigError: a method is unknown or impossible on this world, or the budget is in seconds.
    """
    if config.budget.seconds is not None:
        raise ConfigError("budget", "in seconds", "a comparison at equal work wants budget.rounds or budget.tokens")
    if not config.simulation.train:
        raise ConfigError("simulation.train", "false: there are no losses to compare", "leave it out")
    check_one_cluster(tree.build(config), "a comparison")
    for method in methods:
        for stage in stages(config, method):
            make_plan(stage)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A run that a comparison wants."""

    config: RunConfig
    method: str
    seed: int
    out: Path
    """Folder of the comparison."""
    world: str = ""
    """Names its world where there are several."""

    def __str__(self) -> str:
        return f"{self.world + ': ' if self.world else ''}{self.method}, seed {self.seed}"

    def progress(self, *, since: float) -> RunProgress:
        """How far it is, since a time."""
        found = progress_of(self.out, self.method, self.seed, since=since)
        return replace(found, method=f"{self.world}: {self.method}") if self.world else found


def run_all(
    tasks: Sequence[Task],
    *,
    jobs: int,
    on_done: Callable[[Task, float], None],
    on_progress: Callable[[list[RunProgress]], None],
) -> None:
    """Run all tasks that are not done, `jobs` at a time, each in a separate process.

    Args:
        tasks: the runs.
        jobs: processes to run at a time.
        on_done: called with each finished run and its mean own loss.
        on_progress: called about once a second with the progress of all runs.
    """
    with processes(jobs) as pool:
        # Those that take longest begin first, so that no process is left with one of them at the end.
        longest_first = sorted(tasks, key=lambda task: -models_per_token(task.config, task.method))
        running = {
            pool.submit(run_one, to_mapping(task.config), task.method, task.seed, str(task.out)): task
            for task in longest_first
        }
        began = time.time()
        waiting: set[Future[dict[str, Any]]] = set(running)
        try:
            while waiting:
                ended, waiting = wait(waiting, timeout=LOOK_EVERY_S, return_when=FIRST_COMPLETED)
                for future in ended:
                    measured = future.result()
                    on_done(running[future], sum(row["own"] for row in measured["clients"]) / len(measured["clients"]))
                on_progress([task.progress(since=began) for task in tasks])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # the first failure must show now, not after the other runs
            raise


def processes(jobs: int) -> ProcessPoolExecutor:
    """Fresh processes, since torch's threads do not survive a fork. They end with this one, also when it is killed."""
    return ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_end_with_parent)


def _end_with_parent() -> None:
    """End this process once its parent has gone: else the next comparison in the folder would meet its run."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "it runs in a process of the pool"

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent").start()


def models_per_token(config: RunConfig, method: str) -> float:
    """How many models a client of a method trains with each token: mean over the clients, by the last stage."""
    clients = tree.build(stages(config, method)[-1]).clients
    return sum(spec.settings.merge.models_per_token for spec in clients) / len(clients)


def note(command: str, out: Path) -> None:
    """Record when and by which command this comparison was begun or continued."""
    if command:
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        with (out / COMMANDS).open("a", encoding="utf-8") as file:
            file.write(f"{now}  {command}\n")


def _about(config: RunConfig, out: Path) -> dict[str, Any]:
    """The facts of a report beside the results: world, budget, configuration, commands, versions."""
    file = out / COMMANDS
    return {
        "name": config.name,
        "budget": {unit: value for unit, value in asdict(config.budget).items() if value is not None},
        "configuration": to_yaml(replace(config, run_dir=None, seed=0)),
        "commands": file.read_text(encoding="utf-8").splitlines() if file.is_file() else [],
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


def settings_of(config: RunConfig) -> dict[str, Any]:
    """The configuration without what may differ between the runs of a comparison."""
    return to_mapping(replace(config, run_dir=None, seed=0))


def same_settings(settings: dict[str, Any], file: Path, *, what: str) -> None:
    """Check that a folder holds runs of these settings: methods and seeds may be added, the world may not change.

    Args:
        settings: what may not change.
        file: of the folder; holds the settings from the first call on.
        what: the folder holds, for messages.

    Raises:
        RunError: the settings differ, or the folder cannot be written.
    """
    mapping = json.loads(json.dumps(settings))
    if file.is_file():
        if json.loads(file.read_text(encoding="utf-8")) != mapping:
            raise RunError(f"{file.parent} holds {what} of another configuration; give another --out")
        return
    make_folder(file.parent)
    try:
        file.write_text(json.dumps(mapping, indent=1), encoding="utf-8")
    except OSError as error:
        raise _unwritable(file.parent, error) from error


def make_folder(out: Path) -> None:
    """Make the folder of a comparison, unless it exists.

    Raises:
        ConfigError: it holds a run.
        RunError: it cannot be made.
    """
    try:
        if (out / rundir.CONFIG).exists():
            raise ConfigError("--out", f"{pasted(out)} holds a run", "give another folder")
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(out, error) from error


def _unwritable(out: Path, error: OSError) -> RunError:
    return RunError(f"cannot write {pasted(out)}: {error.strerror}; give another --out")


REPLACED = {"seed": "--seeds", "method": "--methods", "run_dir": "--out"}
"""Keys that a comparison sets itself, each with its option."""


def check_overrides(
    overrides: Sequence[str], *, replaced: Mapping[str, str] = REPLACED, what: str = "a comparison"
) -> None:
    """Refuse changes of keys that a command sets itself.

    Args:
        overrides: what the user typed.
        replaced: those keys, each with what to use instead. Keys below one are set with it.
        what: sets them, for messages.

    Raises:
        ConfigError: there is such a change.
    """
    for key in (override.partition("=")[0].strip() for override in overrides):
        for name, instead in replaced.items():
            if key == name or key.startswith((f"{name}.", f"{name}[")):
                raise ConfigError(key, f"{what} sets it itself", f"use {instead}")
