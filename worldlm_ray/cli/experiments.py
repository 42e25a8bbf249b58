"""Commands that compare methods, and that use the models of a run that has ended.

compare, newcomer, map, evaluate, sample, export.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from worldlm_ray.cli.common import Conf, Json, Overrides, Run, console, errors, filled, load
from worldlm_ray.config import checks
from worldlm_ray.errors import ConfigError
from worldlm_ray.reports.progress import Progress
from worldlm_ray.storage.paths import pasted

if TYPE_CHECKING:
    from worldlm_ray.experiments.council_measure import CouncilMeasures
    from worldlm_ray.experiments.map_cells import Cell, Worlds

ALL_PRIVATE = "nothing to show: the losses of every client of this run are private (privacy.report_metrics)"
CouncilFlag = Annotated[bool, typer.Option("--council", help="a mixture of models, weighed while the text goes on")]
MembersOption = Annotated[
    str | None,
    typer.Option("--members", help="with --council: its nodes, with commas; all whose models may serve unless given"),
]
TopOption = Annotated[
    int | None, typer.Option("--top", help="with --council: so many models answer after the first 64 tokens; or all")
]


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
) -> None:
    """Compare methods on one world at equal work.

    Simulated runs, a table, plots and an HTML report. A comparison that was interrupted goes on where it was.
    """
    from worldlm_ray.experiments.compare import check_overrides, make_folder
    from worldlm_ray.experiments.compare import compare as run
    from worldlm_ray.experiments.comparison_progress import ComparisonProgress
    from worldlm_ray.experiments.methods import FOR_ADAPTERS, METHODS
    from worldlm_ray.plan import rundir

    check_overrides(overrides or [])
    filled(out, "--out")
    config = load(conf, overrides or [], None)
    every = [name for name in METHODS if name not in FOR_ADAPTERS or config.model.trainable == "lora"]
    names = every if methods == "all" else [name.strip() for name in methods.split(",")]
    checks.positive(seeds, "--seeds")
    checks.positive(jobs, "--jobs")
    folder = Path(f"runs/{config.name}-comparison" if out is None else out).absolute()
    make_folder(folder)
    total, done = len(dict.fromkeys(names)) * seeds, 0
    console.print(f"{total} runs in {pasted(folder)}", highlight=False, soft_wrap=True)
    with rundir.held(folder), ComparisonProgress(console) as progress:

        def on_done(method: str, seed: int, own: float) -> None:
            nonlocal done
            done += 1
            said = f"[{done}/{total}] {method}, seed {seed}: clients' own models {own:.4f} nats/byte"
            console.print(said, highlight=False, soft_wrap=True)

        run(
            config,
            names,
            range(seeds),
            out=folder,
            jobs=jobs,
            command=_command(),
            on_done=on_done,
            on_progress=progress.show,
        )
    _report(folder)


def _report(folder: Path) -> None:
    """Write the report of a comparison, and print its table and its verdict."""
    from worldlm_ray.experiments.comparison_numbers import summarize
    from worldlm_ray.experiments.comparison_report import write
    from worldlm_ray.experiments.comparison_table import table
    from worldlm_ray.experiments.verdict import equal_work, verdict

    page = write(folder)
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    console.print(table(summarize(results)))
    for sentence in [*verdict(results["runs"]), equal_work(results["runs"])]:
        console.print(sentence, highlight=False, soft_wrap=not console.is_terminal)
    console.print(f"report: {pasted(page)}", highlight=False, soft_wrap=True)


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


def evaluate(
    run: Run,
    tokens: Annotated[int, typer.Option(help="held-out tokens per client, at most")] = 65_536,
    as_json: Json = False,
    council: CouncilFlag = False,
    members: MembersOption = None,
    top: TopOption = None,
    document: Annotated[int, typer.Option(help="with --council: tokens after which its weights begin anew")] = 1024,
    fit_prior: Annotated[
        bool, typer.Option("--fit-prior", help="with --council: weights begin as validation text says, not alike")
    ] = False,
) -> None:
    """Measure every model of a run on held-out text.

    The models are those of the newest checkpoints. With --council their mixture is measured beside each of them.
    """
    from worldlm_ray.experiments.evaluate import evaluate as measure
    from worldlm_ray.experiments.evaluate import table, values

    checks.positive(tokens, "--tokens")
    checks.positive(document, "--document")
    _check_council(council, top, members=members, fit_prior=fit_prior or None)
    if council:
        from worldlm_ray.experiments.council import CouncilRules
        from worldlm_ray.experiments.council_measure import evaluate_council

        with Progress(errors) as progress:
            found = evaluate_council(
                run,
                tokens=tokens,
                members=members,
                rules=CouncilRules(top=top),
                document=document,
                fit_prior=fit_prior,
                on_phase=progress.phase,
            )
        _print_council(run, found, as_json=as_json)
        return
    with Progress(errors) as progress:  # stdout is for the result
        measures = measure(run, tokens=tokens, on_phase=progress.phase)
    if as_json:
        console.print_json(json.dumps(values(measures)))
        return
    if not measures:
        console.print(ALL_PRIVATE)
        return
    console.print(table(run, measures))


def _check_council(council: bool, top: int | None = None, **given: str | bool | None) -> None:
    """Refuse options of a council where there is none.

    Args:
        council: whether there is one.
        top: of `--top`.
        given: other options by name; None where the user has not given one.
    """
    for name, value in {"top": top, **given}.items():
        if value is not None and not council:
            raise ConfigError(f"--{name.replace('_', '-')}", "says how a council is made", "give --council, too")
    if top is not None:
        checks.positive(top, "--top")


def _print_council(run: str, measures: CouncilMeasures, *, as_json: bool) -> None:
    from worldlm_ray.experiments.council_measure import table, values

    for line in measures.left_out:
        errors.print(line, highlight=False)
    if as_json:
        console.print_json(json.dumps(values(measures)))
    elif measures.rows:
        console.print(table(run, measures))
    else:
        console.print(ALL_PRIVATE)


def sample(
    run: Run,
    node: Annotated[str, typer.Option(help="path of the node, such as world/code/python, or its end")] = "world",
    prompt: Annotated[str, typer.Option(help="text to continue")] = "",
    tokens: Annotated[int, typer.Option(help="tokens to generate")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token every time")] = 0.8,
    seed: Annotated[int, typer.Option(help="of the draws")] = 0,
    council: CouncilFlag = False,
    members: MembersOption = None,
) -> None:
    """Generate text from a node's model, from its checkpoint.

    With --council from the mixture of several models: RUN may then be a folder that `export --council` has written.
    """
    from worldlm_ray.experiments.evaluate import sample as generate

    checks.positive(tokens, "--tokens")
    checks.not_negative(temperature, "--temperature")
    checks.not_negative(seed, "--seed")
    _check_council(council, members=members)
    if council:
        from worldlm_ray.experiments.council_serving import opened

        models, left_out = opened(run, members)
        for line in left_out:
            errors.print(line, highlight=False)
        text = models.text(prompt, tokens=tokens, temperature=temperature, seed=seed)
        console.print(prompt + text, markup=False, highlight=False, soft_wrap=True)
        weights = sorted(models.weights.items(), key=lambda item: -item[1])[:5]
        said = ", ".join(f"{name} {weight:.3f}" for name, weight in weights)
        errors.print(f"council of {len(models.names)} models, weights at the end: {said}", highlight=False)
        return
    text = generate(run, node, prompt=prompt, tokens=tokens, temperature=temperature, seed=seed)
    console.print(prompt + text, markup=False, highlight=False, soft_wrap=True)


def export(
    run: Run,
    folder: Annotated[str, typer.Argument(help="folder to write")],
    node: Annotated[str, typer.Option(help="path of the node, such as world/code/python, or its end")] = "world",
    merge: Annotated[
        bool, typer.Option("--merge", help="of a run that trains adapters: whole weights instead of a PEFT adapter")
    ] = False,
    council: CouncilFlag = False,
    members: MembersOption = None,
    top: TopOption = None,
    prior_of: Annotated[
        str | None, typer.Option(help="with --council: a node whose validation text its first weights are fitted on")
    ] = None,
) -> None:
    """Write a node's model as a Hugging Face folder.

    Of a run that trains adapters it is a PEFT adapter, or whole weights with --merge.

    With --council several models, each in a folder, and council.json: `worldlm sample FOLDER --council` reads them.
    """
    from worldlm_ray.experiments.export import export as write

    filled(folder, "FOLDER")
    _check_council(council, top, members=members, prior_of=prior_of)
    if council:
        from worldlm_ray.experiments.council import CouncilRules
        from worldlm_ray.experiments.council_folder import export_council

        nodes, notes = export_council(
            run, Path(folder), members=members, rules=CouncilRules(top=top), prior_of=prior_of
        )
        what = f"a council of {len(nodes)} models"
    else:
        what, notes = write(run, node, Path(folder), merge=merge)
    for line in notes:
        errors.print(line, markup=False, highlight=False)
    console.print(f"{what} is in {pasted(folder)}", highlight=False, soft_wrap=True)
