"""How a run ends, as the command line and the run's folder tell it: exit codes, reasons, what to do next."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from support.worlds import TINY_MODEL, client
from typer.testing import CliRunner

from worldlm_ray import launch
from worldlm_ray.cli.main import app
from worldlm_ray.config.loading import from_mapping
from worldlm_ray.errors import ConfigError, Interrupted, RunError
from worldlm_ray.plan import rundir
from worldlm_ray.plan.plan import Plan, make_plan
from worldlm_ray.reports.liveness import liveness
from worldlm_ray.tracking.status import has_ended, read_status, record_failure
from worldlm_ray.tracking.tracker import Tracker

Result = Any


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    """A world of one client, and a run folder of a long name."""
    raw = {
        "name": "small",
        "run_dir": str(tmp_path / "a-folder-with-a-rather-long-name-so-that-its-path-is-longer-than-a-line" / "run"),
        "model": TINY_MODEL,
        "budget": {"rounds": 2},
        "training": {"local_steps": 2, "batch_size": 2},
        "data": {"cache_dir": str(tmp_path / "cache")},
        "world": {"children": [client("a", tmp_path, 1)]},
    }
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(raw), encoding="utf-8")
    return path


def run_dir(conf: Path) -> Path:
    return Path(json.loads(conf.read_text(encoding="utf-8"))["run_dir"])


def fake_training(monkeypatch: pytest.MonkeyPatch, train: Callable[..., Any]) -> None:
    monkeypatch.setattr(launch, "train", train)


def worldlm(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def open_tracker(plan: Plan) -> Tracker:
    return Tracker(plan.run_dir, kinds=plan.kinds, hparams=plan.hparams(), budget=plan.config.budget)


def test_a_run_that_was_left_before_it_began_ends_with_130_and_leaves_no_folder(
    conf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(plan: Plan, **_: Any) -> Any:
        assert plan.run_dir.exists()
        raise Interrupted("stopped before the run had begun; nothing is lost")

    fake_training(monkeypatch, train)
    done = worldlm("train", str(conf))
    assert done.exit_code == 130
    assert "stopped before the run had begun" in done.output
    assert not run_dir(conf).exists()


def test_an_error_before_the_beginning_leaves_no_folder(conf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*_: Any, **__: Any) -> Any:
        raise RunError("cannot reach a Ray cluster at 127.0.0.1:6399: connection refused")

    fake_training(monkeypatch, train)
    done = worldlm("train", str(conf))
    assert isinstance(done.exception, RunError)
    assert not run_dir(conf).exists()


@pytest.mark.parametrize("error", [RunError("no Ray cluster at 10.0.0.1:6379"), Interrupted("stopped before it began")])
def test_a_resume_that_cannot_begin_leaves_the_run_as_it_was(
    conf: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    plan = rundir.create(make_plan(from_mapping(json.loads(conf.read_text(encoding="utf-8")))))
    (plan.run_dir / "summary.json").write_text('{"status": "stopped", "backend": "ray"}', encoding="utf-8")
    before = {path.name: path.read_bytes() for path in plan.run_dir.iterdir()}

    def train(*_: Any, **__: Any) -> Any:
        raise error

    fake_training(monkeypatch, train)
    assert worldlm("train", "--resume", str(plan.run_dir)).exit_code != 0
    (plan.run_dir / rundir.LOCK).unlink()
    assert {path.name: path.read_bytes() for path in plan.run_dir.iterdir()} == before


def test_the_summary_of_the_part_before_goes_when_the_nodes_have_started(conf: Path) -> None:
    plan = rundir.create(make_plan(from_mapping(json.loads(conf.read_text(encoding="utf-8")))))
    summary = plan.run_dir / "summary.json"
    summary.write_text("{}", encoding="utf-8")
    asked = list[tuple[str, bool]]()
    watch = SimpleNamespace(
        ask=lambda _, method: asked.append((method, summary.exists())),
        on_step=lambda _: None,
        on_record=None,
    )
    run = importlib.import_module("worldlm_ray.launch.run")
    create = importlib.import_module("worldlm_ray.launch.create")
    world = create.World(MagicMock(), "", None, 0.0, True, {"world": MagicMock()}, run_dir=plan.run_dir)
    run._start(plan, world, watch, MagicMock())
    assert asked == [("ready", True), ("ready", True), ("start", True)]
    assert not summary.exists()


def test_a_simulation_that_is_stopped_says_what_is_kept(conf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worldlm_ray.cli.runs.Stop.asked", lambda _: True)
    done = worldlm("simulate", str(conf))
    assert done.exit_code == 130, done.output
    assert "keeps what there is; a simulation is not continued" in done.output
    summary = json.loads((run_dir(conf) / "summary.json").read_text(encoding="utf-8"))
    assert summary["status"] == "stopped"


def failed_run(conf: Path) -> Path:
    plan = rundir.create(make_plan(from_mapping(json.loads(conf.read_text(encoding="utf-8")))))
    open_tracker(plan).close()
    record_failure(plan.run_dir, "an actor failed: ValueError: no")
    return plan.run_dir


def test_a_failed_run_says_why_and_what_to_do_and_its_watch_ends(conf: Path) -> None:
    run = failed_run(conf)
    status = read_status(run)
    assert (status["status"], status["reason"]) == ("failed", "an actor failed: ValueError: no")
    assert has_ended(run, status)
    for arguments in (["status", str(run)], ["status", str(run), "--watch"]):
        done = worldlm(*arguments)
        assert done.exit_code == 0, done.output
        said = done.output.splitlines()[-2:]
        assert said == ["failed: an actor failed: ValueError: no", f"continue with: worldlm train --resume {run}"]


@pytest.mark.parametrize("error", [RunError("no room"), ValueError("a fault"), Interrupted("left")])
def test_what_ends_a_run_on_ray_is_raised_and_stands_in_its_folder(
    conf: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    plan = rundir.create(make_plan(from_mapping(json.loads(conf.read_text(encoding="utf-8")))))
    open_tracker(plan).close()

    def fail(*_: Any) -> Any:
        raise error

    run = importlib.import_module("worldlm_ray.launch.run")
    monkeypatch.setattr(run.cluster, "connected", lambda *_: nullcontext())
    monkeypatch.setattr(run, "_train", fail)
    with pytest.raises(type(error), match=str(error)):
        run.train(plan)
    reason = None if isinstance(error, Interrupted) else str(error)
    assert read_status(plan.run_dir).get("reason") == reason


def test_a_run_that_goes_on_takes_its_failure_back(conf: Path) -> None:
    run = failed_run(conf)
    plan = rundir.reopen(str(run))
    tracker = open_tracker(plan)
    tracker.flush()
    status = read_status(run)
    assert "reason" not in status
    assert status.get("status") != "failed"
    assert not has_ended(run, status)
    assert liveness(run, status) == "running"


def test_the_watch_of_a_run_ends_when_the_run_does(conf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = rundir.create(make_plan(from_mapping(json.loads(conf.read_text(encoding="utf-8")))))
    open_tracker(plan).close()
    looks: list[float] = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            (plan.run_dir / "summary.json").write_text("{}", encoding="utf-8")

    monkeypatch.setattr("worldlm_ray.cli.runs.time.sleep", sleep)
    done = worldlm("status", str(plan.run_dir), "--watch")
    assert (done.exit_code, len(looks)) == (0, 3)
    assert done.output.splitlines()[-1] == "ended: see summary.json"


def test_nothing_is_written_where_nothing_has_begun(tmp_path: Path) -> None:
    record_failure(tmp_path, "no cluster")
    assert list(tmp_path.iterdir()) == []


def test_a_warning_of_the_machines_stands_in_the_status_until_it_is_over(conf: Path) -> None:
    plan = rundir.create(make_plan(from_mapping(json.loads(conf.read_text(encoding="utf-8")))))
    tracker = open_tracker(plan)
    tracker.warn("Ray ends actors for want of memory")
    assert read_status(plan.run_dir)["trouble"] == "Ray ends actors for want of memory"
    tracker.warn("")
    assert read_status(plan.run_dir)["trouble"] == ""
    tracker.close()


def test_a_node_is_found_by_the_end_of_its_path(tmp_path: Path) -> None:
    tree = [
        {"federation": "north", "children": [client("a", tmp_path, 1), client("b", tmp_path, 2)]},
        {"federation": "south", "children": [client("a", tmp_path, 1), client("c", tmp_path, 2)]},
    ]
    plan = make_plan(from_mapping({"model": TINY_MODEL, "budget": {"rounds": 1}, "world": {"children": tree}}))
    assert plan.find("world/north/a").path == "world/north/a"
    assert [plan.find(name).path for name in ("c", "south/a", "north", "world")] == [
        "world/south/c",
        "world/south/a",
        "world/north",
        "world",
    ]
    with pytest.raises(ConfigError, match=r"'a' may be each of .*world/north/a.*world/south/a"):
        plan.find("a")
    for name in ("d", "", "orth/a"):
        with pytest.raises(ConfigError, match="there is no node"):
            plan.find(name)


@pytest.mark.parametrize("arguments", [["--version"], ["-h"], ["train", "-h"]])
def test_the_module_is_the_command(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "worldlm_ray", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert ("worldlm_ray 0." if arguments == ["--version"] else "Usage") in done.stdout
    assert "130" in done.stdout or arguments != ["train", "-h"]
