"""The example on Ray, as a user runs it: a process of its own, a Ray of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from worlds import run_example


@pytest.mark.ray
@pytest.mark.slow
def test_the_example_on_ray_runs(tmp_path: Path) -> None:
    assert "tensorboard --logdir" in run_example("two_levels_on_ray.py", str(tmp_path / "run"))
    assert (tmp_path / "run" / "summary.json").is_file()
