"""A run on Ray whose wall clocks are set while it goes on, or differ from machine to machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.worlds import client, crowd

from worldlm_ray import launch
from worldlm_ray.launch import create as creating
from worldlm_ray.plan import rundir
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.rundir import STATUS
from worldlm_ray.plan.tree import NodeSpec
from worldlm_ray.tracking import audit, curves

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long]
WALL = """
import os, time
wall, steps = time.time, os.environ["WALL_STEPS"]
def stepped():
    try:
        with open(steps) as file:
            return wall() + float(file.read())
    except (OSError, ValueError):  # not yet written
        return wall()
time.time = stepped
"""
ELSEWHERE = """
import os, pathlib, socket, time
pathlib.Path(os.environ["BEGAN"]).touch()
wall, monotonic = time.time, time.monotonic
time.time = lambda: wall() + 60.0
time.monotonic = lambda: monotonic() + 5_000.0
socket.gethostname = lambda: "elsewhere"
"""


def customized(folder: Path, text: str) -> str:
    """A folder that, on PYTHONPATH, changes how Python begins."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(text)
    return str(folder)


def status(run_dir: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((run_dir / STATUS).read_text())
    except (OSError, ValueError):
        return {"accepted": 0}
    return found


@pytest.mark.timeout(300)
def test_wall_clocks_that_are_set_neither_end_a_run_nor_break_it(tiny: Callable[..., Plan], tmp_path: Path) -> None:
    slow = {"local_steps": 4, "batch_size": 4, "step_delay_s": 0.05}
    children = [client(name, tmp_path, seed) for seed, name in enumerate("ab")]
    plan = tiny(children, budget={"rounds": None, "seconds": 10.0}, training=slow)
    rundir.create(plan)
    steps = tmp_path / "steps"
    changes = {"WALL_STEPS": str(steps), "PYTHONPATH": customized(tmp_path / "site", WALL)}
    command = [sys.executable, "-m", "worldlm_ray", "train", "--resume", str(plan.run_dir)]
    with subprocess.Popen(
        command, env=os.environ | changes, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        quiet = threading.Event()
        todo = [(2, "-3600"), (6, "3600"), (10, "0")]
        while todo and process.poll() is None:
            quiet.wait(0.1)
            if status(plan.run_dir)["accepted"] >= todo[0][0]:
                steps.write_text(todo.pop(0)[1])
        said, _ = process.communicate()
    assert process.returncode == 0, said
    assert not todo, "the run ended before its clocks were set"
    summary = json.loads((plan.run_dir / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert 10.0 <= summary["wall_s"] <= 240.0
    assert all(0.0 <= node["busy_fraction"] <= 1.0 for node in summary["nodes"].values())
    assert all(summary["nodes"][f"world/{name}"]["tokens"] > 0 for name in "ab")
    proofs = audit.proofs(plan.run_dir)
    assert len(proofs) == 2
    assert all(proof.holds for proof in proofs)
    times = [line["now_s"] for line in audit.read(plan.run_dir)]
    assert times == sorted(times)
    assert times[0] >= 0.0
    assert times[-1] <= summary["wall_s"]


def test_nodes_on_a_machine_with_another_clock_tell_the_same_time(
    cluster: None, tiny: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = tmp_path / "began"
    elsewhere = {"env_vars": {"BEGAN": str(began), "PYTHONPATH": customized(tmp_path / "site", ELSEWHERE)}}
    options = creating.options_of

    def placed(spec: NodeSpec) -> dict[str, Any]:
        return options(spec) | ({"runtime_env": elsewhere} if "abroad" in spec.path else {})

    monkeypatch.setattr(creating, "options_of", placed)
    # One of each kind of actor: a client, a federation, and clients that share a process.
    phones = {
        "federation": "abroad",
        "resources": {"clients_per_process": 2},
        "children": [crowd("phone", tmp_path, copies=2)],
    }
    children = [client("near", tmp_path, 2), client("abroad-too", tmp_path, 3), phones]
    plan = tiny(children, budget={"rounds": 4})
    plan = rundir.create(replace(plan, config=replace(plan.config, run_dir=str(tmp_path / "run"))))
    launch.train(plan)
    assert began.exists(), "all had the clock of this machine"
    pushed = [line for line in curves.read(plan.run_dir) if line["name"] == "bytes_up"]
    for path in set(plan.kinds) - {"world"}:
        parent, _, name = path.rpartition("/")
        told = [line["now_s"] for line in pushed if line["node"] == path]  # by the child's clock
        edge = [line for line in audit.read(plan.run_dir) if (line["node"], line["sender"]) == (parent, name)]
        heard = [line["now_s"] for line in edge]  # by its parent's
        assert told
        assert len(told) == len(heard)
        # An update arrives at once, but the machine may be busy.
        assert min(abs(there - here) for there, here in zip(told, heard, strict=True)) < 1.0, path
