"""What machines of a cluster are looked at for, without a cluster."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from support.worlds import write_text

from worldlm_ray.config.schema import DataConfig, ResourcesConfig
from worldlm_ray.errors import Interrupted
from worldlm_ray.launch import preflight
from worldlm_ray.launch.calls import Observer


def test_a_machine_with_too_few_cores_is_a_warning_and_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    marker, text = tmp_path / ".seen", write_text(tmp_path / "a.txt", seed=1)
    marker.write_text("")
    data = DataConfig(files=[str(text)])
    clients = {"world.children[0]": (data, ResourcesConfig(cpus=64)), "world.children[1]": (data, ResourcesConfig())}
    problems, warning = preflight._look(str(marker), clients, version(preflight.PACKAGE))
    assert problems == []
    assert warning.startswith("world.children[0] asks for 64 cores (resources.cpus), this machine has 2")
    problems, warning = preflight._look(str(tmp_path / "absent"), {}, "0.0.0")
    assert len(problems) == 2
    assert warning == ""


class FakeRay:
    """Machines that do not answer."""

    def wait(self, refs: list[str], **_: Any) -> tuple[list[str], list[str]]:
        return refs[:1], refs[1:]


def test_machines_are_waited_for_until_the_time_is_up_or_the_user_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "ray", FakeRay())
    with pytest.raises(Interrupted):
        preflight._wait(["a", "b"], Observer(should_stop=lambda: True))
    monkeypatch.setattr(preflight, "ANSWER_S", 0.0)
    assert preflight._wait(["a", "b"], Observer()) == (["a"], ["b"])
