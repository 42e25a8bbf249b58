"""The `worldlm` command.

Errors of the user are one line on stderr and exit code 2; `--debug` shows the traceback. Nothing heavy is imported
before it is needed, so that a wrong configuration is answered in a second.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.text import Text

from worldlm_ray.config import checks, loading
from worldlm_ray.config.schema import RunConfig
from worldlm_ray.errors import ConfigError, Interrupted, OutputError, WorldLMError
from worldlm_ray.reports.progress import Progress, Stop
from worldlm_ray.reports.terminal import Terminal
from worldlm_ray.storage.filesystem import expanded
from worldlm_ray.storage.paths import pasted

WATCH_S = 1.0
"""Seconds between two looks of `status --watch`."""
app = typer.Typer(
    name="worldlm",
    help="Train language models across federations of federations, asynchronously, on Ray.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Terminal()
errors = Terminal(stderr=True, soft_wrap=True)

_spoken_of: list[tuple[str, list[str]]] = []
"""The configuration of this command, with its overrides: where an error may lie."""

Conf = Annotated[str, typer.Argument(help="a preset's name (see `worldlm presets`) or the path of a YAML file")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="changes, such as training.lr=1e-3 or world.children[0].training.local_steps=20"),
]
Run = Annotated[str, typer.Argument(help="a run's folder, or its name under runs/")]
RunDir = Annotated[str | None, typer.Option("--run-dir", help="folder of the run; runs/NAME unless given")]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]
PerGb = Annotated[
    float | None, typer.Option("--per-gb", min=0.0, help="price of a GB between places: adds up what moves")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        python = ".".join(map(str, sys.version_info[:3]))
        parts = [f"{name} {version(name)}" for name in ("worldlm_ray", "ray", "torch")]
        console.print(", ".join([*parts, f"Python {python}"]), highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="print the version", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """Read by `main`; stands here so that --help lists it."""


@app.command()
def train(
    conf: Annotated[str | None, typer.Argument(help="a preset's name or the path of a YAML file")] = None,
    overrides: Overrides = None,
    resume: Annotated[str | None, typer.Option(help="continue this run: its folder, or its name under runs/")] = None,
    run_dir: RunDir = None,
    address: Annotated[
        str | None,
        typer.Option(help="of a Ray cluster, such as auto or ray://host:10001; none starts a local one"),
    ] = None,
) -> None:
    """Train a world on Ray.

    Ctrl-C writes checkpoints and leaves; a second one leaves at once. Exit codes: 0 finished, 2 an error of one line,
    130 stopped by Ctrl-C, 143 stopped by SIGTERM.
    """
    changes = list(overrides or [])
    if resume is not None and conf is not None:
        # With --resume there is no CONF: what stands in its place is the first override.
        changes.insert(0, conf)
    if resume is not None and run_dir is not None:
        raise ConfigError("--run-dir", "cannot be given with --resume", "the run stays in its folder")
    if resume is None and conf is None:
        raise ConfigError("CONF", "nothing to train", "name a preset, a YAML file, or --resume RUN")
    from worldlm_ray.plan import rundir
    from worldlm_ray.plan.plan import make_plan

    with ExitStack() as holding:
        if resume is not None:
            folder = rundir.find(resume)
            holding.enter_context(rundir.held(folder))
            _spoken_of[:] = [(str(folder / rundir.CONFIG), changes)]
            plan = rundir.resume(resume, changes, check_data=address is None)
        else:
            assert conf is not None
            # On a cluster every machine looks for the texts of its own clients.
            plan = rundir.create(make_plan(_load(conf, changes, run_dir), check_data=address is None))
            holding.enter_context(rundir.held_anew(plan))
        console.print(f"run folder {pasted(plan.run_dir)}", highlight=False, soft_wrap=True)
        _warn(plan.warnings)
        outcome, code = _train(plan, address, is_new=resume is None)
    _report(plan.run_dir, outcome.summary, outcome.samples)
    if outcome.summary["status"] == "stopped":
        raise typer.Exit(code)


def _train(plan: Any, address: str | None, *, is_new: bool) -> tuple[Any, int]:
    """Train on Ray with a progress display; a new run that could not begin leaves no folder.

    Returns:
        The outcome, and the exit code if the run was stopped.
    """
    from worldlm_ray.plan import rundir

    with Progress(console, errors) as progress, Stop(progress.notice) as stop:
        from worldlm_ray import launch  # takes seconds, in which a signal must find its handler

        def phase(name: str) -> None:
            progress.phase(name)
            stop.phase(name)

        try:
            outcome = launch.train(
                plan,
                address=address,
                on_progress=progress.show,
                on_phase=phase,
                on_step=progress.step,
                on_warning=progress.alert,
                should_stop=stop.asked,
            )
            progress.warn(outcome.summary["warnings"])
        except Interrupted as error:
            if is_new:
                rundir.discard(plan)
            progress.notice(f"worldlm: {error}")
            raise typer.Exit(stop.code) from None
        except WorldLMError:
            if is_new:
                rundir.discard(plan)
            raise
    return outcome, stop.code


@app.command()
def simulate(conf: Conf, overrides: Overrides = None, run_dir: RunDir = None) -> None:
    """Train a world in one process, under a virtual clock.

    Training is real; machines and network are simulated.

    With simulation.train=false nothing is trained: staleness, times and bytes of very large worlds.
    """
    from worldlm_ray.plan import rundir
    from worldlm_ray.plan.plan import make_plan

    plan = rundir.create(make_plan(_load(conf, overrides or [], run_dir)), simulated=True)
    from worldlm_ray.simulation.simulator import simulate as run
    from worldlm_ray.tracking.status import record_failure
    from worldlm_ray.training.local import too_many_cores

    console.print(f"run folder {pasted(plan.run_dir)}", highlight=False, soft_wrap=True)
    _warn(plan.warnings)
    began, events = time.monotonic(), 0
    progress, keeps = Progress(console, errors), "what there is by now is kept"
    with rundir.held_anew(plan), progress, Stop(progress.notice, keeps) as stop:
        progress.phase("simulating")
        if warning := too_many_cores({spec.path: spec.settings.resources for spec in plan.root.clients}):
            progress.alert(warning)

        def look(simulation: Any) -> None:
            nonlocal events
            events = simulation.events
            progress.warn(simulation.tracker.warnings)
            progress.show_if_due(simulation.tracker.snapshot)

        try:
            outcome = run(plan, on_progress=look, should_stop=stop.asked)
        except Exception as error:
            rundir.discard(plan, began=events > 0)
            record_failure(plan.run_dir, str(error) or type(error).__name__)
            raise
        progress.warn(outcome.summary["warnings"])
    if outcome.summary.get("trained", True):
        _report(plan.run_dir, outcome.summary, outcome.samples)
    else:
        _report_costs(outcome.summary, events=events, took_s=time.monotonic() - began)
    if outcome.summary["status"] == "stopped":
        raise typer.Exit(stop.code)


def _report_costs(summary: dict[str, Any], *, events: int, took_s: float) -> None:
    """What a simulation without training says."""
    from worldlm_ray.reports.tables import amount, budget_line, cost_table

    console.print(cost_table(summary))
    if line := budget_line(summary):
        console.print(line, highlight=False, soft_wrap=True)
    cpu_s = time.process_time()
    memory = f"{amount(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)}B"
    console.print(
        f"nothing was trained: no losses. {events:,} events in {took_s:.1f} s ({cpu_s:.1f} s of CPU, "
        f"{events / cpu_s:,.0f} events each); at most {memory} of memory",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
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
    from worldlm_ray.experiments.methods import METHODS
    from worldlm_ray.plan import rundir

    check_overrides(overrides or [])
    _filled(out, "--out")
    config = _load(conf, overrides or [], None)
    names = list(METHODS) if methods == "all" else [name.strip() for name in methods.split(",")]
    checks.positive(seeds, "--seeds")
    checks.positive(jobs, "--jobs")
    folder = Path(f"runs/{config.name}-comparison" if out is None else out).absolute()
    make_folder(folder)
    total, done = len(dict.fromkeys(names)) * seeds, 0
    console.print(f"{total} runs in {pasted(folder)}", highlight=False, soft_wrap=True)
    command = " ".join(pasted(word) for word in ["worldlm", *sys.argv[1:]])
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
            command=command,
            on_done=on_done,
            on_progress=progress.show,
        )
    from worldlm_ray.experiments.comparison_report import summarize, table, write
    from worldlm_ray.experiments.verdict import equal_work, verdict

    page = write(folder)
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    console.print(table(summarize(results)))
    for sentence in [*verdict(results["runs"]), equal_work(results["runs"])]:
        console.print(sentence, highlight=False, soft_wrap=not console.is_terminal)
    console.print(f"report: {pasted(page)}", highlight=False, soft_wrap=True)


@app.command()
def show(conf: Conf, overrides: Overrides = None, as_json: Json = False, per_gb: PerGb = None) -> None:
    """Show the tree, sizes, memory and privacy of a configuration."""
    from worldlm_ray.plan.plan import make_plan
    from worldlm_ray.reports.describe import crossing_table, describe, left_out, misfits, tables

    plan = make_plan(_load(conf, overrides or [], None))
    facts = describe(plan)
    if as_json:
        console.print_json(json.dumps(facts))
        return
    for table in tables(facts):
        console.print(table)
    if facts["crossings"]:
        console.print(crossing_table(facts, per_gb=per_gb))
    elif per_gb is not None:
        console.print("nothing moves between places: no node has placement.labels of its own")
    for line in [*misfits(facts), *left_out(plan)]:
        console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)
    from worldlm_ray.reports.spending import planned, planned_table, private_clients, weak_deltas

    if private_clients(plan):
        with console.status("reading the private clients' texts"):
            rows = planned(plan)
        console.print(planned_table(rows))
        _warn(weak_deltas(plan, rows))


@app.command()
def presets() -> None:
    """List the configurations that ship with the package."""
    for name, path in loading.presets().items():
        console.print(f"{name:16} {path.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}", highlight=False)


@app.command()
def evaluate(
    run: Run,
    tokens: Annotated[int, typer.Option(help="held-out tokens per client, at most")] = 65_536,
    as_json: Json = False,
) -> None:
    """Measure every model of a run on held-out text.

    The models are those of the newest checkpoints.
    """
    from worldlm_ray.experiments.evaluate import evaluate as measure
    from worldlm_ray.experiments.evaluate import table, values

    checks.positive(tokens, "--tokens")
    with Progress(errors) as progress:  # stdout is for the result
        measures = measure(run, tokens=tokens, on_phase=progress.phase)
    if as_json:
        console.print_json(json.dumps(values(measures)))
        return
    if not measures:
        console.print("nothing to show: the losses of every client of this run are private (privacy.report_metrics)")
        return
    console.print(table(run, measures))


@app.command()
def sample(
    run: Run,
    node: Annotated[str, typer.Option(help="path of the node, such as world/code/python, or its end")] = "world",
    prompt: Annotated[str, typer.Option(help="text to continue")] = "",
    tokens: Annotated[int, typer.Option(help="tokens to generate")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token every time")] = 0.8,
    seed: Annotated[int, typer.Option(help="of the draws")] = 0,
) -> None:
    """Generate text from a node's model, from its checkpoint."""
    from worldlm_ray.experiments.evaluate import sample as generate

    checks.positive(tokens, "--tokens")
    checks.not_negative(temperature, "--temperature")
    checks.not_negative(seed, "--seed")
    text = generate(run, node, prompt=prompt, tokens=tokens, temperature=temperature, seed=seed)
    console.print(prompt + text, markup=False, highlight=False, soft_wrap=True)


