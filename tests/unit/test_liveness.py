"""What `worldlm status` says of a run: no wall clock is asked, so that none can make it say nonsense."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from worldlm_ray import run_clock
from worldlm_ray.errors import RunError
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.rundir import STATUS, SUMMARY
from worldlm_ray.reports.liveness import liveness
from worldlm_ray.run_clock import Stamp
from worldlm_ray.tracking.status import read_status
from worldlm_ray.tracking.tracker import Tracker


@pytest.fixture
def run(tiny: Callable[..., Plan]) -> Path:
    """The folder of a run that has just written its status."""
    plan = tiny()
    Tracker(plan.run_dir, kinds=plan.kinds, hparams={}, budget=plan.config.budget).close()
    return plan.run_dir


def status(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / STATUS).read_text(encoding="utf-8"))
    return found


def never(_: float) -> None:
    pytest.fail("the age is known")


@pytest.mark.parametrize("step_s", [-3_600.0, 0.0, 3_600.0])
def test_a_run_of_this_machine_has_an_age_however_its_wall_clock_is_set(
    run: Path, monkeypatch: pytest.MonkeyPatch, step_s: float
) -> None:
    wall, monotonic = time.time() + step_s, time.monotonic()
    monkeypatch.setattr(time, "time", lambda: wall)
    assert liveness(run, status(run), sleep=never) == "running"
    monkeypatch.setattr(time, "monotonic", lambda: monotonic + 40.0)
    assert liveness(run, status(run), sleep=never).startswith("silent for 40 s; if nothing runs it, continue with")
    (run / SUMMARY).write_text("{}")
    assert liveness(run, status(run), sleep=never) == "ended: see summary.json"


@pytest.mark.parametrize("ahead_s", [-60.0, 60.0])
def test_a_run_of_another_machine_is_watched(run: Path, monkeypatch: pytest.MonkeyPatch, ahead_s: float) -> None:
    there = status(run) | {
        "updated": asdict(Stamp("another machine", 1e9)), "updated_at": time.time() + ahead_s
    }  # fmt: skip
    (run / STATUS).write_text(json.dumps(there))
    said = liveness(run, there, sleep=lambda _: None)
    assert said.startswith("no new status within 3 s from the machine that it runs on")
    looks: list[float] = []

    def writes_meanwhile(_: float) -> None:
        looks.append(0.0)
        if len(looks) == 3:
            (run / STATUS).write_text(json.dumps(there | {"updated_at": there["updated_at"] + 1.0}))

    assert liveness(run, there, sleep=writes_meanwhile) == "running"
    assert len(looks) == 3
    (run / SUMMARY).write_text("{}")
    assert liveness(run, status(run), sleep=lambda _: None) == "ended: see summary.json"


@pytest.mark.parametrize("odd", [None, 7, {}, {"machine": "x"}, {"machine": 1, "monotonic_s": "soon"}])
def test_a_status_without_a_usable_stamp_is_watched(run: Path, odd: object) -> None:
    said = liveness(run, status(run) | {"updated": odd}, sleep=lambda _: None)
    assert said == "running"  # the file holds another stamp than this one


def test_an_age_is_never_negative(monkeypatch: pytest.MonkeyPatch) -> None:
    stamp = Stamp.now()
    ahead = Stamp(stamp.machine, stamp.monotonic_s + 100.0)
    assert ahead.age_s() is None
    monkeypatch.setattr(run_clock, "this_machine", lambda: "another boot")
    assert stamp.age_s() is None


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"nodes": None}, "nodes is None"),
        ({"nodes": []}, "nodes is []"),
        ({"nodes": {}}, "nodes is {}"),
        ({"nodes": {"world": 3}}, "nodes.world is 3"),
        ({"nodes": {"world": {"kind": "world"}}}, "nodes.world.version is missing"),
        ({"now_s": "a"}, "now_s is 'a'"),
        ({"now_s": float("inf")}, "now_s is inf"),
        ({"progress": None}, "progress is None"),
        ({"budget": 3}, "budget is 3"),
        ({"warnings": "a"}, "warnings is 'a'"),
    ],
)
def test_a_status_that_is_none_is_refused_by_its_field(run: Path, change: dict[str, Any], field: str) -> None:
    assert read_status(run)
    (run / STATUS).write_text(json.dumps(status(run) | change))
    with pytest.raises(RunError, match=re.escape(f"{STATUS}' is no status of a run: {field}")):
        read_status(run)


def test_a_field_of_a_node_is_named_with_its_path(run: Path) -> None:
    values = status(run)
    values["nodes"]["world"]["loss"] = "nan"
    (run / STATUS).write_text(json.dumps(values))
    with pytest.raises(RunError, match=re.escape("nodes.world.loss is 'nan'")):
        read_status(run)
    del values["nodes"]["world"]
    (run / STATUS).write_text(json.dumps(values))
    with pytest.raises(RunError, match="has no parent"):
        read_status(run)
