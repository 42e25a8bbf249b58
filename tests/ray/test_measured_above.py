"""Inner nodes' own models on Ray: measured while the clients train, and kept by a run that is left early."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from worldlm_ray import launch
from worldlm_ray.plan import rundir
from worldlm_ray.plan.plan import Plan
from worldlm_ray.tracking.status import read_status

pytestmark = [pytest.mark.ray, pytest.mark.slow]
Tiny = Callable[..., Plan]


@pytest.mark.long
def test_they_are_measured_during_the_run_and_kept_after_a_stop(cluster: None, tiny: Tiny, tmp_path: Path) -> None:
    training = {"local_steps": 4, "batch_size": 4, "step_delay_s": 0.02}
    plan = tiny(training=training, budget={"rounds": 500})
    plan = rundir.create(replace(plan, config=replace(plan.config, run_dir=str(tmp_path / "run"))))
    inner = {spec.path for spec in plan.root.inner}
    measured: dict[str, dict[str, Any]] = {}

    def look(snapshot: dict[str, Any]) -> None:
        measured.update({path: snapshot["nodes"][path] for path in inner if snapshot["nodes"][path]["loss_version"]})

    summary = launch.train(plan, on_progress=look, should_stop=lambda: set(measured) == inner).summary
    assert summary["status"] == "stopped", "none was measured in 500 rounds"
    for place in (summary, read_status(plan.run_dir)):
        for path in inner:
            node = place["nodes"][path]
            assert measured[path]["loss_version"] <= node["loss_version"] <= node["version"]
            assert node["loss_measured_s"] >= measured[path]["loss_measured_s"]
            assert node["loss"] is not None
            assert node["clients_loss"] is not None
            assert node["loss"] != node["clients_loss"]