@app.command()
def export(
    run: Run,
    folder: Annotated[str, typer.Argument(help="folder to write")],
    node: Annotated[str, typer.Option(help="path of the node, such as world/code/python, or its end")] = "world",
) -> None:
    """Write a node's model as a Hugging Face folder."""
    from worldlm_ray.experiments.export import export as write

    _filled(folder, "FOLDER")
    path, notes = write(run, node, Path(folder))
    for line in notes:
        errors.print(line, markup=False, highlight=False)
    console.print(f"{path} is in {pasted(folder)}", highlight=False, soft_wrap=True)


@app.command()
def privacy(run: Run, as_json: Json = False) -> None:
    """Print the privacy spent by a run, and check it.

    Ledgers are compared with the audit trail: every accepted update must be paid for.
    """
    from worldlm_ray.plan import rundir
    from worldlm_ray.reports import trail
    from worldlm_ray.reports.spending import statement_table, statements, unpaid, weak_deltas

    plan = rundir.reopen(run, check_data=False)
    rows, missing = statements(plan), unpaid(plan)
    if rows and (found := trail.look(plan.run_dir)).damage:
        missing.append(f"not known, since {found.conclusion(plan.run_dir)}")
    if as_json:
        console.print_json(json.dumps({"ledgers": [vars(row) for row in rows], "unpaid": missing}))
    elif not rows:
        console.print("nothing was spent: no client of this run trains with differential privacy, or none has begun")
    else:
        console.print(statement_table(rows))
        console.print(
            "every accepted update was paid for" if not missing else "NOT PAID FOR: " + "; ".join(missing),
            highlight=False,
        )
    _warn(weak_deltas(plan, rows))
    if missing:
        raise typer.Exit(1)


