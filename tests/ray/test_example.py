"""The example on Ray, as a user runs it: a process of its own, a Ray of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.ray
@pytest.mark.slow
def test_the_example_on_ray_runs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "examples/two_levels_on_ray.py", str(tmp_path / "run")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "tensorboard --logdir" in done.stdout
    assert (tmp_path / "run" / "summary.json").is_file()
