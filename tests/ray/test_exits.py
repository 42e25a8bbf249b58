"""Signals and wrong addresses as a user meets them: separate processes, exit codes, what the terminal shows."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.worlds import TINY_MODEL, client

from worldlm_ray.tracking.audit import proofs

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(300)]
WORLDLM = [sys.executable, "-m", "worldlm_ray"]
RAYS_OWN = ("SIGTERM received", "raylet", "gcs", "GCS", "logging.cc", "Traceback", "core_worker")
"""What Ray writes where it is disturbed."""


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    """A world whose clients sleep in every step, so that there is time to stop it."""
    raw = {
        "run_dir": str(tmp_path / "run"),
        "model": TINY_MODEL,
        "budget": {"rounds": 8},
        "training": {"local_steps": 5, "batch_size": 4, "step_delay_s": 0.1},
        "evaluation": {"tokens": 64, "final_tokens": 128},
        "data": {"cache_dir": str(tmp_path / "cache")},
        "world": {"children": [client("a", tmp_path, 1), client("b", tmp_path, 2)]},
    }
    path = tmp_path / "conf.yaml"
    path.write_text(json.dumps(raw), encoding="utf-8")
    return path


def wait_for_rounds(run: Path) -> None:
    deadline = time.monotonic() + 150.0
    while time.monotonic() < deadline:
        try:
            if json.loads((run / "status.json").read_text(encoding="utf-8"))["accepted"] >= 2:
                return
        except (OSError, ValueError):
            pass
        time.sleep(0.1)
    pytest.fail("the run did not get going")


def test_an_address_where_no_cluster_is_answers_at_once(conf: Path, tmp_path: Path) -> None:
    with socket.socket() as line:
        line.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{line.getsockname()[1]}"  # bound, but nothing listens
        began = time.monotonic()
        done = subprocess.run(
            [*WORLDLM, "train", str(conf), "--address", address], capture_output=True, text=True, check=False
        )
        took_s = time.monotonic() - began
    assert done.returncode == 2
    assert done.stderr.startswith(f"worldlm: cannot reach a Ray cluster at {address}: ")
    assert len(done.stderr.splitlines()) == 1
    assert took_s < 40.0, "15 s on a machine that does nothing else"
    assert not (tmp_path / "run").exists()


def test_sigterm_to_the_whole_group_ends_cleanly_and_loses_nothing(conf: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    with log.open("w", encoding="utf-8") as stream:
        driver = subprocess.Popen([*WORLDLM, "train", str(conf)], stdout=stream, stderr=stream, start_new_session=True)
        wait_for_rounds(run)
        began = time.monotonic()
        os.killpg(driver.pid, signal.SIGTERM)
        assert driver.wait(timeout=120) == 143
        took_s = time.monotonic() - began
    output = log.read_text(encoding="utf-8")
    assert took_s < 60.0, "30 s on a machine that does nothing else"
    for words in RAYS_OWN:
        assert words not in output, output
    assert f"worldlm train --resume {run}\n" in output
    assert json.loads((run / "summary.json").read_text(encoding="utf-8"))["status"] == "stopped"
    done = subprocess.run([*WORLDLM, "train", "--resume", str(run)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert [node["steps"] for node in summary["nodes"].values() if node["kind"] == "client"] == [8 * 5] * 2
    assert all(proof.holds for proof in proofs(run))


def test_ctrl_c_while_ray_starts_leaves_nothing_behind(conf: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("w", encoding="utf-8") as stream:
        driver = subprocess.Popen([*WORLDLM, "train", str(conf)], stdout=stream, stderr=stream)
        deadline = time.monotonic() + 60.0
        while "starting Ray" not in log.read_text(encoding="utf-8"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        driver.send_signal(signal.SIGINT)
        assert driver.wait(timeout=90) == 130
    output = log.read_text(encoding="utf-8")
    assert "stopping: nothing has begun yet" in output
    assert "writing checkpoints" not in output
    assert not (tmp_path / "run").exists()
