"""Commands of a member about its link: log, preview, pause, resume, leave."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worldlm_ray.cli.common import Json, console
from worldlm_ray.cli.gateway import PROFILE, need, tell
from worldlm_ray.errors import GatewayError, MessageError

if TYPE_CHECKING:
    from worldlm_ray.gateway.profile import Profile

ProfileFolder = Annotated[Path, typer.Argument(metavar="PROFILE", help="the profile's folder")]
_SHOWN = 20
_WIDE = 16


def log(
    folder: ProfileFolder = PROFILE,
    last: Annotated[int, typer.Option(help="requests to show")] = _SHOWN,
    as_json: Json = False,
) -> None:
    """Show what has left this member, by request.

    For each update its bytes, and the bytes of each field beside its values.
    """
    from worldlm_ray.gateway import sent

    _profile(folder)
    found = list(sent.lines(folder))[-max(last, 1) :]
    if as_json:
        console.print_json(json.dumps(found))
        return
    for line in found:
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(line.get("at_s", 0))))
        _line(f"{at}  {line.get('request', '?'):<11} {_said(line)}")
    if found:
        total = found[-1]
        _line(f"{total.get('today_bytes', 0):,} bytes of updates on {total.get('day')}")
    else:
        _line("nothing has left yet")


def preview(folder: ProfileFolder = PROFILE) -> None:
    """Show what the next update would say, field by field.

    With what the policy takes away. It is the newest update that has been made.

    One that has gone already is followed by one with other numbers.
    """
    from worldlm_ray.gateway import policy, sent

    _profile(folder)
    found, rows = sent.preview(folder, policy.of_profile(folder))
    held = found.get("held")
    seq = found["header"].get("seq")
    _line(f"update {seq} waits: {held}" if held else f"update {seq} has gone; the next one is like it")
    for name, value, after in rows:
        _line(f"  {name:<{_WIDE}} {value:<30} {after}")


def pause(folder: ProfileFolder = PROFILE) -> None:
    """Let nothing cross the link, from now on.

    A run goes on, and its work gathers in its model.
    """
    from worldlm_ray.gateway.standing import Standing, State

    _profile(folder)
    standing = Standing(folder)
    if standing.state is not State.ACTIVE:
        raise GatewayError(f"{folder}: is {standing.state}; `worldlm gateway resume {folder}` opens it")
    standing.become(State.PAUSED)
    tell(f"paused{'' if standing.is_running else ' (no run has this link now)'}; `worldlm gateway resume` opens it")


def resume(
    folder: ProfileFolder = PROFILE,
    accept: Annotated[bool, typer.Option("--accept-charter", help="accept the world's newest charter, too")] = False,
) -> None:
    """Open the link again.

    A charter that waits is accepted if you say so.
    """
    from worldlm_ray.gateway import policy
    from worldlm_ray.gateway.standing import Standing, State

    member, standing = _profile(folder), Standing(folder)
    newest = member.charters.newest()
    if accept and newest is not None:
        policy.of_profile(folder).judge(newest.charter)
        standing.accept(newest)
        tell(f"charter {newest.charter.epoch} is accepted")
    if newest is not None and newest.charter.epoch != standing.accepted[0] and standing.accepted[0]:
        tell(f"charter {newest.charter.epoch} is not accepted: see `worldlm gateway charter diff {folder}`")
    standing.become(State.ACTIVE)
    tell("the link is open, as far as the policy lets it be")


def leave(folder: ProfileFolder = PROFILE) -> None:
    """Leave the world, and give the certificate up.

    A run ends after the rounds that are under way, and pushes them. What has been pushed stays in the world's model.
    """
    import asyncio

    from worldlm_ray.gateway.standing import Standing, State

    member, standing = _profile(folder), Standing(folder)
    if standing.state is State.LEFT:
        raise GatewayError(f"{folder}: has left already; to come back, ask the world's operator to readmit it")
    if standing.is_running:
        standing.become(State.LEAVING)
        tell("the run ends after the rounds that are under way; then the world is told")
        return
    try:
        asyncio.run(_resign(member))
    except MessageError as error:
        if error.reason not in ("revoked", "expired", "unknown"):
            raise GatewayError(f"{member.url}: {error.detail}; run it again when the world can be reached") from error
    standing.become(State.LEFT)
    tell(f"{member.path} has left {member.url}: its certificate is good no more")


COMMANDS = (log, preview, pause, resume, leave)
"""In the order in which --help lists them."""


async def _resign(member: Profile) -> None:
    from worldlm_ray.gateway.contexts import client_context
    from worldlm_ray.gateway.http import Http, checking

    http = Http(member.url, checking(client_context(member), member.check_server), connections=1, tries=2)
    try:
        await http.call("POST", "resign")
    finally:
        await http.close()


def _profile(folder: Path) -> Profile:
    need("cryptography", "aiohttp")
    from worldlm_ray.gateway.profile import joined

    return joined(folder)


def _said(line: dict[str, Any]) -> str:
    """What a request has said, on one line."""
    parts = []
    if line.get("bytes"):
        codec = f", {line['codec']}" if line.get("codec") else ""
        parts.append(f"{line['bytes']:,} bytes of values{codec}")
    if line.get("fields"):
        changed = set(line.get("changed", []))
        fields = (f"{name} {size}{'*' if name in changed else ''}" for name, size in line["fields"].items())
        parts.append(f"update {line.get('seq')} ({', '.join(fields)})")
    if "started_tokens" in line:
        parts.append(f"started_tokens {line['started_tokens']}")
    if line.get("heartbeats"):
        parts.append(f"{line['heartbeats']} heartbeats before")
    return "; ".join(parts)


def _line(text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)
