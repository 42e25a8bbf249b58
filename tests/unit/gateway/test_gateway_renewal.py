"""Certificates are renewed while a run goes on, by a clock that the test moves: no request is cut, no push refused."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from support.border_requests import LAYOUT, VALUES, an_update, at_a_border
from support.borders import Border, run
from support.gateway import PASSPHRASE, FakeClock, shown_by

from worldlm_ray.errors import MessageError
from worldlm_ray.exchange.messages import pack_header
from worldlm_ray.gateway import certificates, renewal
from worldlm_ray.gateway.link import Link
from worldlm_ray.gateway.profile import Profile
from worldlm_ray.gateway.renewal import MemberRenewal, ServerRenewal
from worldlm_ray.gateway.seals import MemberKey, ServerKey

pytestmark = pytest.mark.usefixtures("quick")


class Side:
    """A member at a border, whose clock the test moves."""

    def __init__(self, border: Border) -> None:
        border.member()
        self.clock, self.said = FakeClock(), list[str]()
        self.profile = Profile(border.folder / "world-a", clock=self.clock)
        self.seal = MemberKey(self.profile)
        self.link: Link = border.link(seal=self.seal)
        self.renewal = MemberRenewal(self.profile, self.link, self.seal, self.said.append)


def at_a_sealed_border(folder: Path, work: Callable[[Border, Side], Coroutine[Any, Any, None]]) -> None:
    async def do() -> None:
        async with at_a_border(folder, sealed=True) as border:
            await work(border, Side(border))

    run(do())


def test_a_member_renews_from_two_thirds_of_its_certificates_life_on(tmp_path: Path) -> None:
    async def work(border: Border, side: Side) -> None:
        await side.link.join("a", 1, 0)
        first, pauses = shown_by(side.profile), list[float]()

        async def sleep(seconds: float) -> None:
            pauses.append(seconds)
            side.clock.tick(hours=seconds / 3_600.0)
            if shown_by(side.profile) != first:
                raise asyncio.CancelledError

        with pytest.raises(asyncio.CancelledError):
            await renewal.hourly(side.renewal.look, sleep=sleep)
        days = sum(pauses) / certificates.DAY_S
        assert 19.0 < days < 21.0
        assert side.said == []
        assert (await side.link.push("a", 1, 1, pack_header(an_update(), LAYOUT), VALUES)).accepted
        [row] = [member for path, member in border.world.registry.members().items() if path == "world/a"]
        assert len(row.keys) == 2

    at_a_sealed_border(tmp_path, work)


def test_a_renewal_cuts_no_request_and_a_push_signed_before_it_counts(tmp_path: Path) -> None:
    async def work(border: Border, side: Side) -> None:
        await side.link.join("a", 1, 0)
        entered, goes_on = asyncio.Event(), asyncio.Event()
        inner = border.parent.push

        async def slow(*arguments: Any) -> Any:
            entered.set()
            await goes_on.wait()
            return await inner(*arguments)

        border.parent.push = slow
        pushing = asyncio.create_task(side.link.push("a", 1, 1, pack_header(an_update(), LAYOUT), VALUES))
        await entered.wait()
        side.clock.tick(days=21)
        await side.renewal.look()
        assert not pushing.done()
        goes_on.set()
        assert (await pushing).accepted
        assert border.gateway.members["world/a"].answers["push"] == 1, "it was not sent again"
        assert border.line.cuts == 0
        await side.link.heartbeat("a", 1, 1)

    at_a_sealed_border(tmp_path, work)


def test_a_push_signed_by_the_key_before_counts_over_a_connection_of_the_next_one(tmp_path: Path) -> None:
    async def work(border: Border, side: Side) -> None:
        await side.link.join("a", 1, 0)
        old = MemberKey(side.profile)
        side.clock.tick(days=21)
        await side.renewal.look()
        side.link._seal = old
        assert (await side.link.push("a", 1, 1, pack_header(an_update(), LAYOUT), VALUES)).accepted

    at_a_sealed_border(tmp_path, work)


def test_an_expired_certificate_is_one_line_and_a_new_one_is_taken_up(tmp_path: Path) -> None:
    async def work(border: Border, side: Side) -> None:
        side.clock.tick(days=31)
        with pytest.raises(MessageError) as found:
            await side.renewal.ready()
        text = (
            f"expired: the certificate of world/a is over for 1.0 days; ask the world's operator for a new invitation, "
            f"and run `worldlm gateway join LINE --dir {side.profile.folder}` with it: the run takes it up"
        )
        assert str(found.value) == text
        await side.renewal.look()
        assert side.said == [text.partition(": ")[2]]
        side.profile.install(border.world.renew(shown_by(side.profile), side.profile.request()))
        side.clock.now_s = FakeClock().now_s
        await side.renewal.ready()
        assert (await side.link.greet()).path == "world/a"

    at_a_sealed_border(tmp_path, work)


def test_a_renewal_that_fails_is_told_in_the_last_days_alone(tmp_path: Path) -> None:
    async def work(border: Border, side: Side) -> None:
        await border.gateway.stop()
        side.clock.tick(days=21)
        await side.renewal.look()
        assert side.said == []
        side.clock.tick(days=3)
        await side.renewal.look()
        [text] = side.said
        assert text.startswith("world/a: its certificate ends in 6 days, not renewed yet: unreachable")

    at_a_sealed_border(tmp_path, work)


def test_the_server_shows_its_next_certificate_without_a_break(tmp_path: Path) -> None:
    async def work(border: Border, side: Side) -> None:
        said, identity = list[str](), border.world.identity
        seen: list[bytes] = []
        link = border.link(check_server=seen.append)
        await link.join("a", 1, 0)
        server = ServerRenewal(identity, border.context, ServerKey(identity), said.append)
        await server.look()
        assert border.world.rotate(PASSPHRASE) == 2  # by the command line, beside the run
        await server.look()
        await link.heartbeat("a", 1, 1)
        await link.close()
        link = border.link(check_server=seen.append)
        await link.greet()
        assert certificates.generation_of(certificates.read_der(seen[-1])) == 2
        assert certificates.generation_of(certificates.read_der(seen[0])) == 1
        assert said == []
        identity.clock = side.clock
        side.clock.tick(days=100)
        await server.look()
        assert said == ["the issuing key is over in 20 days; run `worldlm gateway rotate`"]
        side.clock.tick(days=30)
        await server.look()
        assert "the issuing certificate is over; run `worldlm gateway rotate`" in said[-1]

    at_a_sealed_border(tmp_path, work)
