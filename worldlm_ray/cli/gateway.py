"""Commands about members of a world.

world     gateway init, invite, approve, members, revoke, readmit, rotate
member    gateway join; further ones stand in gateway_check.py and gateway_member.py
both      gateway charter (gateway_charter.py)
"""

from __future__ import annotations

import getpass
import re
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from worldlm_ray.cli.common import Json, console, errors, print_json, warn
from worldlm_ray.errors import ConfigError, GatewayError

if TYPE_CHECKING:
    from worldlm_ray.gateway.authority import Authority

WARNED_DAYS = 30
"""Days before the issuing key is over, from which on `members` warns."""
_UNITS_S = {"m": 60.0, "h": 3_600.0, "d": 86_400.0}

Dir = Annotated[Path, typer.Option("--dir", help="the gateway's folder, beside the world's YAML")]
Hosts = Annotated[list[str], typer.Option("--name", metavar="HOST", help="of the gateway's machine; may be repeated")]
MemberPath = Annotated[str, typer.Argument(metavar="PATH", help="of the member in the world, such as world/europe")]
Expires = Annotated[str, typer.Option("--expires", metavar="TIME", help="the invitation's, such as 30m, 48h or 7d")]
Approve = Annotated[bool, typer.Option("--approve", help="the member's key waits for `worldlm gateway approve`")]
PassphraseFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="its first line is the passphrase; none asks for it")
]
ProfileDir = Annotated[Path, typer.Option("--dir", help="the profile's folder, for one world")]
FOLDER, PROFILE = Path("gateway"), Path("profile")

