"""What one side of a border counts, by a clock that a test moves."""

from __future__ import annotations

import pytest

from worldlm_ray.exchange.replies import Verdict
from worldlm_ray.gateway.meter import Crossed, Meter, mbit_per_s

NOTHING = Crossed(
    bytes_up=0, bytes_down=0, up_s=0.0, down_s=0.0, resumed=0, accepted=0, refused={}, tau=None, every_s=None
)


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def verdict(reason: str = "accepted", *, tau: int = 0) -> Verdict:
    return Verdict(reason=reason, seq=1, base_version=0, version=tau, tau=tau)


def test_transfers_at_the_same_time_share_their_seconds() -> None:
    clock = Clock()
    way = Meter(clock).up
    with way.moving():
        clock.now_s += 1.0
        with way.moving():
            clock.now_s += 2.0
            way.count(500_000)
        way.count(500_000)
        clock.now_s += 1.0
    clock.now_s += 60.0
    assert way.take() == (1_000_000, 4.0)
    assert mbit_per_s(1_000_000, 4.0) == 2.0
    with way.moving():
        clock.now_s += 3.0
        way.count(7)
        assert way.take() == (7, 3.0), "of one that is under way"
        clock.now_s += 2.0
    assert way.take() == (0, 2.0)


def test_no_transfer_has_no_speed() -> None:
    assert mbit_per_s(0, 0.0) is mbit_per_s(10, 0.0) is mbit_per_s(0, 10.0) is None


def test_what_has_come_together_is_taken_once() -> None:
    clock = Clock()
    meter = Meter(clock)
    meter.judged(verdict(tau=1))
    clock.now_s += 5.0
    meter.judged(verdict("stale", tau=9))
    meter.refusals["over_quota"] += 2
    meter.resumed += 3
    found = meter.take()
    assert (found.accepted, found.refused, found.resumed) == (1, {"stale": 1, "over_quota": 2}, 3)
    assert (found.tau, found.every_s) == (9, 5.0)
    assert meter.take() == NOTHING
    clock.now_s += 7.0
    meter.judged(verdict())
    meter.refusals["stale"] += 1
    found = meter.take()
    assert (found.accepted, found.refused, found.tau, found.every_s) == (1, {"stale": 1}, 0, 7.0)


def test_a_side_that_does_not_call_is_offline_when_it_is_missed() -> None:
    clock = Clock()
    meter = Meter(clock)
    clock.now_s += 20.0
    assert meter.offline_s() == 0.0, "nothing was asked"
    assert meter.offline_s(patience_s=30.0) == 0.0
    assert meter.offline_s(patience_s=10.0) == 20.0
    meter.missed()
    clock.now_s += 1.0
    assert meter.offline_s() == pytest.approx(21.0)
    meter.heard()
    assert meter.offline_s(patience_s=10.0) == 0.0
