"""A member joins over the loopback, and renews its certificate there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.borders import Border, NodeAsParent, a_border
from support.gateway import HOUR_S, FakeClock, make_world, shown_by
from support.nodes import make
from typer.testing import CliRunner

from worldlm_ray.cli.main import app
from worldlm_ray.errors import GatewayError, MessageError, Refused
from worldlm_ray.gateway import http, joining
from worldlm_ray.gateway.profile import Profile
from worldlm_ray.tensors.layout import Layout

EUROPE = "world/europe"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "FIRST_S", 0.001)


def at_border(folder: Path, layout: Layout, work: Callable[[Border], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        async with a_border(folder, NodeAsParent(make(("europe",))), layout) as border:
            await work(border)

    asyncio.run(asyncio.wait_for(run(), 60))


def invited(border: Border, *, port: int | None = None, approve: bool = False) -> str:
    """The line of an invitation to the border's port."""
    invitation = border.world.invite(EUROPE, expires_s=HOUR_S, approve=approve)
    return replace(invitation, url=f"https://127.0.0.1:{port or border.port}").line


def no_wait(text: str) -> None:
    raise AssertionError(f"waits: {text}")


def test_a_member_joins_by_one_line(tmp_path: Path, layout: Layout) -> None:
    async def work(border: Border) -> None:
        line = invited(border)
        member = await joining.join(tmp_path / "acme", line, on_waiting=no_wait)
        assert member.path == EUROPE
        assert border.world.authorise(shown_by(member)) == EUROPE
        shown = shown_by(member)
        again = await joining.join(tmp_path / "acme", line, on_waiting=no_wait)  # typed a second time
        assert shown_by(again) == shown

    at_border(tmp_path, layout, work)


def test_a_lost_answer_is_asked_for_again(tmp_path: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(border: Border) -> None:
        line = invited(border)

        def cut(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Profile, "install", cut)
            with pytest.raises(KeyboardInterrupt):
                await joining.join(tmp_path / "acme", line, on_waiting=no_wait)
        assert not Profile(tmp_path / "acme").has_joined
        member = await joining.join(tmp_path / "acme", line, on_waiting=no_wait)
        assert border.world.authorise(shown_by(member)) == EUROPE
        with pytest.raises(Refused, match=r"^invitation_used: .*tell the world's operator at once"):
            await joining.join(tmp_path / "another", line, on_waiting=no_wait)

    at_border(tmp_path, layout, work)


def test_a_member_waits_for_its_approval_and_says_so_once(tmp_path: Path, layout: Layout) -> None:
    async def work(border: Border) -> None:
        said: list[str] = []
        pauses: list[float] = []

        async def sleep(seconds: float) -> None:
            pauses.append(seconds)
            if len(pauses) == 3:
                border.world.approve(EUROPE)

        line = invited(border, approve=True)
        member = await joining.join(tmp_path / "acme", line, on_waiting=said.append, sleep=sleep)
        assert border.world.authorise(shown_by(member)) == EUROPE
        assert len(pauses) == 3
        [text] = said
        assert f"`worldlm gateway approve {EUROPE}`" in text

    at_border(tmp_path, layout, work)


def test_another_server_at_the_address_hears_nothing_secret(tmp_path: Path, layout: Layout) -> None:
    async def work(border: Border) -> None:
        other = make_world(tmp_path / "other")
        invitation = replace(other.invite(EUROPE, expires_s=HOUR_S), url=f"https://127.0.0.1:{border.port}")
        with pytest.raises(Refused, match=r"^wrong_world: .*is not the world of this invitation; ask its operator"):
            await joining.join(tmp_path / "acme", invitation.line, on_waiting=no_wait)
        assert not (tmp_path / "acme").exists()

    at_border(tmp_path, layout, work)


def test_a_gateway_that_is_not_there_is_one_line_with_its_cure(tmp_path: Path, layout: Layout) -> None:
    async def work(border: Border) -> None:
        line = invited(border)
        await border.gateway.stop()
        with pytest.raises(GatewayError, match=r"^https://127.*check that the gateway runs, .*HTTPS_PROXY"):
            await joining.join(tmp_path / "acme", line, on_waiting=no_wait)

    at_border(tmp_path, layout, work)


def test_a_certificate_is_renewed_over_its_connection(tmp_path: Path, layout: Layout) -> None:
    async def work(border: Border) -> None:
        clock = FakeClock()
        line = invited(border)
        member = await joining.join(tmp_path / "acme", line, on_waiting=no_wait, clock=clock)
        first = shown_by(member)
        (tmp_path / EUROPE.replace("/", "-")).symlink_to(tmp_path / "acme")
        link = border.link(EUROPE, direct=True)
        await link.greet()
        assert not await joining.renew_if_due(member, link)
        clock.tick(days=21)
        assert await joining.renew_if_due(member, link)
        assert shown_by(member) != first
        assert (await link.greet()).path == EUROPE
        border.world.revoke(EUROPE)
        with pytest.raises(MessageError):
            await joining.renew_if_due(_worn(member, clock), link)

    at_border(tmp_path, layout, work)


def _worn(member: Profile, clock: FakeClock) -> Profile:
    clock.tick(days=60)
    return member


def test_the_command_joins(tmp_path: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    async def work(border: Border) -> None:
        words = ["gateway", "join", "-", "--dir", "acme"]
        line = invited(border)
        done = await asyncio.to_thread(CliRunner().invoke, app, words, input=f"{line}\n")
        assert done.exit_code == 0, done.exception
        assert done.stderr == (
            f"{EUROPE} has joined https://127.0.0.1:{border.port}: acme is good for 30 days, and renews itself\n"
        )
        assert border.world.authorise(shown_by(Profile(tmp_path / "acme"))) == EUROPE

    at_border(tmp_path, layout, work)
