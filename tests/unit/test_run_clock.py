"""Run time: monotonic in a process, agreed between processes, untouched by wall clocks that are set or differ."""

from __future__ import annotations

import json
import math
import pickle
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from worldlm_ray import run_clock
from worldlm_ray.plan import rundir
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.rundir import STATUS
from worldlm_ray.run_clock import Anchor, RunClock, Stamp, seconds
from worldlm_ray.storage import checkpoint

HERE, THERE = "here boot-1", "there boot-9"


class Monotonic:
    """The monotonic clock of a machine, moved by hand."""

    def __init__(self, now_s: float) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


def machines(run_s: float = 0.0) -> tuple[RunClock, Monotonic, Monotonic]:
    """A clock that the run was begun with, its machine's clock, and that of another machine."""
    one, other = Monotonic(5_000.0), Monotonic(7.0)
    return RunClock(Anchor(Stamp(HERE, 5_000.0), run_s), machine=HERE, monotonic=one), one, other


def test_run_time_does_not_hear_of_a_wall_clock_that_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monotonic = time.monotonic()
    clock = RunClock.starting(100.0)
    told = []
    for step_s in (0.0, -3_600.0, 3_600.0):
        wall = time.time() + step_s
        monkeypatch.setattr(time, "time", lambda wall=wall: wall)
        told.append(clock.now_s())
    assert told == sorted(told)
    assert told[0] >= 100.0
    assert told[-1] - 100.0 <= time.monotonic() - monotonic


def test_a_clock_that_was_sent_tells_the_same_on_the_same_machine() -> None:
    clock = RunClock.starting(42.0)
    sent = pickle.dumps(clock)
    arrived = pickle.loads(sent)
    assert arrived.is_settled
    before, there, after = clock.now_s(), arrived.now_s(), clock.now_s()
    assert before - 1e-6 <= there <= after + 1e-6
    # Ray starts an actor again from what it was first sent: no time is lost.
    again = pickle.loads(sent)
    assert again.now_s() >= there


@pytest.mark.parametrize(("way_there_s", "way_back_s"), [(0.2, 0.2), (0.4, 0.0), (0.0, 0.4)])
def test_another_machine_settles_within_half_a_round_trip(way_there_s: float, way_back_s: float) -> None:
    clock, one, other = machines()
    one.now_s += 30.0
    far = RunClock(clock.anchor(), machine=THERE, monotonic=other)
    assert not far.is_settled

    def both(step_s: float) -> None:
        one.now_s, other.now_s = one.now_s + step_s, other.now_s + step_s

    def ask() -> float:
        both(way_there_s)
        told = clock.now_s()
        both(way_back_s)
        return told

    far.settle([ask])
    assert far.is_settled
    assert abs(far.now_s() - clock.now_s()) <= (way_there_s + way_back_s) / 2 + 1e-9
    both(3_600.0)
    assert abs(far.now_s() - clock.now_s()) <= (way_there_s + way_back_s) / 2 + 1e-9


def test_of_several_answers_the_fastest_counts() -> None:
    clock, one, other = machines()
    far = RunClock(clock.anchor(), machine=THERE, monotonic=other)
    slow_s = iter([2.0, 0.1, 3.0, 1.0, 0.5])

    def ask() -> float:  # the question waits in a queue; the answer comes at once
        step_s = next(slow_s)
        one.now_s, other.now_s = one.now_s + step_s, other.now_s + step_s
        return clock.now_s()

    far.settle([ask])
    assert abs(far.now_s() - clock.now_s()) <= 0.05 + 1e-9
    assert next(slow_s, None) is None, "not all answers were heard"


def test_a_peer_that_does_not_answer_is_passed_over() -> None:
    clock, _, other = machines(60.0)
    far = RunClock(Anchor(Stamp(HERE, 5_000.0), 0.0), machine=THERE, monotonic=other)
    far.settle([lambda: None, lambda: math.nan, clock.now_s], known_s=lambda: pytest.fail("a peer lives"))
    assert far.is_settled
    assert far.now_s() == pytest.approx(60.0)


def test_where_no_peer_lives_what_the_folder_knows_counts() -> None:
    _, _, other = machines()
    far = RunClock(Anchor(Stamp(HERE, 5_000.0), 10.0), machine=THERE, monotonic=other)
    far.settle([lambda: None], known_s=lambda: 90.0)
    assert not far.is_settled  # it is asked again when there is another chance
    other.now_s += 2.0
    assert far.now_s() == pytest.approx(92.0)
    stale = RunClock(Anchor(Stamp(HERE, 5_000.0), 95.0), machine=THERE, monotonic=other)
    stale.settle([], known_s=lambda: 90.0)
    assert stale.now_s() == pytest.approx(95.0), "the address knew more"


def test_run_time_never_goes_back_when_a_clock_settles() -> None:
    clock, _, other = machines(50.0)
    far = RunClock(Anchor(Stamp(HERE, 5_000.0), 80.0), machine=THERE, monotonic=other)
    assert far.now_s() == 80.0
    far.settle([clock.now_s])
    assert far.now_s() == 80.0
    other.now_s += 31.0
    assert far.now_s() == pytest.approx(81.0)


def test_the_same_machine_after_another_boot_is_another_one() -> None:
    clock, _, _ = machines(50.0)
    booted = Monotonic(3.0)
    assert not RunClock(clock.anchor(), machine="here boot-2", monotonic=booted).is_settled
    assert not RunClock(clock.anchor(), machine=HERE, monotonic=booted).is_settled, "its clock cannot have gone back"


def test_a_system_that_does_not_name_its_boot_makes_every_process_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_clock, "this_machine", lambda: "")
    clock = RunClock.starting(5.0)
    assert clock.is_settled
    assert not pickle.loads(pickle.dumps(clock)).is_settled
    assert Stamp.now().age_s() is None


def test_an_anchor_survives_a_file() -> None:
    anchor = RunClock.starting(7.5).anchor()
    assert Anchor.from_mapping(json.loads(json.dumps(asdict(anchor)))) == anchor


@pytest.mark.parametrize("odd", [None, "7", True, -3.0, math.nan, math.inf, [1.0], {}])
def test_a_run_time_that_is_none_counts_as_nothing(odd: object) -> None:
    assert seconds(odd) == 0.0


def test_a_run_goes_on_where_its_status_or_its_checkpoint_says(tiny: Callable[..., Plan]) -> None:
    plan = rundir.create(tiny())
    assert rundir.run_time_s(plan.run_dir) == 0.0
    status = plan.run_dir / STATUS
    status.write_text('{"now_s": 12.5}')
    assert rundir.run_time_s(plan.run_dir) == 12.5
    place = checkpoint.folder(plan.run_dir, "world")
    checkpoint.save(place, {"now_s": 20.0}, {})
    assert rundir.run_time_s(plan.run_dir) == 20.0
    for lost in ('{"now_s": NaN}', '{"now_s": -7', "[]", '{"now_s": null}'):
        status.write_text(lost)
        assert rundir.run_time_s(plan.run_dir) == 20.0
    newest = checkpoint.save(place, {"now_s": 30.0}, {})
    damaged(newest / "meta.json")
    assert rundir.run_time_s(plan.run_dir) == 20.0


def damaged(file: Path) -> None:
    file.write_text(file.read_text().replace("30.0", "31.0"))
