"""worldlm gateway check: what lies between a member and its world."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from worldlm_ray.cli.common import console
from worldlm_ray.cli.gateway import PROFILE, need


def check(
    folder: Annotated[Path, typer.Argument(metavar="PROFILE", help="the profile's folder")] = PROFILE,
    run: Annotated[Path | None, typer.Option(help="a run of this member: adds how busy the line lets it be")] = None,
) -> None:
    """Look at name, certificate, gateway, clock, round trip and speed.

    One line each. The exit code is 1 if one of them is wrong.
    """
    import asyncio

    need("cryptography", "aiohttp")
    from worldlm_ray.gateway.probe import check as look
    from worldlm_ray.gateway.profile import joined

    async def show() -> bool:
        all_good, speeds = True, None
        async for finding in look(joined(folder)):
            all_good &= finding.is_good
            speeds = finding.mbit or speeds
            mark = "ok   " if finding.is_good else "WRONG"
            console.print(f"{mark} {finding.what}: {finding.text}", highlight=False, soft_wrap=True)
        if run is not None and speeds is not None:
            console.print(f"ok    line: {_of_run(run, speeds)}", highlight=False, soft_wrap=True)
        return all_good

    if not asyncio.run(show()):
        raise typer.Exit(1)


def _of_run(run: Path, speeds: tuple[float, float]) -> str:
    """How busy a line of these speeds lets the clients of a run be, and what would keep them busy."""
    from worldlm_ray.gateway.advice import advice
    from worldlm_ray.reports.border import link_facts
    from worldlm_ray.tracking.status import read_status

    borders = [node["border"] for node in read_status(run)["nodes"].values() if node.get("border")]
    found = [link_facts(border, mbit_up=speeds[0], mbit_down=speeds[1]) for border in borders]
    known = [facts for facts in found if facts is not None]
    return advice(known[0]) if known else f"{run} has not pushed two updates over a border yet"
