"""Run folders on a file system and in an object store behave alike."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.stores import s3
from support.worlds import a_verdict
from tensorboard.backend.event_processing import event_file_loader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary

from worldlm_ray.errors import CheckpointError, ConfigError, RunError, SupersededError
from worldlm_ray.experiments import evaluate
from worldlm_ray.plan import plan, rundir
from worldlm_ray.records import VerdictRecord
from worldlm_ray.simulation import simulator as simulate
from worldlm_ray.storage import checkpoint, filesystem
from worldlm_ray.tracking import audit, curves
from worldlm_ray.tracking.tensorboard import EventFiles


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with s3() as address:
        yield address


@pytest.fixture(params=["file system", "object store"])
def home(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An empty folder of either kind."""
    if request.param == "file system":
        return tmp_path
    return filesystem.place(f"{request.getfixturevalue('bucket')}/{secrets.token_hex(4)}")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def arrays(value: float) -> dict[str, Any]:
    return {"theta": np.full(1_000, value, np.float32)}


def verdict(seq: int, life: int = 1) -> VerdictRecord:
    return a_verdict(seq, now_s=0.0, bytes=1, incarnation=life)


def test_a_local_path_becomes_absolute_and_an_address_stays(bucket: str) -> None:
    assert filesystem.place("runs/x") == Path.cwd() / "runs" / "x"
    found = filesystem.place(f"{bucket}/runs/x/")
    assert str(found) == f"{bucket}/runs/x"
    assert filesystem.is_remote(found)
    assert not filesystem.is_remote(filesystem.place("/runs"))


def test_an_unknown_protocol_says_what_to_install() -> None:
    with pytest.raises(RunError, match=r"nosuch://bucket: cannot use nosuch://.*fsspec"):
        filesystem.place("nosuch://bucket")


def test_text_is_replaced_as_a_whole(home: Path) -> None:
    for text in ("first, and longer", "second"):
        filesystem.make_folder(home)
        filesystem.replace_text(home / "file", text, durable=True)
        assert (home / "file").read_text(encoding="utf-8") == text
    assert names(home) == ["file"]


def test_a_file_is_made_once(home: Path) -> None:
    filesystem.create_exclusively(home / "claim")
    with pytest.raises(FileExistsError):
        filesystem.create_exclusively(home / "claim")


def test_what_grows_goes_on_in_a_new_life(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "SEGMENT_BYTES", 40)
    pieces = [f"line {number}\n".encode() for number in range(30)]
    first = filesystem.Growing(home / "folder" / "trail.jsonl", closing=b"\n")
    for piece in pieces[:17]:
        first.add(piece)
    second = filesystem.Growing(home / "folder" / "trail.jsonl", closing=b"\n")
    for piece in pieces[17:]:
        second.add(piece)
    files = sorted((home / "folder").rglob("*.jsonl"))
    assert b"".join(file.read_bytes() for file in files) == b"".join(pieces)
    assert (len(files) > 3) == filesystem.is_remote(home)


def test_a_torn_line_is_closed_off(tmp_path: Path) -> None:
    (tmp_path / "trail.jsonl").write_bytes(b"whole\ntorn apa")
    filesystem.Growing(tmp_path / "trail.jsonl", closing=b"\n").add(b"next\n")
    assert (tmp_path / "trail.jsonl").read_bytes() == b"whole\ntorn apa\nnext\n"


def test_checkpoints_come_back_and_old_ones_go(home: Path) -> None:
    for number in range(4):
        checkpoint.save(home, {"number": number}, arrays(number), keep=2)
    assert len(names(home)) == 2
    found = checkpoint.load(home)
    assert found is not None
    assert found[0] == {"number": 3}
    assert (found[1]["theta"] == 3.0).all()


def test_a_damaged_checkpoint_falls_back(home: Path) -> None:
    checkpoint.save(home, {"number": 1}, arrays(1))
    newest = checkpoint.save(home, {"number": 2}, arrays(2))
    (newest / "arrays.safetensors").write_bytes(b"nonsense")
    warnings: list[str] = []
    found = checkpoint.load(home, warn=warnings.append)
    assert found is not None
    assert found[0] == {"number": 1}
    assert "damaged" in warnings[0]


def test_an_unfinished_checkpoint_does_not_count_and_goes_with_the_next(home: Path) -> None:
    whole = checkpoint.save(home, {"number": 1}, arrays(1))
    torn = home / ("0001-000002-abcd" if filesystem.is_remote(home) else ".writing-abcd")
    filesystem.make_folder(torn)
    (torn / "arrays.safetensors").write_bytes(b"the writer was killed here")
    found = checkpoint.load(home)
    assert found is not None
    assert found[0] == {"number": 1}
    checkpoint.save(home, {"number": 2}, arrays(2))
    checkpoint.save(home, {"number": 3}, arrays(3), keep=3)
    assert torn.name not in names(home)
    assert whole.name in names(home)


