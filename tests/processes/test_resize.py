"""A client with workers takes what the others leave, and more when a machine is added; nothing is lost by that."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import resized

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.alone, pytest.mark.timeout(600)]


def test_a_range_of_workers_leaves_the_others_their_cores_and_grows_with_the_cluster(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "support.resized", str(tmp_path)],
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["error"] == ""
    assert found["resized_s"] is not None, "it went on with one worker"
    assert 8 <= found["steps_before"] < resized.ROUNDS * 4
    assert found["steps"] == {"world/elastic": resized.ROUNDS * 4, "world/plain": resized.ROUNDS * 4}
    assert found["seqs"] == list(range(1, resized.ROUNDS + 1)), "every round once"
    assert found["holds"]
