"""`worldlm map`: when does federating a language model pay? By the text of a client, and how much of it is common.

Every cell is a world (map_cells.py), in which methods are compared as `worldlm compare` does: training alone, stopped
early; the federation; and one model of all texts with fine-tuning, which gives the headroom.

    OUT/map.json                     what the cells share
    OUT/cells/TEXT-KINSHIP/runs/     the runs of a cell, as of a comparison; each is kept, so a map can be continued
    OUT/map.csv, map.md, map.png     the result: see map_report.py
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from worldlm_ray.config.schema import DataConfig
from worldlm_ray.data import describe, prepare, prepare_shards
from worldlm_ray.data.text import members_of
from worldlm_ray.experiments.compare import Task, check, note, run_all, same_settings, settings_of
from worldlm_ray.experiments.comparison_numbers import ALONE, ORACLE, headroom, summarize
from worldlm_ray.experiments.comparison_progress import RunProgress
from worldlm_ray.experiments.comparison_run import MEASURES, folder_of, read
from worldlm_ray.experiments.map_cells import Cell, Worlds, size
from worldlm_ray.plan.plan import make_plan
from worldlm_ray.plan.tree import NodeSpec

FEDERATED = "worldlm"
METHODS = (ALONE, FEDERATED, ORACLE)
ENOUGH = 0.99
"""A part of a text that has this share of its bytes is complete: the last character may not fit."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of a cell."""

    cell: Cell
    numbers: dict[str, Any] | None
    """Of `numbers`. None where a source has too little text."""
    note: str = ""
    """Why there are none."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """The runs of a map."""

    cells: tuple[Cell, ...]
    tasks: tuple[Task, ...]
    short: dict[Cell, str]
    """Cells without runs: which source is too small."""

    def __str__(self) -> str:
        """Number of runs, and of those that are done."""
        number, done = len(self.tasks), sum(map(_is_done, self.tasks))
        worlds = f"{len(self.cells) - len(self.short)} worlds, {len(METHODS)} methods"
        seeds = max(len(cell.seeds) for cell in self.cells)
        more = f", {seeds} seeds at the corners" if seeds > 1 else ""
        return f"{number} runs ({worlds}{more})" + (f", {done} of them done" if done else "")


def plan_work(worlds: Worlds, cells: Sequence[Cell], out: Path, *, command: str = "") -> Work:
    """Check all cells, and prepare their texts.

    Args:
        worlds: what they share.
        cells: the grid.
        out: folder of the map.
        command: what the user typed.

    Raises:
        ConfigError: the configuration is wrong, or a method is impossible.
        DataError: a text is damaged, or too short to be dealt out.
        RunError: `out` holds a map of another configuration, or cannot be written.
    """
    check(worlds.config(cells[0]), METHODS)  # the cells differ in their texts alone
    same_settings(settings_of(worlds.base) | {"map": worlds.facts()}, out / "map.json", what="a map")
    note(command, out)
    tasks, short = list[Task](), dict[Cell, str]()
    for cell in cells:
        config, folder = worlds.config(cell), out / "cells" / cell.folder
        mine = [
            Task(config=config, method=method, seed=seed, out=folder, world=str(cell))
            for seed in cell.seeds
            for method in METHODS
        ]
        if not all(map(_is_done, mine)) and (problem := shortage(worlds, cell)):
            short[cell] = problem
        else:
            tasks += mine
    return Work(cells=tuple(cells), tasks=tuple(tasks), short=short)


def run(
    work: Work,
    *,
    jobs: int,
    on_done: Callable[[Task, float], None] = lambda task, own: None,
    on_progress: Callable[[list[RunProgress]], None] = lambda runs: None,
) -> list[Result]:
    """Run what is missing; returns the numbers of all cells, in their order.

    Args:
        work: the runs.
        jobs: processes to run at a time.
        on_done: called with each finished run and its mean own loss.
        on_progress: called about once a second with the progress of all runs.
    """
    run_all(work.tasks, jobs=jobs, on_done=on_done, on_progress=on_progress)
    found: dict[str, list[dict[str, Any]]] = {}
    for task in work.tasks:
        found.setdefault(task.out.name, []).append(read(task.out, task.method, task.seed))
    return [
        Result(cell=cell, numbers=None, note=work.short[cell])
        if cell in work.short
        else Result(cell=cell, numbers=numbers(found[cell.folder]))
        for cell in work.cells
    ]


def _is_done(task: Task) -> bool:
    return (folder_of(task.out, task.method, task.seed) / MEASURES).is_file()


def numbers(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of a cell, by its runs: those of the federation's row in a comparison, and beside them

    local, pooled: losses. error: standard error of the gain over seeds, None with one. headroom: H.
    """
    rows = {row["method"]: row for row in summarize({"runs": runs})}
    row, room = rows[FEDERATED], headroom(runs)
    local = rows[ALONE]["own"]
    return {
        "local": local,
        "federated": row["own"],
        "pooled": rows[ORACLE]["own"],
        "gain": row["gain"],
        "error": None if row["error"] is None else row["error"] / local,
        "headroom": None if room is None else room.share,
        **{name: row[name] for name in ("of_headroom", "gains", "clients", "worst_vs_local")},
    }


def shortage(worlds: Worlds, cell: Cell) -> str:
    """Prepare the texts of a cell. Returns which source is too small; empty if none is.

    Raises:
        DataError: a text is damaged, or too short to be dealt out.
    """
    plan = make_plan(worlds.config(cell))
    for sections, key in _by_source(plan.root.clients):
        prepare_shards(sections, context=plan.shape.context, key=key)
        for section in sections:
            got, wanted = prepare(section, context=plan.shape.context, key=key).train_bytes, section.train_bytes or 0
            if got < ENOUGH * wanted:
                return f"{describe(section)}, shard {section.shard}: {size(got)} to train on, not {size(wanted)}"
    return ""


def _by_source(clients: Sequence[NodeSpec]) -> list[tuple[list[DataConfig], str]]:
    """The parts of the clients' texts, those of a source together, with a key for messages."""
    found: dict[str, tuple[list[DataConfig], str]] = {}
    for spec in clients:
        for index, section in enumerate(members_of(spec.settings.data, f"{spec.key}.data")):
            source = repr(replace(section, shard=None))
            found.setdefault(source, ([], f"{spec.key}.data.pool[{index}]"))[0].append(section)
    return list(found.values())
