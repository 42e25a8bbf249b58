"""worldlm gateway check: what lies between a member and its world."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from worldlm_ray.cli.common import console
from worldlm_ray.cli.gateway import PROFILE, need


def check(
    folder: Annotated[Path, typer.Argument(metavar="PROFILE", help="the profile's folder")] = PROFILE,
) -> None:
    """Look at name, certificate, gateway, clock, round trip and speed.

    One line each. The exit code is 1 if one of them is wrong.
    """
    import asyncio

    need("cryptography", "aiohttp")
    from worldlm_ray.gateway.probe import check as look
    from worldlm_ray.gateway.profile import joined

    async def show() -> bool:
        all_good = True
        async for finding in look(joined(folder)):
            all_good &= finding.is_good
            mark = "ok   " if finding.is_good else "WRONG"
            console.print(f"{mark} {finding.what}: {finding.text}", highlight=False, soft_wrap=True)
        return all_good

    if not asyncio.run(show()):
        raise typer.Exit(1)
