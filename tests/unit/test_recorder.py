"""The recorder's actor: after a death it waits for its storage, and what is left of an older one ends itself."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable

import pytest

import actors.recorder
import actors.shared
from actors.recorder import RecorderActor
from worldlm_ray.errors import CheckpointError, RunError
from worldlm_ray.plan import rundir
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.rundir import STATUS
from worldlm_ray.records import LifeRecord
from worldlm_ray.storage import checkpoint


@pytest.fixture
def plan(tiny: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Of a run that begins, on no cluster."""
    monkeypatch.setattr(actors.recorder, "was_restarted", lambda: False)
    return rundir.create(tiny())


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Why the process was to end; it is as good as ended then."""
    found: list[str] = []

    def end(why: str) -> None:
        found.append(why)
        raise SystemExit

    monkeypatch.setattr(actors.recorder, "end_process", end)
    monkeypatch.setattr(actors.recorder, "STATUS_EVERY_S", 0.0)  # looked at each time
    return found


def state_of_the_world(plan: Plan) -> str:
    status = json.loads((plan.run_dir / STATUS).read_text(encoding="utf-8"))
    return str(status["nodes"]["world"]["state"])


def tell(recorder: RecorderActor, event: str) -> None:
    recorder.record([LifeRecord(node="world", now_s=1.0, event=event)])


def test_of_two_recorders_the_older_one_writes_nothing_any_more(plan: Plan, ends: list[str]) -> None:
    older = RecorderActor(plan)
    tell(older, "started")
    assert not ends
    newer = RecorderActor(plan)
    tell(newer, "lost")
    newer.tracker.flush()
    with pytest.raises(SystemExit):
        tell(older, "finished")
    assert "incarnation 2 is there; 1 must end" in ends[0]
    assert state_of_the_world(plan) == "lost"


def test_a_recorder_keeps_records_for_the_process_that_watches(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors.recorder, "KEPT_RECORDS", 2)
    recorder = RecorderActor(plan)
    tell(recorder, "started")
    assert recorder.take_records() == []  # none were kept, since none had asked
    for event in ("lost", "started", "finished"):
        tell(recorder, event)
    taken = recorder.take_records()
    assert [record.event for record in taken if isinstance(record, LifeRecord)] == ["started", "finished"]
    assert recorder.take_records() == []


def test_a_recorder_goes_on_while_its_storage_does_not_answer(plan: Plan, ends: list[str]) -> None:
    recorder = RecorderActor(plan)
    assert recorder.ready()
    away = plan.run_dir.rename(plan.run_dir.with_name("away"))
    plan.run_dir.write_text("where the folder was, there is something else\n")
    tell(recorder, "started")
    assert recorder.snapshot()["nodes"]["world"]["state"] == "started"
    plan.run_dir.unlink()
    away.rename(plan.run_dir)
    recorder.tracker.flush()
    assert state_of_the_world(plan) == "started"
    assert not ends


def test_a_recorder_that_died_waits_for_its_storage(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = RecorderActor(plan)
    tell(first, "started")
    first.tracker.flush()
    for module in (actors.recorder, actors.shared):
        monkeypatch.setattr(module, "was_restarted", lambda: True)
    monkeypatch.setattr(actors.shared, "STORAGE_AGAIN_S", 0.02)
    away = plan.run_dir.rename(plan.run_dir.with_name("away"))
    plan.run_dir.write_text("where the folder was, there is something else\n")
    found: list[RecorderActor] = []
    second = threading.Thread(target=lambda: found.append(RecorderActor(plan)))
    second.start()
    said, until = "", time.monotonic() + 10.0
    while "the recorder cannot go on yet" not in said:
        assert time.monotonic() < until, said
        time.sleep(0.02)
        said += capsys.readouterr().err
    assert not found
    plan.run_dir.unlink()
    away.rename(plan.run_dir)
    second.join(10.0)
    assert found[0].snapshot()["nodes"]["world"]["state"] == "started"


def test_a_recorder_that_begins_says_that_its_storage_refuses(plan: Plan) -> None:
    (plan.run_dir / "checkpoints").write_text("no folder\n")
    recorder = RecorderActor(plan)
    with pytest.raises(CheckpointError, match="free the storage"):
        recorder.ready()
    (plan.run_dir / "checkpoints").unlink()
    (plan.run_dir / STATUS).mkdir()
    with pytest.raises(RunError, match=r"cannot write to .*free the storage"):
        recorder.ready()
    (plan.run_dir / STATUS).rmdir()
    assert recorder.ready()
    assert checkpoint.newest_incarnation(checkpoint.folder(plan.run_dir, "recorder")) == 1, "a try is no new life"


def test_storage_that_takes_long_to_refuse_does_not_hold_up_what_is_recorded(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []

    def refuse(*_: object) -> None:
        looks.append(1)
        time.sleep(0.2)
        raise OSError("no answer")

    recorder = RecorderActor(plan)
    assert recorder.ready()
    monkeypatch.setattr(actors.recorder.checkpoint, "check_newest", refuse)
    monkeypatch.setattr(actors.recorder, "STATUS_EVERY_S", 0.0)
    for _ in range(50):
        tell(recorder, "started")
    assert len(looks) == 1, "the next look is as far away as this one took long"
