"""A federation's actors live where its labels say and nowhere else: its aggregator, clients, their workers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(300)
def test_actors_live_where_their_labels_say(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "support.placed", str(tmp_path)]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stdout.splitlines() if line.startswith("{")]  # Ray speaks there, too
    found = json.loads(line)
    assert found["status"] == "finished"
    names = [name for name, *_ in found["lived"]]
    assert {"recorder", "world", "world/eu", "world/eu/eu0", "world/eu/eu1", "world/us", "world/us/us1"} <= set(names)
    restarts = 0
    for name, kind, region, number in found["lived"]:
        restarts += number
        if name.startswith(("world/eu", "world/us")):
            assert region == name.split("/")[1], name
        elif name in ("recorder", "world"):
            assert region == "head", name
        elif "TrainWorker" in kind:
            assert region == "eu", "the only client with workers belongs there"
    assert sum("TrainWorker" in kind for _, kind, *_ in found["lived"]) >= 2
    assert restarts >= 2, "those that were killed have come back where they belong"
