"""The prepared run for a GPU: all of it at toy size, cut off, and its parts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import runner, wheels
from benchmarks.gpu.rows import Rows, read

ROOT = Path(__file__).parents[2]


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", "gpu", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.alone
@pytest.mark.timeout(900)
def test_the_dry_run_measures_every_step(tmp_path: Path) -> None:
    done = run("--dry-run", "--minutes", "14", "--out", str(tmp_path))
    steps = json.loads((tmp_path / "results.json").read_text())["steps"]
    assert {name: step["state"] for name, step in steps.items()} == {s.name: "done" for s in runner.STEPS}, done.stdout
    assert all(step["rows"] for step in steps.values())
    assert done.returncode == 0, done.stdout + done.stderr
    wrong = [row for step in steps.values() for row in step["rows"] if row["must"] and row["met"] is False]
    assert wrong == []


def test_a_run_without_time_says_what_was_cut_off(tmp_path: Path) -> None:
    done = run("--dry-run", "--minutes", "0.12", "--out", str(tmp_path))
    steps = json.loads((tmp_path / "results.json").read_text())["steps"]
    assert (steps["correctness"]["state"], steps["quality"]["state"]) == ("cut off", "no time left")
    assert done.returncode == 1
    assert "*cut off* after 2 s" in (tmp_path / "table.md").read_text()


def test_only_some_steps_and_one_without_its_model(tmp_path: Path) -> None:
    done = run("--minutes", "1", "--only", "adapters", "--out", str(tmp_path))
    steps = json.loads((tmp_path / "results.json").read_text())["steps"]
    assert {name: step["state"] for name, step in steps.items()} == {"adapters": "left out"}, done.stdout
    done = run("--only", "adaptors")
    assert done.returncode == 2
    assert "there is no step 'adaptors'; there are correctness, speed" in done.stderr


def test_rows_outlive_a_process_that_is_cut_off(tmp_path: Path) -> None:
    file = tmp_path / "speed.jsonl"
    rows = Rows(file)
    rows.add("client over bare loop", 0.95, least=0.97)
    rows.add("bits that differ", 0.0, most=0.0, must=True)
    rows.add("speed", 12.0, "tokens/s")
    with file.open("a") as text:
        text.write('{"what": "cut')
    found = read(file)
    assert [row["met"] for row in found] == [False, True, None]
    step = {"state": "failed", "why": "out of memory", "rows": found, "seconds": 1.0}
    shown = runner.table({"facts": {"card": "none"}, "steps": {"speed": step}})
    assert "| speed | client over bare loop | 0.95  | >= 0.97 | **no** |" in shown
    assert "| speed | *failed* out of memory | | | |" in shown


def test_wheels_are_cut_and_joined(tmp_path: Path) -> None:
    files = []
    for name, size in (("large.whl", 250), ("other.whl", 90), ("small.whl", 30)):
        files.append(tmp_path / name)
        files[-1].write_bytes(bytes(number % 251 for number in range(size)))
    parts = wheels.split(files, tmp_path / "parts", part_bytes=100)
    assert all(sum(file.stat().st_size for file in part.iterdir()) <= 100 for part in parts)
    joined = wheels.join(tmp_path / "parts", tmp_path / "whole")
    assert [path.read_bytes() for path in joined] == [path.read_bytes() for path in files]


def test_only_what_such_a_machine_lacks_is_brought() -> None:
    found = wheels.needed(with_ray=False)
    assert {"omegaconf", "opacus", "deepspeed", "rich"} <= found.keys()
    assert not {"torch", "numpy", "ray", "worldlm-ray", "pytest"} & found.keys()
    assert "ray" in wheels.needed(with_ray=True)
    assert "rich" not in wheels.needed(with_ray=False, have=["Rich"])