@app.command()
def join(
    run: Run,
    overrides: Overrides = None,
    under: Annotated[str, typer.Option(help="path of the federation, such as world/europe")] = "world",
    client: Annotated[str, typer.Option(help="name of the new client")] = "",
    data: Annotated[list[str] | None, typer.Option(help="a file with its text; may be given several times")] = None,
) -> None:
    """Let a client join a living run.

    It starts from its federation's model. The other clients go on meanwhile.
    """
    from worldlm_ray.plan import membership, rundir

    if not client:
        raise ConfigError("--client", "the new client has no name", "give one")
    plan = rundir.reopen(run, check_data=False)
    under = plan.find(under).path
    files = [str(expanded(path).absolute()) for path in data or []]
    changed = membership.with_client(plan, under, client, files=files, overrides=overrides or [])
    from worldlm_ray import launch

    with Progress(console) as progress:
        took_s = launch.join(plan, changed, f"{under}/{client}", on_phase=progress.phase)
    console.print(f"{under}/{client} has joined: its first update was accepted after {took_s:.1f} s", highlight=False)


@app.command()
def leave(run: Run, node: Annotated[str, typer.Argument(help="path, such as world/europe/italy, or its end")]) -> None:
    """Let a node and all below it leave a living run.

    It leaves after the round that is under way. What it has pushed stays.
    """
    from worldlm_ray.plan import membership, rundir

    plan = rundir.reopen(run, check_data=False)
    node = plan.find(node).path
    changed = membership.without(plan, node)
    from worldlm_ray import launch

    with Progress(console) as progress:
        launch.leave(plan, changed, node, on_phase=progress.phase)
    console.print(f"{node} has left", highlight=False)


