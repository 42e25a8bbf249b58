"""Compare methods on one world, from Python and for the command line."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from worldlm_ray.api.run import as_table
from worldlm_ray.api.settings import Conf, as_overrides, configured
from worldlm_ray.config import checks
from worldlm_ray.config.schema import RunConfig
from worldlm_ray.experiments import comparison_table
from worldlm_ray.experiments.compare import check_overrides, make_folder
from worldlm_ray.experiments.compare import compare as run_all
from worldlm_ray.experiments.comparison_numbers import summarize
from worldlm_ray.experiments.comparison_progress import ComparisonProgress, RunProgress
from worldlm_ray.experiments.methods import FOR_ADAPTERS, METHODS
from worldlm_ray.experiments.verdict import equal_work, verdict
from worldlm_ray.plan import rundir
from worldlm_ray.reports.notebook import as_html, console_for
from worldlm_ray.reports.terminal import FittingTable

LOG = logging.getLogger(__name__)
DEFAULT_METHODS = ("fedavg", "local", "worldlm")


@dataclass(frozen=True)
class Comparison:
    """A finished comparison: its folder and what was measured."""

    folder: Path
    runs: list[dict[str, Any]] = field(repr=False)
    """One entry per method and seed, as in results.json."""

    @property
    def report(self) -> Path:
        """The HTML page with tables and plots."""
        return self.folder / "report" / "report.html"

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One row per method: losses in nats per byte, gain, staleness, times and bytes."""
        return summarize({"runs": self.runs})

    @property
    def verdict(self) -> list[str]:
        """The result in sentences."""
        return [*verdict(self.runs), equal_work(self.runs)]

    def shown(self) -> FittingTable:
        """The table of methods for a terminal."""
        return comparison_table.table(self.rows)

    def table(self) -> Any:
        """One row per method, as a pandas DataFrame, or as a list of dicts where pandas is not installed."""
        return as_table(self.rows)

    def _repr_html_(self) -> str:
        return as_html(self.shown())


def compare(
    conf: Conf,
    *overrides: str,
    methods: str | Sequence[str] = DEFAULT_METHODS,
    seeds: int = 1,
    jobs: int = 1,
    out: str | PathLike[str] | None = None,
    progress: bool | None = None,
    on_done: Callable[[str, int, float], None] = lambda method, seed, own: None,
    **settings: Any,
) -> Comparison:
    """Compare methods on one world at equal work, as `worldlm compare` does.

        found = compare("federating", methods=["local", "fedavg", "worldlm"], seeds=3, jobs=2)
        found.table()

    Each run is a separate process, which imports the program that calls this: a script needs
    `if __name__ == "__main__":` around the call. A comparison that was interrupted goes on where it was.

    Args:
        conf: a preset's name, the path of a YAML file, or a mapping with the same keys.
        overrides: such as `budget.rounds=8`.
        methods: names, in a list or with commas; `all` for every method.
        seeds: runs per method: seeds 0, 1, ...
        jobs: processes to run at a time.
        out: folder of the comparison; `runs/NAME-comparison` unless given.
        progress: whether to show the progress; unless given, on a terminal.
        on_done: called with method, seed and mean own loss (nats per byte) of each finished run.
        settings: overrides by key, with mappings for what is below.

    Raises:
        ConfigError: the configuration is wrong, or a method is unknown or impossible on this world.
        RunError: the folder holds another comparison, or cannot be written.
    """
    changes = [*overrides, *as_overrides(settings)]
    check_overrides(changes)
    config = configured(conf, changes, say=LOG.info)
    wanted = names_of(config, methods)
    checks.positive(seeds, "seeds")
    checks.positive(jobs, "jobs")
    folder = folder_of(config, None if out is None else fspath(out))
    with ComparisonProgress(console_for(progress)) as shown:
        return carry_out(config, wanted, seeds=seeds, jobs=jobs, folder=folder, on_done=on_done, on_progress=shown.show)


def names_of(config: RunConfig, methods: str | Sequence[str]) -> list[str]:
    """The methods that a user names: a list, or a text with commas; `all` are those that the model can have."""
    if methods == "all":
        return [name for name in METHODS if name not in FOR_ADAPTERS or config.model.trainable == "lora"]
    named = methods.split(",") if isinstance(methods, str) else methods
    return list(dict.fromkeys(name.strip() for name in named))


def folder_of(config: RunConfig, out: str | None) -> Path:
    """The folder of a comparison, made if missing.

    Raises:
        ConfigError: it holds a run.
        RunError: it cannot be made.
    """
    folder = Path(f"runs/{config.name}-comparison" if out is None else out).absolute()
    make_folder(folder)
    return folder


def carry_out(
    config: RunConfig,
    methods: Sequence[str],
    *,
    seeds: int,
    jobs: int,
    folder: Path,
    command: str = "",
    on_done: Callable[[str, int, float], None],
    on_progress: Callable[[list[RunProgress]], None],
) -> Comparison:
    """Run what is missing, and write the report.

    Args:
        config: the world.
        methods: names.
        seeds: runs per method.
        jobs: processes to run at a time.
        folder: of the comparison.
        command: what the user typed, for the report.
        on_done: called with method, seed and mean own loss of each finished run.
        on_progress: called about once a second with the progress of all runs.

    Raises:
        ConfigError: a method is unknown or impossible on this world.
        RunError: the folder holds another comparison, or another process runs it.
    """
    with rundir.held(folder):
        run_all(
            config,
            methods,
            range(seeds),
            out=folder,
            jobs=jobs,
            command=command,
            on_done=on_done,
            on_progress=on_progress,
        )
    from worldlm_ray.experiments.comparison_report import write  # matplotlib

    write(folder)
    return Comparison(folder, json.loads((folder / "results.json").read_text(encoding="utf-8"))["runs"])
