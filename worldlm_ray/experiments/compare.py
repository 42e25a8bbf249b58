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
import platform
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, replace
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
    if config.budget.seconds is not None:
        raise ConfigError("budget", "in seconds", "a comparison at equal work wants budget.rounds or budget.tokens")
    if not config.simulation.train:
        raise ConfigError("simulation.train", "false: there are no losses to compare", "leave it out")
    methods = list(dict.fromkeys(methods))
    for method in methods:  # every error of the configuration shows before the first run
        for stage in stages(config, method):
            make_plan(stage)
    _same_configuration(config, out)
    _note(command, out)
    wanted = [(method, seed) for seed in seeds for method in methods]
    _run_all(config, wanted, out, jobs=jobs, on_done=on_done, on_progress=on_progress)
    found = [read(out, method, seed) for method, seed in wanted]
    rows = [{"method": entry["method"], "seed": entry["seed"], **row} for entry in found for row in entry["clients"]]
    results = {"about": _about(config, out), "rows": rows, "runs": found}
    (out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    return rows


def _run_all(
    config: RunConfig,
    wanted: Sequence[tuple[str, int]],
    out: Path,
    *,
    jobs: int,
    on_done: Callable[[str, int, float], None],
    on_progress: Callable[[list[RunProgress]], None],
) -> None:
    """Run all pairs of a method and a seed, `jobs` at a time, each in a separate process."""
    mapping = to_mapping(config)
    # Fresh processes: torch's threads do not survive a fork.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        # Those that take longest begin first, so that no process is left with one of them at the end.
        longest_first = sorted(wanted, key=lambda pair: -models_per_token(config, pair[0]))
        tasks = {pool.submit(run_one, mapping, *pair, str(out)): pair for pair in longest_first}
        began = time.time()
        waiting: set[Future[dict[str, Any]]] = set(tasks)
        try:
            while waiting:
                ended, waiting = wait(waiting, timeout=LOOK_EVERY_S, return_when=FIRST_COMPLETED)
                for task in ended:
                    measured = task.result()
                    on_done(*tasks[task], sum(row["own"] for row in measured["clients"]) / len(measured["clients"]))
                on_progress([progress_of(out, method, seed, since=began) for method, seed in wanted])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # the first failure must show now, not after the other runs
            raise


def models_per_token(config: RunConfig, method: str) -> float:
    """How many models a client of a method trains with each token: mean over the clients, by the last stage."""
    clients = tree.build(stages(config, method)[-1]).clients
    return sum(spec.settings.merge.models_per_token for spec in clients) / len(clients)


def _note(command: str, out: Path) -> None:
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


def _same_configuration(config: RunConfig, out: Path) -> None:
    """Check that the folder holds this comparison: methods and seeds may be added, the world may not change."""
    file = out / "world.json"
    mapping = json.loads(json.dumps(to_mapping(replace(config, run_dir=None, seed=0))))
    if file.is_file():
        if json.loads(file.read_text(encoding="utf-8")) != mapping:
            raise RunError(f"{out} holds a comparison of another configuration; give another --out")
        return
    make_folder(out)
    try:
        file.write_text(json.dumps(mapping, indent=1), encoding="utf-8")
    except OSError as error:
        raise _unwritable(out, error) from error


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


def check_overrides(overrides: Sequence[str]) -> None:
    """Refuse changes of keys that a comparison sets itself.

    Raises:
        ConfigError: there is such a change.
    """
    for key in (override.partition("=")[0].strip() for override in overrides):
        if key in REPLACED:
            raise ConfigError(key, "a comparison sets it itself", f"use {REPLACED[key]}")