app = typer.Typer(
    name="gateway",
    help="Let other organisations join a world: keys, invitations, members.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)


@app.command()
def init(
    world: Annotated[str, typer.Argument(metavar="WORLD", help="the world's name, for people")],
    name: Annotated[
        list[str], typer.Option("--name", metavar="HOST", help="of the gateway's machine; may be repeated")
    ],
    port: Annotated[int, typer.Option(help="of the gateway, as members reach it")] = 8_443,
    folder: Dir = FOLDER,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Make a world's keys, once.

    The root's key lies under a passphrase. It is needed again at `rotate` only, so that it may be kept elsewhere.
    """
    need("cryptography")
    from worldlm_ray.gateway import identity

    made = identity.init(folder, world, name, _passphrase(passphrase_file, anew=True), port=port)
    _authority(folder)  # writes the registry
    console.print(f"world {made.world}", highlight=False, soft_wrap=True)
    tell(f"{folder} holds its keys: keep a copy of it; next: `worldlm gateway invite world/NAME`")


@app.command()
def invite(path: MemberPath, expires: Expires = "48h", approve: Approve = False, folder: Dir = FOLDER) -> None:
    """Print an invitation: one line, good for one member, once.

    Give it to the member's operator over a safe channel, who runs `worldlm gateway join LINE`.
    """
    authority = _authority(folder)
    made = authority.invite(path, expires_s=_seconds(expires), approve=approve, by=_operator())
    _show_invitation(made.line, made.path, expires, approve=approve)


@app.command(name="approve")
def approve_(
    path: MemberPath,
    yes: Annotated[bool, typer.Option("--yes", help="the fingerprints are compared already")] = False,
    folder: Dir = FOLDER,
) -> None:
    """Let in the key that has come for an invitation.

    First both operators compare its fingerprint, such as by telephone.
    """
    from worldlm_ray.gateway.keys import spoken

    authority = _authority(folder)
    for kept, use in authority.invitations.waiting():
        if kept.path == path:
            console.print(f"{path}: key {spoken(use.fingerprint)}", highlight=False, soft_wrap=True)
            if not yes and not typer.confirm("Does the member's operator read out the same?", err=True):
                raise GatewayError(f"{path}: not approved; run `worldlm gateway revoke {path}`, and invite again")
    authority.approve(path, by=_operator())
    tell(f"{path} gets its certificate when it asks next")


@app.command()
def members(folder: Dir = FOLDER, as_json: Json = False) -> None:
    """List members and invitations, with keys and when last seen."""
    from worldlm_ray.reports.members import member_rows, members_table

    authority = _authority(folder)
    rows = member_rows(authority)
    if as_json:
        print_json(rows)
    else:
        console.print(members_table(authority, rows))
    days = authority.identity.issuing_days()
    if days < WARNED_DAYS:
        warn([f"the issuing key is over in {max(days, 0):.0f} days; run `worldlm gateway rotate`"])


@app.command()
def revoke(
    path: MemberPath,
    pause: Annotated[bool, typer.Option("--pause", help="for now: its key stays good for `readmit`")] = False,
    folder: Dir = FOLDER,
) -> None:
    """Let a member in no more, from its next request on.

    What it has pushed stays in the model.
    """
    if _authority(folder).revoke(path, pause=pause, by=_operator()):
        tell(f"{path} is {'paused' if pause else 'revoked'}; `worldlm gateway readmit {path}` lets it in again")
    else:
        tell(f"the invitation of {path} is taken back")


@app.command()
def readmit(path: MemberPath, expires: Expires = "48h", approve: Approve = False, folder: Dir = FOLDER) -> None:
    """Let a member in again: prints an invitation for a new key.

    All its old keys are refused from now on. A paused member keeps its key, and needs no invitation.
    """
    authority = _authority(folder)
    made = authority.readmit(path, expires_s=_seconds(expires), approve=approve, by=_operator())
    if made is None:
        tell(f"{path} is let in again, with the key that it has")
    else:
        _show_invitation(made.line, path, expires, approve=approve)


@app.command()
def rotate(folder: Dir = FOLDER, passphrase_file: PassphraseFile = None) -> None:
    """Replace the issuing key, once in three months.

    It needs the root's passphrase. Members need not do anything.

    Do it at once if another person may have had the gateway's machine.
    """
    authority = _authority(folder)
    number = authority.rotate(_passphrase(passphrase_file, anew=False), by=_operator())
    tell(f"issuing key {number} is good for {authority.identity.issuing_days():.0f} days")


@app.command()
def join(
    line: Annotated[str, typer.Argument(metavar="LINE", help="the invitation, or - to read it from stdin")],
    folder: ProfileDir = PROFILE,
    policy: Annotated[Path | None, typer.Option(metavar="FILE", help="what this member refuses (YAML)")] = None,
) -> None:
    """Join a world by an invitation; makes a key and a profile.

    The key never leaves this folder. A charter that the policy refuses ends it, before anything is written.

    Interrupted, run it again.
    """
    import asyncio

    need("cryptography", "aiohttp")
    from worldlm_ray.gateway import joining

    text = sys.stdin.readline() if line == "-" else line
    made = asyncio.run(joining.join(folder, text, policy=policy, on_waiting=tell))
    tell(f"{made.path} has joined {made.url}: {folder} is good for {made.days_left():.0f} days, and renews itself")


def _authority(folder: Path) -> Authority:
    need("cryptography")
    from worldlm_ray.gateway.authority import Authority

    if not folder.is_dir():
        cure = "name another by --dir, or make one with `worldlm gateway init WORLD --name HOST`"
        raise GatewayError(f"{folder}: there is no such folder; {cure}")
    return Authority(folder)


def need(*packages: str) -> None:
    """Refuse a command for which a package is not installed."""
    for package in packages:
        try:
            import_module(package)
        except ImportError as error:
            problem = f"the package {package} is not installed"
            raise ConfigError("worldlm gateway", problem, "run `pip install 'worldlm_ray[gateway]'`") from error


def _passphrase(file: Path | None, *, anew: bool) -> str:
    """The root's passphrase: from a file, or asked for."""
    if file is not None:
        try:
            return file.read_text(encoding="utf-8").partition("\n")[0].rstrip("\r")
        except (OSError, UnicodeDecodeError) as error:
            raise GatewayError(f"{file}: the passphrase cannot be read from it: {error}; give another file") from error
    if not sys.stdin.isatty():
        raise GatewayError("--passphrase-file: there is no terminal to ask for the passphrase; give a file")
    return str(typer.prompt("Passphrase of the root", hide_input=True, confirmation_prompt=anew, err=True))


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d{1,6}(?:\.\d+)?)([mhd])", text.strip())
    if match is None:
        raise GatewayError(f"--expires: {text!r} is no time; give minutes, hours or days, such as 30m, 48h or 7d")
    return float(match[1]) * _UNITS_S[match[2]]


def _operator() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "unknown"


def _show_invitation(line: str, path: str, expires: str, *, approve: bool) -> None:
    """The line alone on stdout; what it is on stderr."""
    console.print(line, highlight=False, soft_wrap=True)
    until = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(time.time() + _seconds(expires)))
    then = f", then waits for `worldlm gateway approve {path}`" if approve else ""
    tell(f"lets {path} in once, until {until}{then}; who holds the line can join: use a safe channel")


def tell(text: str) -> None:
    """What has been done, beside a command's result."""
    errors.print(text, highlight=False)
