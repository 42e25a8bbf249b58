"""Commands that compare methods: compare, newcomer, map."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from worldlm_ray.cli.common import Conf, Json, Overrides, console, errors, filled, load, print_json
from worldlm_ray.config import checks
from worldlm_ray.storage.paths import pasted

if TYPE_CHECKING:
    from worldlm_ray.experiments.map_cells import Cell, Worlds


def compare(
    conf: Conf,
    overrides: Overrides = None,
    methods: Annotated[
        str,
        typer.Option(help="names with commas, `all` for every method; +VARIANT changes one, such as worldlm+merge_all"),
    ] = "fedavg,local,worldlm",
    seeds: Annotated[int, typer.Option(help="runs per method: seeds 0, 1, ...")] = 1,
    jobs: Annotated[int, typer.Option(help="runs at a time, a process each")] = 1,
    out: Annotated[str | None, typer.Option(help="folder of the comparison; runs/NAME-comparison unless given")] = None,
    as_json: Json = False,
) -> None:
    """Compare methods on one world at equal work.

    Simulated runs, a table, plots and an HTML report. A comparison that was interrupted goes on where it was.
    """
    from worldlm_ray.api import comparison
    from worldlm_ray.experiments.compare import check_overrides
    from worldlm_ray.experiments.comparison_progress import ComparisonProgress

    check_overrides(overrides or [])
    filled(out, "--out")
    config = load(conf, overrides or [], None)
    names = comparison.names_of(config, methods)
    checks.positive(seeds, "--seeds")
    checks.positive(jobs, "--jobs")
    folder = comparison.folder_of(config, out)
    shown = errors if as_json else console  # with JSON, stdout is for that alone
    total, done = len(names) * seeds, 0
    shown.print(f"{total} runs in {pasted(folder)}", highlight=False, soft_wrap=True)

    def on_done(method: str, seed: int, own: float) -> None:
        nonlocal done
        done += 1
        said = f"[{done}/{total}] {method}, seed {seed}: clients' own models {own:.4f} nats/byte"
        shown.print(said, highlight=False, soft_wrap=True)

    with ComparisonProgress(shown) as progress:
        found = comparison.carry_out(
            config,
            names,
            seeds=seeds,
            jobs=jobs,
            folder=folder,
            command=_command(),
            on_done=on_done,
            on_progress=progress.show,
        )
    if as_json:
        facts = {"folder": str(found.folder), "methods": found.rows, "verdict": found.verdict, "runs": found.runs}
        print_json(facts)
        return
    console.print(found.shown())
    for sentence in found.verdict:
        console.print(sentence, highlight=False, soft_wrap=not console.is_terminal)
    console.print(f"report: {pasted(found.report)}", highlight=False, soft_wrap=True)


def newcomer(
    conf: Conf,
    overrides: Overrides = None,
    clients: Annotated[
        str | None,
        typer.Option("--newcomers", help="their paths, with commas; each federation's last client unless given"),
    ] = None,
    steps: Annotated[int, typer.Option(help="optimizer steps of a newcomer, from the world's model")] = 50,
    alone_steps: Annotated[int, typer.Option(help="optimizer steps of the same client alone")] = 500,
    seeds: Annotated[int, typer.Option(help="seeds 0, 1, ...")] = 1,
    jobs: Annotated[int, typer.Option(help="runs at a time, a process each")] = 1,
    out: Annotated[str | None, typer.Option(help="folder of all runs; runs/NAME-newcomers unless given")] = None,
) -> None:
    """Measure what joining an old world brings to a newcomer.

    Simulated runs: the world without them, then each with a few steps from the world's model, and alone with many.
    An interrupted call goes on where it was.
    """
    from worldlm_ray.experiments.compare import check_overrides, make_folder
    from worldlm_ray.experiments.comparison_progress import ComparisonProgress
    from worldlm_ray.experiments.newcomer import Rules, newcomers, table
    from worldlm_ray.plan import rundir

    check_overrides(overrides or [])
    filled(out, "--out")
    config = load(conf, overrides or [], None)
    checks.positive(seeds, "--seeds")
    checks.positive(jobs, "--jobs")
    folder = Path(f"runs/{config.name}-newcomers" if out is None else out).absolute()
    make_folder(folder)
    console.print(f"runs in {pasted(folder)}", highlight=False, soft_wrap=True)
    names = None if clients is None else tuple(name.strip() for name in clients.split(","))
    rules = Rules(names=names, steps=steps, alone_steps=alone_steps)
    with rundir.held(folder), ComparisonProgress(console) as progress:
        found = newcomers(
            config,
            range(seeds),
            out=folder,
            rules=rules,
            jobs=jobs,
            command=_command(),
            on_phase=lambda text: console.print(text, highlight=False, soft_wrap=True),
            on_progress=progress.show,
        )
    console.print(table(found, rules))


def map_(
    overrides: Overrides = None,
    text: Annotated[str, typer.Option(help="bytes of each client to train on, with commas")] = "12kB,48kB,192kB,768kB",
    kinship: Annotated[
        str, typer.Option(help="shares of a client's text that are of a source common to all, with commas")
    ] = "0,1/4,1/2,1",
    clients: Annotated[int, typer.Option(help="clients; four or more are in two federations")] = 4,
    common: Annotated[
        str | None, typer.Option(help="the common source: a corpus, a file or a folder of data_dir; or the largest")
    ] = None,
    corner_seeds: Annotated[int, typer.Option(help="seeds at the four corners of the map; elsewhere one")] = 3,
    jobs: Annotated[int, typer.Option(help="runs at a time, a process each")] = 1,
    out: Annotated[str | None, typer.Option(help="folder of the map; runs/map unless given")] = None,
) -> None:
    """Draw when federating pays, by text and kinship.

    Simulated runs of built-in corpora, or of data_dir=FOLDER with FEDERATION/CLIENT.txt; a table and a figure. A map
    that was interrupted goes on where it was. Settings not given are those of the preset `federating`.
    """
    from worldlm_ray.experiments import map_cells
    from worldlm_ray.experiments.compare import check_overrides

    given = overrides or []
    check_overrides(given, replaced=map_cells.REPLACED, what="a map")
    filled(out, "--out")
    for key, value in {"--clients": clients, "--corner-seeds": corner_seeds, "--jobs": jobs}.items():
        checks.positive(value, key)
    base = load("federating", ["name=map", *given], None)
    kinships = map_cells.kinships_of(kinship)
    sources = map_cells.sources(base.data_dir, common=common, clients=clients)
    worlds = map_cells.worlds(base, *sources, kinships)
    cells = map_cells.grid(map_cells.texts_of(text), kinships, corner_seeds=corner_seeds)
    _map(worlds, cells, Path(f"runs/{base.name}" if out is None else out).absolute(), jobs=jobs)


def _map(worlds: Worlds, cells: list[Cell], folder: Path, *, jobs: int) -> None:
    """Run a map, and write and print its result."""
    from worldlm_ray.experiments import map_run
    from worldlm_ray.experiments.compare import Task, make_folder
    from worldlm_ray.experiments.comparison_progress import ComparisonProgress
    from worldlm_ray.experiments.map_report import table, write
    from worldlm_ray.plan import rundir

    make_folder(folder)
    done = 0
    with rundir.held(folder), ComparisonProgress(console) as progress:
        console.print(f"texts of {len(cells)} worlds ...", highlight=False)
        work = map_run.plan_work(worlds, cells, folder, command=_command())
        for cell, why in work.short.items():
            console.print(f"left out: {cell}: {why}", highlight=False, soft_wrap=True)
        console.print(f"{work} in {pasted(folder)}", highlight=False, soft_wrap=True)

        def on_done(task: Task, own: float) -> None:
            nonlocal done
            done += 1
            said = f"[{done}/{len(work.tasks)}] {task}: clients' own models {own:.4f} nats/byte"
            console.print(said, highlight=False, soft_wrap=True)

        results = map_run.run(work, jobs=jobs, on_done=on_done, on_progress=progress.show)
    figure = write(results, folder)
    console.print(table(results))
    console.print(f"figure: {pasted(figure)}", highlight=False, soft_wrap=True)


def _command() -> str:
    """What the user typed."""
    return " ".join(pasted(word) for word in ["worldlm", *sys.argv[1:]])
