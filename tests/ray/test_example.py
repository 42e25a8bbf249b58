"""The example on Ray, as a user runs it: a separate process with its own Ray."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from support.two_clusters import free_port
from support.worlds import run_example

from benchmarks.__main__ import NAMES as BENCHMARKS

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.ray
@pytest.mark.slow
def test_the_example_on_ray_runs(tmp_path: Path) -> None:
    assert "tensorboard --logdir" in run_example("two_levels_on_ray.py", str(tmp_path / "run"))
    assert (tmp_path / "run" / "summary.json").is_file()


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.slow
def test_the_example_that_grows_and_shrinks_runs(tmp_path: Path) -> None:
    options = ["--machines", "1,2", "--seconds", "8", "--run-dir", str(tmp_path / "run")]
    lines = run_example("elastic_scaling.py", *options).splitlines()
    assert lines[-1] == "updates lost or applied twice: 0"
    rows = [words for words in map(str.split, lines) if len(words) == 6 and words[1].isdigit()]
    assert [words[0] for words in rows] == ["1", "2", "1"]
    assert (tmp_path / "run" / "scaling.png").is_file()


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_organisations_join_their_clusters(tmp_path: Path) -> None:
    command = f"{sys.executable} -m worldlm_ray"
    done = subprocess.run(
        ["sh", str(EXAMPLES / "two_organisations.sh"), str(tmp_path)],
        env=os.environ | {"WORLDLM": command, "PORT": str(free_port())},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("nothing was lost and nothing applied twice") == 2
    assert "WRONG" not in done.stdout
    assert "revoked" in done.stdout.rpartition("acme revokes europe")[2]


@pytest.mark.ray
@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_can_be_imported(name: str) -> None:
    """They run for minutes, so that no test runs them; a name that has moved would not be noticed otherwise."""
    assert callable(import_module(f"benchmarks.{name}").run)
