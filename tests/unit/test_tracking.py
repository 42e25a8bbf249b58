"""status.json and summary.json, read back as their users do."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
from support.tracked import (
    ITALY,
    KINDS,
    Clock,
    chart,
    events,
    round_of,
    start,
    tracker,
    verdict,
)

from worldlm_ray.config.schema import BudgetConfig
from worldlm_ray.errors import RunError
from worldlm_ray.plan.rundir import STATUS
from worldlm_ray.records import (
    NodeSummary,
    PushRecord,
)
from worldlm_ray.tracking import tracker as tracking
from worldlm_ray.tracking.status import read_status
from worldlm_ray.tracking.summary import Summary, write_summary
from worldlm_ray.tracking.tracker import Tracker


def test_status_is_paced_whole_and_left_without_a_temporary_file(tmp_path: Path) -> None:
    clock = Clock()
    run = tracker(tmp_path, clock=clock)
    run.record(round_of(ITALY, tokens=100, loss=None))
    assert read_status(tmp_path)["tokens"] == 0, "within a second of the last write"
    clock.now += tracking.STATUS_EVERY_S
    run.record(round_of(ITALY, tokens=200, loss=None))
    assert read_status(tmp_path)["tokens"] == 200
    run.record(round_of(ITALY, tokens=250, loss=None))
    run.flush()
    status = read_status(tmp_path)
    run.close()
    assert (status["tokens"], status["progress"], status["now_s"]) == (250, 0.25, 10.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "status.json", "tensorboard"]


def test_a_diverged_loss_leaves_valid_json(tmp_path: Path) -> None:
    run = tracker(tmp_path)
    run.record(start(ITALY), round_of(ITALY, tokens=100, loss=math.nan))
    run.close()
    assert read_status(tmp_path)["nodes"][ITALY]["loss"] is None
    assert math.isnan(events(tmp_path, ITALY).Scalars(chart("loss", by="tokens"))[-1].value)


def test_a_status_that_cannot_be_written_waits(tmp_path: Path) -> None:
    clock = Clock()
    run = tracker(tmp_path, clock=clock)
    assert run.snapshot()["trouble"] == ""
    before = read_status(tmp_path)
    (tmp_path / "status.json.tmp").mkdir()
    clock.now += 10.0
    run.record(round_of(ITALY, tokens=100, loss=4.0))
    assert "status.json" in run.snapshot()["trouble"]
    assert read_status(tmp_path) == before
    (tmp_path / "status.json.tmp").rmdir()
    clock.now += 10.0
    run.record(round_of(ITALY, tokens=200, loss=4.0))
    assert run.snapshot()["trouble"] == ""
    assert read_status(tmp_path)["tokens"] == 200
    run.close()


def test_summary_holds_every_node_and_is_whole(tmp_path: Path) -> None:
    run = tracker(tmp_path)
    run.record(start(ITALY), round_of(ITALY, tokens=100, loss=4.0), verdict("italy", tau=3))
    run.close()
    quick = Summary(
        run="quick",
        method="fedavg",
        seed=7,
        wall_s=1.5,
        tokens=100,
        params_sha256="ab",
        nodes=run.summaries() | {"world": NodeSummary(kind="world", loss=math.inf)},
        staleness=run.staleness(),
        extra={"seed": 8, "note": [math.nan]},
    )
    write_summary(tmp_path, quick)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary["nodes"]) == list(KINDS)
    assert (summary["run"], summary["method"], summary["seed"], summary["note"]) == (
        "quick",
        "fedavg",
        7,
        [None],
    )
    italy = summary["nodes"][ITALY]
    assert (italy["kind"], italy["steps"], italy["tokens"], italy["accepted"]) == ("client", 10, 100, 1)
    assert (italy["loss_start"], italy["loss"], italy["tau_mean"]) == (5.0, 4.0, 3.0)
    assert summary["nodes"]["world"]["loss"] is None
    assert not (tmp_path / "summary.json.tmp").exists()


def test_a_missing_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no run in .*nowhere"):
        read_status(tmp_path / "nowhere")
    (tmp_path / "status.json").write_text("{")
    with pytest.raises(RunError, match="not valid JSON"):
        read_status(tmp_path)


@pytest.mark.parametrize("odd", ["NaN", "null", "-5.0", '"soon"', "Infinity"])
def test_a_status_whose_run_time_is_damaged_makes_no_odd_progress(tmp_path: Path, odd: str) -> None:
    (tmp_path / STATUS).write_text(f'{{"started_at": {odd}, "now_s": {odd}, "nodes": {{}}}}')
    tracker = Tracker(
        tmp_path, kinds={"world": "world", "world/a": "client"}, hparams={}, budget=BudgetConfig(seconds=40.0)
    )
    assert tracker.snapshot()["progress"] == 0.0
    assert tracker.snapshot()["started_at"] == pytest.approx(time.time(), abs=60.0)
    tracker.record(PushRecord(node="world/a", now_s=-3.0, bytes=7))
    assert tracker.snapshot()["now_s"] == 0.0
    tracker.close()
