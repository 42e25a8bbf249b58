"""The run folder: made for a new run, found again for an old one.

runs/NAME/
    config.yaml      the resolved configuration
    summary.json     written at the end and on every clean stop
    status.json      the newest snapshot while the run lives
    audit/           one line per update accepted or refused, a file per inner node
    checkpoints/     one folder per node, and one for the recorder's incarnation
    tensorboard/
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from worldlm_ray import config as configuration
from worldlm_ray import storage
from worldlm_ray.errors import RunError
from worldlm_ray.plan import Plan, make_plan

CONFIG, STATUS, SUMMARY = "config.yaml", "status.json", "summary.json"


def create(plan: Plan) -> Plan:
    """Make the folder of a new run and write its configuration.

    A folder that the user did not name gets a number when the name is taken: `runs/quickstart-2`.

    Returns:
        The plan with the folder it got, as an absolute path.

    Raises:
        RunError: the named folder already holds a run, or cannot be made.
    """
    run_dir = plan.run_dir
    try:
        with storage.refusals(run_dir):
            if plan.config.run_dir is None:
                number = 2
                while (run_dir / CONFIG).exists():
                    run_dir = plan.run_dir.with_name(f"{plan.run_dir.name}-{number}")
                    number += 1
            elif (run_dir / CONFIG).exists():
                raise RunError(
                    f"{run_dir} already holds a run; continue it with `worldlm train --resume {run_dir}`, "
                    "or give another --run-dir"
                )
            plan = replace(plan, config=replace(plan.config, run_dir=str(run_dir)))
            storage.make_folder(run_dir)
            configuration.save(plan.config, run_dir / CONFIG)
    except OSError as error:
        why = error.strerror or str(error)
        raise RunError(f"cannot write the run folder {run_dir}: {why}; give another --run-dir") from error
    return plan


def discard(plan: Plan) -> None:
    """Take back the folder of a run that could not begin, so that the same command can be given again."""
    if not (plan.run_dir / STATUS).exists():
        (plan.run_dir / CONFIG).unlink(missing_ok=True)
        if not storage.is_remote(plan.run_dir):
            with suppress(OSError):  # it holds something of somebody else's
                plan.run_dir.rmdir()


def find(run: str) -> Path:
    """The folder of a run, given its path or its name under `runs/`.

    Raises:
        RunError: there is no such run.
    """
    for path in [storage.place(run)] if "://" in run else [storage.place(run), storage.place(f"runs/{run}")]:
        try:
            with storage.refusals(path):
                if (path / CONFIG).is_file():
                    return path
        except OSError as error:
            raise RunError(f"cannot read {path}: {error}") from error
    known = sorted(path.parent.name for path in Path("runs").glob(f"*/{CONFIG}"))
    there = f"runs/ holds {', '.join(known)}" if known else "runs/ holds none yet"
    raise RunError(f"there is no run {run!r}; give its folder or its name ({there})")


def reopen(run: str, overrides: list[str] | None = None, *, check_data: bool = True) -> Plan:
    """The plan of an existing run, wherever its folder lies now.

    Args:
        run: its folder, or its name under `runs/`.
        overrides: `key=value` changes, such as a larger budget.
        check_data: False where the run's text is not needed.
    """
    run_dir = find(run)
    config = configuration.load(str(run_dir / CONFIG), [*(overrides or []), f"run_dir={json.dumps(str(run_dir))}"])
    return make_plan(config, check_data=check_data)


def resume(run: str, overrides: list[str], *, check_data: bool = True) -> Plan:
    """The plan of a run that is to go on; changes are written to its config.yaml.

    Args:
        run: its folder, or its name under `runs/`.
        overrides: `key=value` changes, such as a larger budget.
        check_data: False where the files need not be on this machine.

    Raises:
        RunError: the run has ended at its full budget, and the budget is not changed; or it is a simulation.
    """
    plan = reopen(run, overrides, check_data=check_data)
    summary = _summary(plan.run_dir)
    if summary.get("shell") == "simulate":
        raise RunError(f"{plan.run_dir} is a simulation, which is not continued; start it again")
    if not overrides and summary.get("status") == "finished":
        raise RunError(
            f"{plan.run_dir} has ended at its full budget; to train on, give a larger one, "
            "such as budget.tokens=... or budget.rounds=..."
        )
    if overrides:
        configuration.save(plan.config, plan.run_dir / CONFIG)
    (plan.run_dir / SUMMARY).unlink(missing_ok=True)  # of the part before: this run is no longer at its end
    return plan


def _summary(run_dir: Path) -> dict[str, Any]:
    try:
        found = json.loads((run_dir / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
