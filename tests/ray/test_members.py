"""Clients that join and leave while a world trains; a driver that dies and one that finds the run again."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import ray
from support.worlds import client, write_text

from worldlm_ray import launch
from worldlm_ray.config.loading import save
from worldlm_ray.errors import ConfigError, DataError, RunError
from worldlm_ray.plan import living, membership, rundir
from worldlm_ray.plan.plan import Plan
from worldlm_ray.tracking import audit
from worldlm_ray.tracking.audit import proofs
from worldlm_ray.tracking.status import read_status

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long]
Tiny = Callable[..., Plan]
ROUNDS = 24
"""Of about a second each: a client that joins in the middle has time to start before the others have ended."""


class Background:
    """A run on a separate thread."""

    def __init__(self, tiny: Tiny, folder: Path, children: Any = None, **changes: Any) -> None:
        settings: dict[str, Any] = {
            "budget": {"rounds": ROUNDS},
            "training": {"local_steps": 4, "batch_size": 4, "step_delay_s": 0.25},
            "liveness": {"heartbeat_s": 0.5},
        }
        plan = tiny(children, **(settings | changes))
        self.plan = rundir.create(replace(plan, config=replace(plan.config, run_dir=str(folder))))
        self.snapshot: dict[str, Any] = {"nodes": {}}
        self.summary: dict[str, Any] = {}
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.summary = launch.train(self.plan, on_progress=self._look).summary
        except Exception as error:  # noqa: BLE001
            self.error = error

    def _look(self, snapshot: dict[str, Any]) -> None:
        self.snapshot = snapshot

    def wait_for(self, path: str, accepted: int) -> None:
        until = time.monotonic() + 60.0
        while self.snapshot["nodes"].get(path, {}).get("accepted", 0) < accepted:
            assert time.monotonic() < until, self.snapshot["nodes"].get(path)
            assert self.thread.is_alive(), self.error
            time.sleep(0.1)

    def end(self) -> dict[str, Any]:
        self.thread.join(timeout=120.0)
        assert self.error is None, self.error
        assert not self.thread.is_alive()
        return self.summary


SHARED = pytest.mark.parametrize("shared", [1, 3], ids=["a process each", "in pools"])
"""How many clients a process may have."""


def pools(plan: Plan) -> dict[str, list[str]]:
    """Names of the clients in each pool of a living run, by its first client."""
    found = (living.recall(plan.run_dir) or {})["pools"]
    return {name.rpartition("@")[2]: [path.rpartition("/")[2] for path in paths] for name, paths in found.items()}


@SHARED
def test_a_client_joins_and_another_leaves(cluster: None, tiny: Tiny, tmp_path: Path, shared: int) -> None:
    run = Background(tiny, tmp_path / "run", resources={"clients_per_process": shared})
    run.wait_for("world/north/a", 2)
    text = write_text(tmp_path / "new.txt", seed=9)
    with pytest.raises(ConfigError, match="has a child 'a' already"):
        membership.with_client(run.plan, "world/north", "a", files=[str(text)], overrides=[])
    empty = tmp_path / "short.txt"
    empty.write_text("too short", encoding="utf-8")
    broken = membership.with_client(run.plan, "world/north", "broken", files=[str(empty)], overrides=[])
    with pytest.raises(DataError):
        launch.join(run.plan, broken, "world/north/broken")
    larger = membership.with_client(run.plan, "world/north", "new", files=[str(text)], overrides=[])
    launch.join(run.plan, larger, "world/north/new")
    assert run.snapshot["nodes"]["world/north/a"]["state"] == "training", "it was heard while others trained"
    assert pools(run.plan) == ({} if shared == 1 else {"a": ["a", "b", "new"], "c": ["c", "d"]})
    smaller = membership.without(larger, "world/south/c")
    launch.leave(larger, smaller, "world/south/c")
    assert pools(run.plan) == ({} if shared == 1 else {"a": ["a", "b", "new"], "c": ["d"]})
    summary = run.end()
    assert summary["status"] == "finished"
    nodes = summary["nodes"]
    assert nodes["world/north/new"]["steps"] == ROUNDS * 4
    assert nodes["world/south/c"]["steps"] < ROUNDS * 4
    assert nodes["world/south/d"]["steps"] == ROUNDS * 4
    assert all(proof.holds for proof in proofs(run.plan.run_dir))
    again = rundir.reopen(str(run.plan.run_dir))
    assert "world/north/new" in again.kinds
    assert "world/south/c" not in again.kinds
    with pytest.raises(RunError, match="is not running"):
        launch.join(again, again, "world/north/new")


@SHARED
def test_a_federation_is_filled_as_places_become_free(cluster: None, tiny: Tiny, tmp_path: Path, shared: int) -> None:
    names = ["a", "b", "c"]
    children = [
        {
            "federation": "north",
            "min_clients": 1,
            "max_clients": 2,
            "children": [client(name, tmp_path, number) for number, name in enumerate(names)],
        },
        client("d", tmp_path, 7),
    ]
    run = Background(tiny, tmp_path / "run", children, resources={"clients_per_process": shared})
    run.wait_for("world/north/a", 2)
    assert run.snapshot["nodes"]["world/north/c"]["state"] == "waiting"
    launch.leave(run.plan, membership.without(run.plan, "world/north/a"), "world/north/a")
    summary = run.end()
    assert summary["nodes"]["world/north/c"]["steps"] == ROUNDS * 4, "it took the place of the one that left"


@SHARED
def test_clients_come_and_go_by_the_fault_script(cluster: None, tiny: Tiny, tmp_path: Path, shared: int) -> None:
    faults = ["20s leave world/north/a", "15s join world/south/d", "24s join world/north/a", "900s join world/south/c"]
    run = Background(tiny, tmp_path / "run", faults=faults, resources={"clients_per_process": shared})
    summary = run.end()
    assert summary["status"] == "finished"
    nodes = summary["nodes"]
    for path in ("world/north/a", "world/north/b", "world/south/d"):
        assert nodes[path]["steps"] == nodes[path]["accepted"] * 4 == ROUNDS * 4, path
    assert nodes["world/south/c"]["steps"] == 0, "a client that comes too late blocks nothing"
    assert all(proof.holds for proof in proofs(run.plan.run_dir))
    lines = [line for line in audit.read(run.plan.run_dir) if line.get("verdict")]
    heard = {name: [line["now_s"] for line in lines if line["sender"] == name] for name in "ad"}
    assert min(heard["d"]) > 15.0
    assert max(b - a for a, b in pairwise(heard["a"])) > 2.0, "it was away"


def test_a_federation_with_fewer_places_than_clients_ends(cluster: None, tiny: Tiny, tmp_path: Path) -> None:
    names = ["a", "b", "c"]
    children = [client(name, tmp_path, number) for number, name in enumerate(names)]
    north = {"federation": "north", "max_clients": 2, "children": children}
    summary = Background(tiny, tmp_path / "run", [north], budget={"rounds": 3}).end()
    assert [summary["nodes"][f"world/north/{name}"]["steps"] for name in names] == [12, 12, 0]


def test_a_run_begins_without_clients_for_whom_there_is_no_room(cluster: None, tiny: Tiny, tmp_path: Path) -> None:
    children = [
        {
            "federation": "north",
            "min_clients": 1,
            "children": [
                client("a", tmp_path, 1),
                client("giant", tmp_path, 2, resources={"cpus": 1_000}),
            ],
        }
    ]
    run = Background(tiny, tmp_path / "run", children, budget={"rounds": 3})
    summary = run.end()
    assert summary["nodes"]["world/north/a"]["steps"] == 3 * 4
    assert summary["nodes"]["world/north/giant"]["steps"] == 0


def test_a_run_outlives_the_process_that_started_it(cluster: None, tiny: Tiny, tmp_path: Path) -> None:
    address = ray.get_runtime_context().gcs_address
    training = {"local_steps": 4, "batch_size": 4, "step_delay_s": 0.25}
    plan = tiny(budget={"rounds": 25}, training=training)
    conf, run = tmp_path / "conf.yaml", tmp_path / "driven"
    save(replace(plan.config, run_dir=str(run)), conf)
    command = [sys.executable, "-m", "worldlm_ray", "train"]
    with (tmp_path / "log").open("w", encoding="utf-8") as log:
        driver = subprocess.Popen([*command, str(conf), "--address", address], stdout=log, stderr=log)
        wait_for_accepted(run, 4)
        driver.kill()
        driver.wait()
    accepted = read_status(run)["accepted"]
    wait_for_accepted(run, accepted + 4)
    done = subprocess.run(
        [*command, "--resume", str(run), "--address", address], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "the run lives: watching it" in done.stdout
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert {summary["nodes"][spec.path]["steps"] for spec in plan.root.clients} == {25 * 4}
    assert all(proof.again == 0 for proof in proofs(run)), "no node was restarted"


def wait_for_accepted(run: Path, number: int) -> None:
    until = time.monotonic() + 90.0
    while True:
        with suppress(RunError):
            if read_status(run)["accepted"] >= number:
                return
        assert time.monotonic() < until
        time.sleep(0.2)