def test_lives_have_numbers_of_their_own_and_the_older_one_ends(home: Path) -> None:
    assert [checkpoint.claim(home) for _ in range(3)] == [1, 2, 3]
    assert checkpoint.newest_incarnation(home) == 3
    checkpoint.save(home, {"life": 3}, arrays(3), incarnation=3)
    with pytest.raises(SupersededError, match="incarnation 3 is there; 2 must end"):
        checkpoint.save(home, {"life": 2}, arrays(2), incarnation=2)
    found = checkpoint.load(home)
    assert found is not None
    assert found[0] == {"life": 3}


def test_a_missing_bucket_is_a_checkpoint_error(bucket: str) -> None:
    with pytest.raises(CheckpointError, match="cannot write"):
        checkpoint.save(filesystem.place("s3://no-such-bucket/run"), {}, arrays(1))


def test_a_trail_is_read_across_lives(home: Path) -> None:
    for life in range(2):
        trail = audit.AuditLog(home, "world")
        trail.restored(now_s=0.0, incarnation=life + 1, last_seq={"a": 2 * life})
        trail.verdict(verdict(2 * life + 1, life + 1))
        trail.verdict(verdict(2 * life + 2, life + 1))
        trail.flush()
    proof = audit.proofs(home)[0]
    assert proof.holds
    assert proof.applied == [1, 2, 3, 4]


def test_a_trail_writes_no_object_per_line(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    added: list[bytes] = []
    monkeypatch.setattr(filesystem.Growing, "add", lambda self, piece: added.append(piece))
    trail = audit.AuditLog(filesystem.place(f"{bucket}/lines"), "world")
    for seq in range(50):
        trail.verdict(verdict(seq))
    trail.flush()
    assert len(added) == 2
    assert sum(piece.count(b"\n") for piece in added) == 50


def test_events_are_read_by_tensorboard(home: Path) -> None:
    files = EventFiles(home / "tensorboard", started_at=1_000.0)
    for step in range(20):
        files.add("world/north", Event(step=step, summary=Summary(value=[Summary.Value(tag="t", simple_value=step)])))
        if step % 7 == 0:
            files.flush()
    files.close()
    steps = []
    for file in sorted((home / "tensorboard" / "world" / "north").iterdir()):
        with filesystem.local_copy(file) as copy:
            steps += [e.step for e in event_file_loader.EventFileLoader(str(copy)).Load() if e.HasField("summary")]
    assert steps == list(range(20))


def test_a_world_is_simulated_in_an_object_store_and_found_again(
    tiny: Callable[..., plan.Plan], bucket: str, tmp_path: Path
) -> None:
    address = f"{bucket}/runs/tiny"
    made = rundir.create(tiny(run_dir=address))
    outcome = simulate.simulate(made)
    there = filesystem.place(address)
    kept = {name for name in names(there) if not name.startswith("metrics.")}
    assert kept == {"audit", "checkpoints", "config.yaml", "status.json", "summary.json", "tensorboard"}
    assert {line["node"] for line in curves.read(there)} == set(made.kinds)
    summary = json.loads((there / "summary.json").read_text(encoding="utf-8"))
    assert summary["params_sha256"] == outcome.summary["params_sha256"]
    assert all(proof.holds and proof.applied for proof in audit.proofs(there))
    again = rundir.reopen(address)
    assert again.run_dir == there
    assert not (tmp_path / "run").exists()
    with pytest.raises(RunError, match="already holds a simulation"):
        rundir.create(tiny(run_dir=address))
    with pytest.raises(RunError, match="there is no run"):
        rundir.find(f"{bucket}/runs/other")
    assert set(evaluate.evaluate(address, tokens=64)) >= {"world", "world/north/a"}


def test_a_ledger_needs_a_file_system(tiny: Callable[..., plan.Plan], tmp_path: Path) -> None:
    private = {"privacy": {"unit": "record", "noise_multiplier": 1.0, "delta": 1e-5}}
    with pytest.raises(ConfigError, match=r"privacy\.ledger_dir: an object store cannot lock a ledger"):
        tiny(run_dir="s3://worlds/private", **private)
    tiny(run_dir="s3://worlds/private", privacy=private["privacy"] | {"ledger_dir": str(tmp_path / "ledgers")})
