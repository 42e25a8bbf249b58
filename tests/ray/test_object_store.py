"""A run whose folder lies in an object store: S3's interface, on the loopback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from support.stores import s3
from support.worlds import TINY_MODEL, two_levels

from worldlm_ray.storage import filesystem
from worldlm_ray.tracking.audit import proofs

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(300)]
WORLDLM = [sys.executable, "-m", "worldlm_ray"]
READ = """
import sys
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
found = EventMultiplexer()
found.AddRunsFromDirectory(sys.argv[1])
found.Reload()
print(len(found.Scalars("world/north", "4 versions/1 aggregations so far")))
"""


@pytest.fixture
def bucket() -> Iterator[str]:
    with s3() as address:
        yield address


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    """Clients sleep in every step, so that there is time to kill."""
    raw: dict[str, Any] = {
        "model": TINY_MODEL,
        "merge": {"client": 1.0},
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


def test_a_run_in_an_object_store_survives_kill_9_of_its_driver(conf: Path, bucket: str, tmp_path: Path) -> None:
    run, log = f"{bucket}/runs/tiny", tmp_path / "log"
    folder = filesystem.place(run)
    with log.open("w", encoding="utf-8") as stream:
        command = [*WORLDLM, "train", str(conf), "--run-dir", run]
        driver = subprocess.Popen(command, stdout=stream, stderr=stream, cwd=tmp_path)
        deadline = time.monotonic() + 120.0
        while not _tokens(folder) >= 4 * 2 * 5 * 4 * 16:  # two rounds of every client, about
            assert time.monotonic() < deadline, log.read_text(encoding="utf-8")
            time.sleep(0.2)
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    assert not (folder / "summary.json").exists()
    done = worldlm("train", "--resume", run)
    assert done.returncode == 0, done.stderr
    assert "continuing" in done.stdout
    assert f"tensorboard --logdir {run}/tensorboard" in done.stdout
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    clients = [node for node in summary["nodes"].values() if node["kind"] == "client"]
    assert [node["steps"] for node in clients] == [8 * 5] * 4
    found = proofs(folder)
    assert len(found) == 6
    assert all(proof.holds for proof in found), found
    for command in ("status", "audit"):
        looked = worldlm(command, run)
        assert looked.returncode == 0, looked.stderr
    # TensorBoard reads it from where it is.
    events = subprocess.run(
        [sys.executable, "-c", READ, f"{run}/tensorboard"], capture_output=True, text=True, check=False
    )
    assert int(events.stdout) >= 4, events.stderr
    assert not (tmp_path / "runs").exists()


def _tokens(folder: Path) -> int:
    try:
        return int(json.loads((folder / "status.json").read_text(encoding="utf-8"))["tokens"])
    except (OSError, ValueError):
        return 0
