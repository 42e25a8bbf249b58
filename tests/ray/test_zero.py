"""Clients with workers in a living world: what they train, and what their deaths cost."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.worlds import client

from worldlm_ray import launch
from worldlm_ray.errors import RunError
from worldlm_ray.plan import rundir
from worldlm_ray.plan.plan import Plan
from worldlm_ray.reports import spending
from worldlm_ray.simulation.simulator import simulate
from worldlm_ray.tracking import audit

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]
Tiny = Callable[..., Plan]
TWO: dict[str, Any] = {"resources": {"workers": 2}}


def in_folder(plan: Plan, folder: Path) -> Plan:
    return rundir.create(replace(plan, config=replace(plan.config, run_dir=str(folder))))


def workers_of(name: str) -> list[int]:
    """Process ids of a client's workers: Ray Train names their folder after the client."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command, folder = (process / "cmdline").read_bytes(), os.readlink(process / "cwd")
        except OSError:
            continue
        if command.startswith(b"ray::RayTrainWorker") and Path(folder).name.startswith(f"{name}-"):
            found.append(int(process.name))
    return found


class KillWorker:
    """A progress callback that kills one of a client's workers, once the client has done so many steps."""

    def __init__(self, path: str, *, at_steps: int) -> None:
        self.path, self.at_steps = path, at_steps
        self.killed_at_s = 0.0

    def __call__(self, snapshot: dict[str, Any]) -> None:
        if self.killed_at_s or snapshot["nodes"][self.path]["steps"] < self.at_steps:
            return
        time.sleep(0.7)  # into the middle of the next round
        os.kill(workers_of(self.path.rsplit("/", 1)[-1])[0], signal.SIGKILL)
        self.killed_at_s = snapshot["now_s"] + 0.7


@pytest.mark.long
def test_stages_2_and_3_beside_a_plain_client_outlive_a_killed_worker(
    cluster: None, tiny: Tiny, tmp_path: Path
) -> None:
    slow = {"local_steps": 4, "batch_size": 4, "step_delay_s": 0.5}
    children = [
        client("plain", tmp_path, 1, training={"step_delay_s": 1.2}),
        client("two", tmp_path, 2, training={"zero_stage": 2}, **TWO),
        client("three", tmp_path, 3, training={"zero_stage": 3}, **TWO),
    ]
    plan = in_folder(tiny(children, budget={"rounds": 8}, training=slow), tmp_path / "run")
    kill = KillWorker("world/two", at_steps=8)
    summary = launch.train(plan, on_progress=kill).summary
    assert kill.killed_at_s, "the world ended before the worker could be killed"
    for path, node in summary["nodes"].items():
        if path != "world":
            assert node["steps"] == 32, path
            assert node["accepted"] == 8, path
            assert node["loss"] < node["loss_start"], path
    lines = list(audit.read(plan.run_dir))
    back_at_s = min(x["now_s"] for x in lines if x["sender"] == "two" and x["now_s"] > kill.killed_at_s)
    meanwhile = [x["sender"] for x in lines if kill.killed_at_s < x["now_s"] < back_at_s]
    # One that waited for its sibling would be heard once at most: with the round that it was in.
    assert max(meanwhile.count("plain"), meanwhile.count("three")) >= 2, f"others waited: {meanwhile}"
    assert sorted(x["seq"] for x in lines if x["sender"] == "two") == list(range(1, 9))


@pytest.mark.long
def test_a_client_whose_worker_was_killed_ends_with_the_same_bits(cluster: None, tiny: Tiny, tmp_path: Path) -> None:
    children = [client("sharded", tmp_path, 1, training={"zero_stage": 1, "step_delay_s": 0.3}, **TWO)]
    plan = tiny(children, budget={"rounds": 4}, checkpoint={"every_s": 0.0})
    undisturbed = launch.train(in_folder(plan, tmp_path / "undisturbed")).summary
    kill = KillWorker("world/sharded", at_steps=8)
    disturbed = launch.train(in_folder(plan, tmp_path / "disturbed"), on_progress=kill).summary
    assert kill.killed_at_s
    assert disturbed["params_sha256"] == undisturbed["params_sha256"]
    # In simulation the client is a plain one: the same to rounding.
    simulated = simulate(in_folder(plan, tmp_path / "simulated")).summary
    for path, node in simulated["nodes"].items():
        assert undisturbed["nodes"][path]["loss"] == pytest.approx(node["loss"], abs=1e-4)


@pytest.mark.long
def test_private_clients_of_every_kind_pay_for_what_they_send(cluster: None, tiny: Tiny, tmp_path: Path) -> None:
    record = {"unit": "record", "noise_multiplier": 1.0}
    children = [
        client("sharded", tmp_path, 1, privacy=record, training={"zero_stage": 2}, **TWO),
        client("single", tmp_path, 2, privacy=record),
        {
            "federation": "guild",
            "privacy": {"unit": "client", "noise_multiplier": 1.0, "max_updates": 2},
            "children": [client("member", tmp_path, 3)],
        },
    ]
    plan = in_folder(tiny(children, budget={"rounds": 3}), tmp_path / "run")
    summary = launch.train(plan).summary
    paid = {row.nodes[0]: row.charges for row in spending.statements(plan)}
    assert paid == {"world/sharded": 3, "world/single": 3, "world/guild/member": 2}
    assert spending.unpaid(plan) == []
    for path, node in summary["nodes"].items():
        assert node["loss"] is None, path
        if path in paid:
            assert node["epsilon"] > 0.0


def test_more_workers_than_the_cluster_can_hold_are_refused(cluster: None, tiny: Tiny, tmp_path: Path) -> None:
    crowd = client("crowd", tmp_path, 1, resources={"workers": 32}, training={"batch_size": 32})
    with pytest.raises(RunError, match=r"world.children\[0\].resources: wants 32 workers with 1 core each.*hold 16"):
        launch.train(in_folder(tiny([crowd]), tmp_path / "run"))


def test_what_deepspeed_itself_refuses_ends_the_run_in_one_line(cluster: None, tiny: Tiny, tmp_path: Path) -> None:
    wrong = {"zero_stage": 1, "deepspeed": {"zero_optimization": {"reduce_bucket_siz": 1}}}
    plan = tiny([client("wrong", tmp_path, 1, training=wrong, **TWO)])
    with pytest.raises(RunError, match=r"workers of world/wrong cannot start: .*reduce_bucket_siz") as caught:
        launch.train(in_folder(plan, tmp_path / "run"))
    assert "\n" not in str(caught.value)
