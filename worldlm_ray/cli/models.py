"""Commands that use the models of a run: evaluate, sample, export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from worldlm_ray.cli.common import Json, Run, console, errors, filled, print_json
from worldlm_ray.config import checks
from worldlm_ray.errors import ConfigError
from worldlm_ray.reports.progress import Progress
from worldlm_ray.storage.paths import pasted

if TYPE_CHECKING:
    from worldlm_ray.experiments.council_measure import CouncilMeasures

ALL_PRIVATE = "nothing to show: the losses of every client of this run are private (privacy.report_metrics)"
CouncilFlag = Annotated[bool, typer.Option("--council", help="a mixture of models, weighed while the text goes on")]
FitPriorFlag = Annotated[
    bool, typer.Option("--fit-prior", help="with --council: weights begin as validation text says, not alike")
]
MembersOption = Annotated[
    str | None,
    typer.Option("--members", help="with --council: its nodes, with commas; all whose models may serve unless given"),
]
LmEvalOption = Annotated[
    str | None,
    typer.Option("--lm-eval", help="tasks of lm-evaluation-harness, with commas, or a YAML of tasks"),
]
TopOption = Annotated[
    int | None, typer.Option("--top", help="with --council: so many models answer after the first 64 tokens; or all")
]


def evaluate(
    run: Run,
    tokens: Annotated[int, typer.Option(help="held-out tokens per client, at most")] = 65_536,
    as_json: Json = False,
    council: CouncilFlag = False,
    members: MembersOption = None,
    top: TopOption = None,
    document: Annotated[int, typer.Option(help="with --council: tokens after which its weights begin anew")] = 1024,
    fit_prior: FitPriorFlag = False,
    lm_eval: LmEvalOption = None,
    node: Annotated[
        str | None, typer.Option(help="with --lm-eval: path of the node, or its end; the world unless given")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="with --lm-eval: examples of each task, at most")] = None,
) -> None:
    """Measure every model of a run on held-out text.

    The models are those of the newest checkpoints. With --council their mixture is measured beside each of them.

    With --lm-eval a node's model, or that of an exported folder, answers the tasks of lm-evaluation-harness.
    """
    from worldlm_ray.experiments.evaluate import evaluate as measure
    from worldlm_ray.experiments.evaluate import table, values

    checks.positive(tokens, "--tokens")
    checks.positive(document, "--document")
    _check_council(council, top, members=members, fit_prior=fit_prior or None)
    _check_lm_eval(lm_eval, council=council, node=node, limit=limit)
    if lm_eval is not None:
        _evaluate_tasks(run, lm_eval, node=node or "world", limit=limit, as_json=as_json)
        return
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
        print_json(values(measures))
        return
    if not measures:
        console.print(ALL_PRIVATE)
        return
    console.print(table(run, measures))
    _print_tasks(run)


def _check_lm_eval(tasks: str | None, *, council: bool, node: str | None, limit: int | None) -> None:
    """Refuse options that do not go with lm-evaluation-harness, or not without it."""
    if tasks is not None and council:
        raise ConfigError("--council", "lm-evaluation-harness measures one model", "leave it or --lm-eval out")
    for name, value in {"--node": node, "--limit": limit}.items():
        if tasks is None and value is not None:
            raise ConfigError(name, "says what lm-evaluation-harness measures", "give --lm-eval, too")
    if limit is not None:
        checks.positive(limit, "--limit")


def _evaluate_tasks(run: str, tasks: str, *, node: str, limit: int | None, as_json: bool) -> None:
    """Run lm-evaluation-harness on one model, and print its table."""
    from worldlm_ray.experiments.harness import evaluate_tasks
    from worldlm_ray.experiments.harness_results import table

    done = evaluate_tasks(
        run, tasks, node=node, limit=limit, on_phase=lambda text: errors.print(text, highlight=False, soft_wrap=True)
    )
    if as_json:
        print_json({"node": done.node, "rows": [vars(row) for row in done.rows]})
        return
    console.print(table(f"{run}: lm-evaluation-harness", {done.node: done.rows}))
    console.print(f"written to {pasted(done.file)}", highlight=False, soft_wrap=True)


def _print_tasks(run: str) -> None:
    """Print what lm-evaluation-harness has said of the models that the run has now."""
    from worldlm_ray.experiments.harness_results import of_run, table
    from worldlm_ray.plan import rundir

    found = of_run(rundir.reopen(run, check_data=False))
    if found:
        console.print(table(f"{run}: lm-evaluation-harness", found))


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
        print_json(values(measures))
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
