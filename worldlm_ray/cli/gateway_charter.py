"""worldlm gateway charter: what a world imposes on its members, at either side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from worldlm_ray.cli.common import Conf, Json, console
from worldlm_ray.cli.gateway import FOLDER, PROFILE, need
from worldlm_ray.errors import ConfigError, GatewayError

if TYPE_CHECKING:
    from worldlm_ray.gateway.charter import Charters, Signed

app = typer.Typer(
    name="charter",
    help="Show, compare or set what a world imposes on its members.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)
Folder = Annotated[
    Path | None,
    typer.Argument(metavar="[FOLDER]", help="a world's gateway or a profile; the one that is here, unless given"),
]


@app.command()
def show(
    folder: Folder = None,
    epoch: Annotated[int | None, typer.Option(help="of the charter; the newest unless given")] = None,
    as_json: Json = False,
) -> None:
    """Show a charter.

    Both parts: what is alike on both sides, and what the world imposes.
    """
    from dataclasses import asdict

    charters = _charters(folder)
    signed = _newest(charters) if epoch is None else charters.get(epoch)
    charter = signed.charter
    if as_json:
        console.print_json(json.dumps(asdict(charter)))
        return
    _line(f"charter {charter.epoch} of {charter.node}, world {charter.world}")
    for title, part in (("alike on both sides", charter.alike), ("imposed by the world", charter.imposed)):
        _line(f"\n{title}")
        for key, value in part.items():
            _line(f"  {key:<34} {value}")


@app.command()
def diff(
    folder: Folder = None,
    old: Annotated[int | None, typer.Option(help="epoch; the one that is accepted, or the one before")] = None,
    new: Annotated[int | None, typer.Option(help="epoch; the newest unless given")] = None,
) -> None:
    """Show what a charter changes.

    At a member: the newest against the one that is accepted.
    """
    from worldlm_ray.gateway.charter import difference

    charters = _charters(folder)
    after = _newest(charters).charter if new is None else charters.get(new).charter
    first = _before(charters, after.epoch) if old is None else old
    changed = difference(charters.get(first).charter if first else None, after)
    _line(f"charter {first or 'none'} -> {after.epoch} of {after.node}: {len(changed)} terms change")
    for key, was, now in changed:
        _line(f"  {key:<34} {'-' if was is None else was} -> {'-' if now is None else now}")


@app.command(name="set")
def set_(
    conf: Conf,
    epoch: Annotated[
        int | None, typer.Option(help="of the new charter: above the highest that members know; the next unless given")
    ] = None,
) -> None:
    """Sign the charter of a world's configuration.

    A run does so by itself when it begins. Without a change the charter stays.
    """
    from worldlm_ray.cli.common import load
    from worldlm_ray.gateway import terms
    from worldlm_ray.gateway.charter import impose
    from worldlm_ray.gateway.identity import Identity
    from worldlm_ray.plan.plan import make_plan
    from worldlm_ray.plan.tree import parent_path
    from worldlm_ray.storage.filesystem import expanded

    need("cryptography")
    plan = make_plan(load(conf, [], None), check_data=False)
    if not plan.root.members:
        raise ConfigError("world", "has no member, so that there is no charter", "add an entry `member: NAME`")
    node = plan.node(parent_path(plan.root.members[0].path) or "")
    identity = Identity(expanded(plan.config.gateway.dir))
    made = impose(identity, node.path, terms.alike(plan, node), terms.imposed(plan, node), epoch=epoch)
    _line(f"charter {made.charter.epoch} of {node.path} is signed: {len(made.charter.terms)} terms")


def _charters(folder: Path | None) -> Charters:
    need("cryptography")
    from worldlm_ray.gateway import identity, profile
    from worldlm_ray.gateway.charter import Charters
    from worldlm_ray.gateway.identity import Identity
    from worldlm_ray.gateway.profile import Profile

    for place in (FOLDER, PROFILE) if folder is None else (folder,):
        if (place / identity.FACTS).exists():
            return Charters(place, Identity(place).root)
        if (place / profile.FACTS).exists():
            return Profile(place).charters
    where = f"neither {FOLDER} nor {PROFILE} is here" if folder is None else f"{folder}: is no gateway and no profile"
    raise GatewayError(f"{where}; name the folder of a gateway or of a profile")


def _newest(charters: Charters) -> Signed:
    found = charters.newest()
    if found is None:
        cure = "begin the world's run, or run `worldlm gateway charter set CONF`"
        raise GatewayError(f"{charters.folder}: there is no charter yet; {cure}")
    return found


def _before(charters: Charters, epoch: int) -> int:
    """The charter to compare with: the one that a member has accepted, or the one before; 0 for none."""
    from worldlm_ray.gateway.standing import Standing

    accepted, epochs = Standing(charters.folder.parent).accepted[0], charters.epochs()
    if accepted in epochs and accepted < epoch:
        return accepted
    return max((known for known in epochs if known < epoch), default=0)


def _line(text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)
