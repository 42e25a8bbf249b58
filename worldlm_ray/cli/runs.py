"""Commands of a living run: train, simulate, join, leave, status."""

from __future__ import annotations

import resource
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.text import Text

from worldlm_ray.cli.common import (
    Conf,
    Json,
    LogLevel,
    Overrides,
    Run,
    RunDir,
    console,
    errors,
    load,
    print_json,
    speak_of,
    warn,
)
from worldlm_ray.errors import ConfigError, Interrupted
from worldlm_ray.reports.progress import Progress, Stop
from worldlm_ray.storage.filesystem import expanded
from worldlm_ray.storage.paths import pasted

if TYPE_CHECKING:
    from worldlm_ray.plan.plan import Plan

WATCH_S = 1.0
"""Seconds between two looks of `status --watch`."""


def train(
    conf: Annotated[str | None, typer.Argument(help="a preset's name or the path of a YAML file")] = None,
    overrides: Overrides = None,
    resume: Annotated[str | None, typer.Option(help="continue this run: its folder, or its name under runs/")] = None,
    run_dir: RunDir = None,
    address: Annotated[
        str | None,
        typer.Option(help="of a Ray cluster, such as auto or ray://host:10001; none starts a local one"),
    ] = None,
    log_level: LogLevel = None,
) -> None:
    """Train a world on Ray.

    Ctrl-C writes checkpoints and leaves; a second one leaves at once. Exit codes: 0 finished, 2 an error of one line,
    130 stopped by Ctrl-C, 143 stopped by SIGTERM.
    """
    changes = list(overrides or [])
    if resume is not None and conf is not None:
        # With --resume there is no CONF: what stands in its place is the first override.
        changes.insert(0, conf)
    changes += _logged(log_level)
    if resume is not None and run_dir is not None:
        raise ConfigError("--run-dir", "cannot be given with --resume", "the run stays in its folder")
    if resume is None and conf is None:
        raise ConfigError("CONF", "nothing to train", "name a preset, a YAML file, or --resume RUN")
    from worldlm_ray.api import running
    from worldlm_ray.plan import rundir

    if resume is not None:
        speak_of(str(rundir.find(resume) / rundir.CONFIG), changes)
        begun = running.old_run(resume, changes, address=address)
    else:
        assert conf is not None
        begun = running.new_run(load(conf, changes, run_dir), address=address)
    with begun as plan:
        _say_begun(plan)
        with Progress(console, errors) as progress, Stop(progress.notice) as stop:
            try:
                outcome = running.on_ray(
                    plan,
                    address=address,
                    is_new=resume is None,
                    progress=progress,
                    stop=stop,
                    callbacks=running.Callbacks(),
                )
            except Interrupted as error:
                progress.notice(f"worldlm: {error}")
                raise typer.Exit(stop.code) from None
    _report(plan.run_dir, outcome.summary, outcome.samples)
    if outcome.summary["status"] == "stopped":
        raise typer.Exit(stop.code)


def simulate(conf: Conf, overrides: Overrides = None, run_dir: RunDir = None, log_level: LogLevel = None) -> None:
    """Train a world in one process, under a virtual clock.

    Training is real; machines and network are simulated.

    With simulation.train=false nothing is trained: staleness, times and bytes of very large worlds.
    """
    from worldlm_ray.api import running

    with running.new_run(load(conf, [*(overrides or []), *_logged(log_level)], run_dir), simulated=True) as plan:
        _say_begun(plan)
        began, progress = time.monotonic(), Progress(console, errors)
        with progress, Stop(progress.notice, running.KEPT) as stop:
            outcome, events = running.simulated(plan, progress=progress, stop=stop, callbacks=running.Callbacks())
    if outcome.summary.get("trained", True):
        _report(plan.run_dir, outcome.summary, outcome.samples)
    else:
        _report_costs(outcome.summary, events=events, took_s=time.monotonic() - began)
    if outcome.summary["status"] == "stopped":
        raise typer.Exit(stop.code)


def _logged(level: str | None) -> list[str]:
    """The option --log-level as the override that it is."""
    return [] if level is None else [f"logging.level={level}"]


def _say_begun(plan: Plan) -> None:
    from worldlm_ray.tracking import log_lines

    log_lines.of_command(plan)
    console.print(f"run folder {pasted(plan.run_dir)}", highlight=False, soft_wrap=True)
    warn(plan.warnings)


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


def leave(
    run: Run,
    node: Annotated[str, typer.Argument(help="path, such as world/europe/italy, or its end")],
    forget: Annotated[bool, typer.Option("--forget", help="take what it has pushed out again")] = False,
) -> None:
    """Let a node and all below it leave a living run.

    It leaves after the round that is under way. What it has pushed stays, unless
    --forget says otherwise: that needs model.lora.experts.
    """
    from worldlm_ray.plan import membership, rundir

    plan = rundir.reopen(run, check_data=False)
    node = plan.find(node).path
    if forget and plan.config.model.lora.experts == "none":
        got = "model.lora.experts is none: nodes keep means, and no sums that a part can be taken out of"
        raise ConfigError("--forget", got, "leave the option out")
    changed = membership.without(plan, node)
    from worldlm_ray import launch

    with Progress(console) as progress:
        launch.leave(plan, changed, node, forget=forget, on_phase=progress.phase)
    said = ": its part is taken out of the sums above" if forget else ""
    console.print(f"{node} has left{said}", highlight=False)


def status(
    run: Run,
    watch: Annotated[bool, typer.Option("--watch", help="refresh until the run ends, or Ctrl-C")] = False,
    as_json: Json = False,
) -> None:
    """Print the table of a run's nodes, living or ended."""
    from worldlm_ray.plan import rundir
    from worldlm_ray.reports.border import border_lines
    from worldlm_ray.reports.liveness import liveness
    from worldlm_ray.reports.tables import live_table
    from worldlm_ray.tracking.status import has_ended, read_status

    folder = rundir.find(run)
    if as_json:
        print_json(read_status(folder))
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
    for line in border_lines(snapshot):
        console.print(line, highlight=False, soft_wrap=True)
    said = liveness(folder, snapshot)
    if said == "running" and has_ended(folder, snapshot):
        said = "ended: see summary.json"  # a moment ago
    console.print(said, highlight=False, soft_wrap=True)


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
