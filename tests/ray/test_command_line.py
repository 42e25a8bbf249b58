"""The worldlm command as a user meets it: separate processes, kill -9, wrong configurations."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from support.worlds import TINY_MODEL, two_levels

from worldlm_ray.tracking.audit import proofs

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]
WORLDLM = [sys.executable, "-m", "worldlm_ray"]


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    """A configuration whose clients sleep in every step, so that there is time to kill it."""
    raw: dict[str, Any] = {
        "run_dir": str(tmp_path / "run"),
        "model": TINY_MODEL,
        "budget": {"rounds": 8},
        "training": {"local_steps": 5, "batch_size": 4, "step_delay_s": 0.1},
        "evaluation": {"tokens": 64, "final_tokens": 128},
        "checkpoint": {"every_s": 0.0},
        "data": {"cache_dir": str(tmp_path / "cache")},
        "world": {"children": two_levels(tmp_path)},
    }
    path = tmp_path / "conf.yaml"
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(raw)), encoding="utf-8")
    return path


def worldlm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*WORLDLM, *arguments], capture_output=True, text=True, check=False)


def wait_for_tokens(run: Path, tokens: int) -> None:
    deadline = time.monotonic() + 120.0
    while time.monotonic() < deadline:
        try:
            if json.loads((run / "status.json").read_text(encoding="utf-8"))["tokens"] >= tokens:
                return
        except (OSError, ValueError):
            pass
        time.sleep(0.1)
    pytest.fail("the run did not get going")


@pytest.mark.long
def test_a_run_survives_kill_9_of_its_driver(conf: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    with log.open("w", encoding="utf-8") as stream:
        driver = subprocess.Popen([*WORLDLM, "train", str(conf)], stdout=stream, stderr=stream)
        wait_for_tokens(run, 4 * 2 * 5 * 4 * 16)  # two rounds of every client, about
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    assert not (run / "summary.json").exists()
    done = worldlm("train", "--resume", str(run))
    assert done.returncode == 0, done.stderr
    assert "continuing" in done.stdout
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    clients = [node for node in summary["nodes"].values() if node["kind"] == "client"]
    assert [node["steps"] for node in clients] == [8 * 5] * 4
    found = proofs(run)
    assert len(found) == 6
    assert all(proof.holds for proof in found), found


def test_ctrl_c_writes_checkpoints_and_leaves_cleanly(conf: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    with log.open("w", encoding="utf-8") as stream:
        driver = subprocess.Popen([*WORLDLM, "train", str(conf)], stdout=stream, stderr=stream)
        wait_for_tokens(run, 320)
        driver.send_signal(signal.SIGINT)
        assert driver.wait(timeout=60) == 130
    output = log.read_text(encoding="utf-8")
    assert "Traceback" not in output
    assert json.loads((run / "summary.json").read_text(encoding="utf-8"))["status"] == "stopped"
    status = worldlm("status", str(run))
    assert status.returncode == 0
    assert "stopped" in status.stdout
    measured = worldlm("evaluate", str(run), "--json", "--tokens", "64")
    assert set(json.loads(measured.stdout)) == {"world", *(f"world/{p}" for p in ("north", "south"))} | {
        f"world/{p}" for p in ("north/a", "north/b", "south/c", "south/d")
    }
    text = worldlm("sample", str(run), "--node", "world/north/a", "--prompt", "the river", "--tokens", "20")
    assert text.stdout.startswith("the river")


def test_a_wrong_configuration_is_one_line_and_no_ray(conf: Path) -> None:
    began = time.monotonic()
    done = worldlm("train", str(conf), "training.local_step=3")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "worldlm: training.local_step (command line): unknown key; did you mean 'local_steps'?"
    ]
    assert time.monotonic() - began < 10.0
