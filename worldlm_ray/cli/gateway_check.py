"""worldlm gateway check: whether a member could join its world now."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worldlm_ray.cli.common import console, load
from worldlm_ray.cli.gateway import PROFILE, need

if TYPE_CHECKING:
    from worldlm_ray.plan.plan import Plan


def check(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="[PROFILE]", help="the profile's folder; `joins` of CONF, or ./profile, unless given"),
    ] = None,
    conf: Annotated[
        str | None, typer.Option(metavar="CONF", help="the member's configuration: compares it with the charter")
    ] = None,
    run: Annotated[Path | None, typer.Option(help="a run of this member: adds how busy the line lets it be")] = None,
) -> None:
    """Look whether this member could join its world now.

    Name, certificate, gateway, clock, round trip, speed, versions; charter, configuration, policy, pause.

    One line each. What is wrong has its cure in the line, and the exit code is 1.
    """
    import asyncio

    need("cryptography", "aiohttp")
    from worldlm_ray.gateway.checkup import check as look
    from worldlm_ray.gateway.profile import joined
    from worldlm_ray.tracking.status import read_status

    status = None if run is None else read_status(run)
    plan, joins = (None, None) if conf is None else _plan(conf)
    profile = joined(folder or joins or PROFILE)

    async def show() -> bool:
        all_good, speeds = True, None
        async for finding in look(profile, plan):
            all_good &= finding.is_good
            speeds = finding.mbit or speeds
            _line("ok   " if finding.is_good else "WRONG", finding.what, finding.text)
        if status is not None and speeds is not None:
            _line("ok   ", "line", _busy(status, speeds))
        return all_good

    if not asyncio.run(show()):
        raise typer.Exit(1)


def _line(mark: str, what: str, text: str) -> None:
    console.print(f"{mark} {what}: {text}", highlight=False, soft_wrap=True, markup=False)


def _plan(conf: str) -> tuple[Plan, Path]:
    """The member's run, and the profile that it names.

    Raises:
        ConfigError: it is wrong, or is no member's.
    """
    from worldlm_ray.errors import ConfigError
    from worldlm_ray.plan.plan import make_plan
    from worldlm_ray.storage.filesystem import expanded

    plan = make_plan(load(conf, [], None), check_data=False)
    if plan.config.joins is None:
        raise ConfigError("joins", f"is not given in {conf}", "give the profile's folder, as a member's run needs it")
    return plan, expanded(plan.config.joins)


def _busy(status: dict[str, Any], speeds: tuple[float, float]) -> str:
    """How busy a line of these speeds lets the clients of a run be, and what would keep them busy."""
    from worldlm_ray.gateway.advice import advice
    from worldlm_ray.reports.border import link_facts

    borders = [node["border"] for node in status["nodes"].values() if node.get("border")]
    found = [link_facts(border, mbit_up=speeds[0], mbit_down=speeds[1]) for border in borders]
    known = [facts for facts in found if facts is not None]
    return advice(known[0]) if known else "the run has not pushed two updates over a border yet"
