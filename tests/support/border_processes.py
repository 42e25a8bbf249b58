"""Both sides of a border as processes that can be killed: a world with a gateway, and a member without training."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from support.gateway import make_member, make_world
from support.nodes import a_node
from support.trails import TrailedParent
from worldlm_ray.aggregation.node import Node
from worldlm_ray.errors import MessageError
from worldlm_ray.exchange.messages import Update, pack_header, unpack_model
from worldlm_ray.exchange.replies import Verdict
from worldlm_ray.gateway import wire
from worldlm_ray.gateway.authority import Authority
from worldlm_ray.gateway.contexts import client_context, server_context
from worldlm_ray.gateway.http import Http
from worldlm_ray.gateway.link import Link, LinkSettings, hello_of
from worldlm_ray.gateway.profile import Profile
from worldlm_ray.gateway.receipts import FOLDER, RECEIVED, SENT, Receipts, run_id
from worldlm_ray.gateway.seals import MemberKey, ServerKey
from worldlm_ray.gateway.server import Gateway, Settings
from worldlm_ray.gateway.staging import Upload
from worldlm_ray.storage import checkpoint
from worldlm_ray.tensors.layout import make_layout

LAYOUT = make_layout([("body.weight", (40_000,))], [], layers=0)
SIZES = wire.Sizes(layout=LAYOUT, leaf=16_384)
ROUNDS = 4
WORLD, MEMBER, AUTHORITY, PROFILE = "world", "member", "gateway", "profile"


def a_world() -> Node:
    initial = np.random.default_rng(1).normal(size=LAYOUT.size).astype(np.float32)
    return a_node(layout=LAYOUT, initial=initial, children=("a",))


def an_update(seq: int, base: int) -> Update:
    """The same one whenever it is made."""
    values = np.random.default_rng(seq).normal(size=LAYOUT.size).astype(np.float32) / 100
    return Update(sender="a", seq=seq, base_version=base, tokens=10, started_tokens=10 * seq, values=values)


def prepare(folder: Path) -> None:
    """The world's keys, and a member's."""
    make_member(make_world(folder / AUTHORITY), folder / PROFILE, "world/a")


class KilledAt:
    """Kills this process in its first life, before or after the second call of a function (the first, of `join`).

    Args:
        point: `before NAME` or `after NAME`; empty for never.
        marker: the file that says that this was not the first life.
    """

    def __init__(self, point: str, marker: Path) -> None:
        self.when, _, self.name = point.partition(" ")
        self._calls, self._due = 0, 1 if self.name == "join" else 2
        if marker.exists():
            self.name = ""
        marker.touch()

    def wrap(self, owner: Any, attribute: str, name: str = "") -> None:
        """Watch a method, if it is the one."""
        if (name or attribute) != self.name:
            return
        inner = getattr(owner, attribute)

        def begin() -> bool:
            self._calls += 1
            if self._calls == self._due and self.when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            return self._calls == self._due

        async def beside(*arguments: Any, **named: Any) -> Any:
            is_due = begin()
            found = await inner(*arguments, **named)
            if is_due:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        def plain(*arguments: Any, **named: Any) -> Any:
            is_due = begin()
            found = inner(*arguments, **named)
            if is_due:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        setattr(owner, attribute, beside if asyncio.iscoroutinefunction(inner) else plain)


# ---- the world ---------------------------------------------------------------------------------------------------


def world(folder: Path, port: int, point: str) -> None:
    """Serve until the process is ended."""
    asyncio.run(_world(folder, port, point))


async def _world(folder: Path, port: int, point: str) -> None:
    parent, authority = TrailedParent(a_world(), folder / WORLD), Authority(folder / AUTHORITY)
    identity, place = authority.identity, folder / WORLD / FOLDER
    receipts = Receipts(place, RECEIVED, root=identity.root)
    killed = KilledAt(point, folder / "world-has-lived")
    for method in ("join", "push", "pull", "save"):
        killed.wrap(parent, method)
    for method in ("pushed", "judged"):
        killed.wrap(receipts, method)
    killed.wrap(Upload, "check", "leaf")
    settings = Settings(
        sizes=SIZES,
        hello=hello_of(SIZES),
        staging_dir=folder / "staging",
        staging_bytes=4 * LAYOUT.nbytes,
        world=identity.world,
        run=run_id(place),
    )
    gateway = Gateway(parent, authority, settings, seal=ServerKey(identity), receipts=receipts)
    await gateway.start(server_context(identity), host="127.0.0.1", port=port)
    await asyncio.Event().wait()


# ---- the member --------------------------------------------------------------------------------------------------


def member(folder: Path, port: int, point: str) -> None:
    """Push ROUNDS updates."""
    asyncio.run(_member(folder, port, point))


async def _member(folder: Path, port: int, point: str) -> None:
    profile, place = Profile(folder / PROFILE), folder / MEMBER
    incarnation, made = checkpoint.claim(place), place / "made.json"
    bases: list[int] = json.loads(made.read_text()) if made.exists() else []
    settings = LinkSettings(
        url=f"https://127.0.0.1:{port}",
        path="world/a",
        sizes=SIZES,
        hello=hello_of(SIZES),
        world=profile.world,
        tries=3,
    )
    receipts, killed = Receipts(place / FOLDER, SENT, root=profile.root), KilledAt(point, folder / "member-has-lived")
    link = Link(settings, client_context(profile), seal=MemberKey(profile), receipts=receipts)
    for method in ("pushed", "judged"):
        killed.wrap(receipts, method)
    for method in ("join", "push", "pull"):
        killed.wrap(link, method)
    killed.wrap(Http, "put", "leaf")

    async def push(seq: int, to: int) -> Verdict:
        update = an_update(seq, bases[seq - 1])
        return await link.push("a", incarnation, to, pack_header(update, LAYOUT), update.values)

    async def join() -> int:
        while True:
            try:
                welcome = await link.join("a", incarnation, len(bases))
                for seq in range(welcome.last_seq + 1, len(bases) + 1):
                    await push(seq, welcome.incarnation)
                return welcome.incarnation
            except MessageError:
                await asyncio.sleep(0.05)

    async def until_heard(call: Callable[[int], Any]) -> Any:
        nonlocal to
        while True:
            try:
                return await call(to)
            except MessageError:
                to = await join()

    to = await join()
    while len(bases) < ROUNDS:
        found = await until_heard(lambda to: link.pull("a", incarnation, to, 10 * len(bases)))
        bases.append(unpack_model(found, LAYOUT).version)
        made.write_text(json.dumps(bases))
        verdict = await until_heard(lambda to: push(len(bases), to))
        if verdict.reason == "restarted":
            to = await join()
    await until_heard(lambda to: link.done("a", incarnation, to))
    await link.close()
