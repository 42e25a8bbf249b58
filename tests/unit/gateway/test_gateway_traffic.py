"""How much may cross a border: rates make it slower, a day's bytes are refused by name, and nothing is lost."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from support.border_requests import BODY, HEX, LAYOUT, VALUES, an_update, at_a_border
from support.borders import by_hand, run
from support.gateway import FakeClock

from worldlm_ray.errors import MessageError
from worldlm_ray.exchange.messages import pack_header
from worldlm_ray.gateway import http
from worldlm_ray.gateway.alarms import Alarms
from worldlm_ray.gateway.pace import BURST_S
from worldlm_ray.gateway.traffic import DayIsOver, Rate, Traffic, TrafficLimits

pytestmark = pytest.mark.usefixtures("quick")
DAY = TrafficLimits(member_bytes_per_day=1_000)


def test_a_rate_is_kept_over_time_and_idle_time_is_not_saved_up() -> None:
    rate = Rate(100.0)
    assert rate.wait_s(50, 10.0) == pytest.approx(0.5 - BURST_S)
    assert rate.wait_s(100, 10.0) == pytest.approx(1.5 - BURST_S)
    assert rate.wait_s(100, 1_000.0) == pytest.approx(1.0 - BURST_S)
    assert Rate(0.0).wait_s(10**12, 0.0) == 0.0


def test_a_transfer_keeps_to_the_rate_of_its_member_and_of_all(tmp_path: Path) -> None:
    async def work() -> None:
        for number, limits in enumerate(
            (TrafficLimits(member_bytes_per_s=40_000), TrafficLimits(bytes_per_s=40_000), TrafficLimits())
        ):
            async with at_a_border(tmp_path / str(number), traffic=Traffic(limits)) as border:
                link = border.link()
                await link.join("a", 1, 0)
                began = time.monotonic()
                assert (await link.push("a", 1, 1, pack_header(an_update(), LAYOUT), VALUES)).accepted
                took_s = time.monotonic() - began
                floor_s = len(BODY) / 40_000 - BURST_S if number < 2 else 0.0
                assert took_s >= 0.9 * floor_s
                assert border.gateway.members["world/a"].meter.resumed == 0

    run(work())


def test_a_days_bytes_are_refused_until_midnight_and_outlast_the_gateway(tmp_path: Path) -> None:
    async def work() -> None:
        clock, said = FakeClock(), list[tuple[str, str]]()
        clock.now_s -= clock.now_s % 86_400.0
        clock.tick(hours=22)
        options = {"folder": tmp_path, "warn": lambda path, text: said.append((path, text)), "clock": clock}
        traffic = Traffic(DAY, **options)
        traffic.check("world/a")
        await traffic.moved("world/a", 1_000)
        traffic.check("world/b")
        for each in (traffic, Traffic(DAY, **options)):
            for _ in range(2):
                with pytest.raises(DayIsOver, match=r"^over_quota: world/a has .*goes on at 00:00 UTC") as found:
                    each.check("world/a")
            assert found.value.after_s == 7_200.0
        assert [path for path, _ in said] == ["world/a", "world/a"], "once for each process"
        assert "its updates wait until 00:00 UTC, or raise gateway.member_gb_per_day" in said[0][1]
        clock.tick(hours=3)
        traffic.check("world/a")
        assert traffic.used("world/a") == 0

    run(work())


def test_a_member_over_its_quota_waits_with_what_has_arrived_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The update's first leaves arrive today and the rest tomorrow; heartbeats go on meanwhile."""
    slept = asyncio.Event()
    real = asyncio.sleep

    async def work() -> None:
        clock, heard = FakeClock(), list[str]()
        traffic = Traffic(TrafficLimits(member_bytes_per_day=len(BODY) / 2), clock=clock)

        async def sleep(seconds: float) -> None:
            if seconds >= http.LONG_S:
                slept.set()
                clock.tick(days=1)
            await real(min(seconds, 0.01))

        monkeypatch.setattr(http.asyncio, "sleep", sleep)
        async with at_a_border(tmp_path, traffic=traffic) as border:
            link = border.link(say=heard.append)
            await link.join("a", 1, 0)
            assert (await link.push("a", 1, 1, pack_header(an_update(), LAYOUT), VALUES)).accepted
            assert slept.is_set()
            assert heard[0].startswith("over_quota: world/a has moved")
            await link.heartbeat("a", 1, 1)
            assert border.gateway.members["world/a"].meter.refusals["over_quota"] >= 1
            assert border.parent.accepted == [("a", 1)]

    run(work())


