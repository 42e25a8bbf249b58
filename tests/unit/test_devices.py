"""Where a client trains: on the device and with the threads that its settings name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support.worlds import TINY_MODEL, client

from worldlm_ray.client.client import Client
from worldlm_ray.client.shared import VirtualClients
from worldlm_ray.config.loading import from_mapping
from worldlm_ray.config.schema import ResourcesConfig
from worldlm_ray.plan.plan import Plan, make_plan
from worldlm_ray.training.local import device_of, threads_of, too_many_cores
from worldlm_ray.training.making import trainer_of

CORES = 2


@pytest.fixture(autouse=True)
def a_machine_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch says that there is a GPU; using it would fail."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(CORES)))


def plan_of(folder: Path, **settings: Any) -> Plan:
    one = client("a", folder, 1, merge={"client": 1.0}, **settings)
    return make_plan(from_mapping({"model": TINY_MODEL, "budget": {"rounds": 1}, "world": {"children": [one]}}))


def test_without_gpus_in_the_settings_a_client_trains_on_the_cpu(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    assert Client(plan, plan.root.clients[0]).trainer.device.type == "cpu"  # type: ignore[attr-defined]
    assert VirtualClients(plan, plan.root.clients).shared.trainer.device.type == "cpu"  # type: ignore[attr-defined]


def test_a_private_client_does_too(tmp_path: Path) -> None:
    privacy = {"unit": "record", "noise_multiplier": 1.0}
    plan = plan_of(tmp_path, privacy=privacy, data={"files": [str(tmp_path / "a.txt")], "cache_dir": str(tmp_path)})
    made = trainer_of(plan.shape, plan.layout, plan.root.clients[0].settings, noise=1.0)
    assert made.device.type == "cpu"  # type: ignore[attr-defined]


def test_only_a_setting_above_zero_takes_a_gpu() -> None:
    assert device_of(ResourcesConfig(gpus=0.0)) == "cpu"
    assert device_of(ResourcesConfig(gpus=0.5)) is None


def test_there_are_no_more_threads_than_cores() -> None:
    assert [threads_of(ResourcesConfig(cpus=cpus)) for cpus in (1, 2, 3, 64)] == [1, 2, 2, 2]


def test_more_cores_than_there_are_get_one_line() -> None:
    few, many = ResourcesConfig(cpus=2), ResourcesConfig(cpus=64)
    assert too_many_cores({"world/a": few, "world/b": few}) == ""
    one = too_many_cores({"world/a": few, "world/b": many})
    assert one == "world/b asks for 64 cores (resources.cpus), this machine has 2: so many threads are used"
    assert too_many_cores({"world/a": many, "world/b": many}).startswith("world/a and 1 more clients ask for 64 cores")