@app.command()
def cluster(
    file: Annotated[str, typer.Argument(help="a cluster description, such as cluster/onprem.yaml")],
    world: Annotated[str | None, typer.Option(help="a configuration whose labels the machines must carry")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key=value settings of the world")] = None,
    reach: Annotated[bool, typer.Option(help="ask machines whether they are there")] = True,
) -> None:
    """Check a cluster description for `ray up`.

    Nothing is started: tokens, files, addresses and labels are checked.
    """
    from worldlm_ray.launch import cluster_file
    from worldlm_ray.plan.plan import make_plan

    plan = make_plan(_load(world, overrides or [], None), check_data=False) if world is not None else None
    with errors.status("checking"):
        found = cluster_file.check(Path(file), plan, reach=reach)
    for line in found:
        console.print(line, highlight=False)


@app.command()
def audit(run: Run, as_json: Json = False) -> None:
    """Prove from the audit trail that no update was lost.

    Edge by edge: no accepted update was lost, and none was applied twice.
    """
    from worldlm_ray.plan import rundir
    from worldlm_ray.reports import trail
    from worldlm_ray.reports.tables import audit_table

    folder = rundir.find(run)
    found = trail.look(folder)
    if as_json:
        edges = [vars(proof) for proof in found.proofs]
        values = {"edges": edges, "holds": found.holds, "damage": found.damage, "torn_lines": found.torn}
        console.print_json(json.dumps(values))
    else:
        console.print(audit_table(found.proofs))
        console.print(found.conclusion(folder), highlight=False, soft_wrap=True)
    if found.holds is False:
        raise typer.Exit(1)


@app.command()
def status(
    run: Run,
    watch: Annotated[bool, typer.Option("--watch", help="refresh until the run ends, or Ctrl-C")] = False,
    as_json: Json = False,
) -> None:
    """Print the table of a run's nodes, living or ended."""
    from worldlm_ray.plan import rundir
    from worldlm_ray.reports.liveness import liveness
    from worldlm_ray.reports.tables import live_table
    from worldlm_ray.tracking.status import has_ended, read_status

    folder = rundir.find(run)
    if as_json:
        console.print_json(json.dumps(read_status(folder)))
        return
    with suppress(KeyboardInterrupt), ExitStack() as drawing:
        live = Live(console=console, auto_refresh=False, transient=True) if watch and console.is_terminal else None
        if live is not None:
            drawing.enter_context(live)
        while watch and not has_ended(folder, snapshot := read_status(folder)):
            if live is not None:
                below = Text(liveness(folder, snapshot))
                live.update(Group(live_table(snapshot | {"run": folder.name}), below), refresh=True)
            time.sleep(WATCH_S)
    snapshot = read_status(folder)
    console.print(live_table(snapshot | {"run": folder.name}))
    said = liveness(folder, snapshot)
    if said == "running" and has_ended(folder, snapshot):
        said = "ended: see summary.json"  # a moment ago
    console.print(said, highlight=False, soft_wrap=True)


def _check_words(words: list[str]) -> None:
    """Refuse words of the command line that are not valid UTF-8: no file of a run could hold them."""
    for index, word in enumerate(words):
        try:
            word.encode()
        except UnicodeEncodeError:
            name, _, value = word.partition("=")
            if not value or not name.isascii():
                before = words[index - 1] if index else ""
                name, value = before if before.startswith("--") else f"argument {index + 1}", word
            raise ConfigError(name, f"{value!a} is not valid UTF-8", "give text in UTF-8") from None


def _filled(folder: str | None, key: str) -> None:
    """Refuse an empty name of a folder, which would stand for the current one."""
    if folder is not None and not folder.strip():
        raise ConfigError(key, "is empty", "give a folder")


def _load(conf: str, overrides: list[str], run_dir: str | None) -> RunConfig:
    _spoken_of[:] = [(conf, overrides)]
    _filled(run_dir, "--run-dir")
    # The configuration of another run may be the beginning of a new one, which keeps files of its own.
    return replace(loading.load(conf, overrides, run_dir=run_dir, say=_note), kept={})


def _note(text: str) -> None:
    errors.print(text, highlight=False)


def _warn(lines: list[str]) -> None:
    """Warnings go to stderr: stdout is for the result."""
    for line in lines:
        errors.print(f"WARNING {line}", style="bold red", highlight=False)


def _report(run_dir: Path, summary: dict[str, Any], samples: dict[str, str]) -> None:
    from worldlm_ray.reports.tables import budget_line, final_table

    console.print(final_table(summary, samples))
    if line := budget_line(summary):
        console.print(line, highlight=False, soft_wrap=True)
    if summary["status"] == "stopped":
        if summary["backend"] == "ray":
            said = f"stopped early; continue with:\nworldlm train --resume {pasted(_near(run_dir))}"
        else:
            said = f"stopped early: {pasted(_near(run_dir))} keeps what there is; a simulation is not continued"
        console.print(said, highlight=False, soft_wrap=True)
    console.print(
        f"look at it with:  tensorboard --logdir {pasted(run_dir / 'tensorboard')}", highlight=False, soft_wrap=True
    )
    where = "losses come first; CUSTOM SCALARS: every curve on one page; TEXT: the settings"
    console.print(where, style="dim", highlight=False)


def _near(path: Path) -> Path:
    """A path as short as it can be from the current folder: long ones break at the end of a terminal's line."""
    here = Path.cwd()
    return path.relative_to(here) if isinstance(path, type(here)) and path.is_relative_to(here) else path


def main() -> None:
    """Entry point: one line for the user's errors, a traceback for ours or with --debug."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        _check_words(sys.argv[1:])
        app()
    except WorldLMError as error:
        if debug:
            raise
        from worldlm_ray.config.places import told

        for line in told(error, *(_spoken_of[0] if _spoken_of else ())):
            errors.print(f"worldlm: {line}", highlight=False)
        if isinstance(error, OutputError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # its last flush would fail again
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