def test_the_refusal_says_after_how_many_seconds(tmp_path: Path) -> None:
    async def work() -> None:
        traffic = Traffic(DAY)
        async with at_a_border(tmp_path, traffic=traffic) as border:
            peer = await by_hand(border)
            await traffic.moved("world/a", 1_000)
            peer.send("PUT", "/v1/up/1/1/fp32/0", BODY, Leaf_Digests=HEX)
            head = (await peer.reader.readuntil(b"\r\n\r\n")).decode().lower()
            assert " 507 " in head
            [after] = [line.partition(": ")[2] for line in head.split("\r\n") if line.startswith("retry-after")]
            assert 0 < int(after) <= 86_400

    run(work())


# ---- alarms ------------------------------------------------------------------------------------------------------


class FakeConnection:
    def __init__(self, certificate: bytes | None, address: str, heard_s: float = 100.0) -> None:
        self.certificate, self.address, self.heard_s = certificate, address, heard_s


@pytest.mark.parametrize(
    ("connections", "count"),
    [
        ([FakeConnection(b"a", "10.0.0.1"), FakeConnection(b"a", "10.0.0.2")], 1),
        ([FakeConnection(b"a", "10.0.0.1"), FakeConnection(b"a", "10.0.0.1")], 0),
        ([FakeConnection(b"a", "10.0.0.1"), FakeConnection(b"b", "10.0.0.2")], 0),
        ([FakeConnection(b"a", "10.0.0.1"), FakeConnection(b"a", "::1")], 0),
        ([FakeConnection(b"a", "10.0.0.1", 90.0), FakeConnection(b"a", "10.0.0.2")], 0),
        ([FakeConnection(None, "10.0.0.1"), FakeConnection(None, "10.0.0.2")], 0),
    ],
)
def test_one_key_from_two_addresses_at_once_is_an_alarm_once_an_hour(
    connections: list[FakeConnection], count: int
) -> None:
    said, now_s = list[tuple[str, str]](), [0.0]
    alarms = Alarms(lambda path, text: said.append((path, text)), clock=lambda: now_s[0])
    for now_s[0] in (0.0, 1.0, 3_599.0):
        alarms.look(connections, lambda certificate: "world/a", 101.0)  # type: ignore[arg-type]
    assert len(said) == count
    if count:
        assert said[0][1].startswith("the key of world/a is used from 10.0.0.1 and 10.0.0.2 at once; ")
        now_s[0] = 3_600.0
        alarms.look(connections, lambda certificate: "world/a", 101.0)  # type: ignore[arg-type]
        assert len(said) == 2


def test_an_incarnation_that_jumps_is_an_alarm(tmp_path: Path) -> None:
    async def work() -> None:
        said: list[tuple[str, str]] = []
        async with at_a_border(tmp_path, warn=lambda path, text: said.append((path, text))) as border:
            link = border.link()
            for incarnation in (1, 2, 12):
                await link.join("a", incarnation, 0)
            assert said == []
            await link.join("a", 23, 0)
            [(path, text)] = said
            assert (path, text.partition(";")[0]) == ("world/a", "the incarnation of world/a went from 12 to 23")
            other = border.link("world/b")
            with pytest.raises(MessageError, match="implausible_incarnation"):
                await other.join("b", 5_000, 0)
            assert [path for path, _ in said] == ["world/a", "world/b"]

    run(work())
