"""The command that checks a cluster description: cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from worldlm_ray.cli.common import console, errors, load


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

    plan = make_plan(load(world, overrides or [], None), check_data=False) if world is not None else None
    with errors.status("checking"):
        found = cluster_file.check(Path(file), plan, reach=reach)
    for line in found:
        console.print(line, highlight=False)
