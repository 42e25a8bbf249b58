"""A run on Ray from Python: its callbacks, the log lines of its processes, and its trackers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.worlds import TINY_MODEL, two_levels

import worldlm_ray as wr
from worldlm_ray.records import AggregationRecord, Record, RoundRecord


@pytest.mark.ray
@pytest.mark.long
def test_a_run_on_ray_from_python(cluster: None, tmp_path: Path) -> None:
    snapshots, records = list[dict[str, Any]](), list[Record]()
    run = wr.train(
        {
            "name": "small",
            "model": TINY_MODEL,
            "training": {"local_steps": 4, "batch_size": 4},
            "evaluation": {"tokens": 64, "final_tokens": 128},
            "data": {"cache_dir": str(tmp_path / "cache")},
            "world": {"children": two_levels(tmp_path)},
        },
        "budget.rounds=2",
        run_dir=tmp_path / "run",
        progress=False,
        on_progress=snapshots.append,
        on_record=records.append,
        logging={"level": "info"},
        tracking={"sinks": ["jsonl", "csv"]},
    )
    assert (run.summary["status"], run.summary["backend"]) == ("finished", "ray")
    assert set(run.nodes) == set(snapshots[-1]["nodes"])
    rounds = {(record.node, record.round) for record in records if isinstance(record, RoundRecord)}
    clients = [path for path in run.nodes if run.summary["nodes"][path]["kind"] == "client"]
    assert rounds == {(path, number) for path in clients for number in (1, 2)}
    assert any(isinstance(record, AggregationRecord) and record.node == "world" for record in records)
    for path in run.nodes:
        lines = (run.folder / "logs" / f"{path}.log").read_text(encoding="utf-8").splitlines()
        assert all(f" INFO {path}: " in line for line in lines), path
        wanted = "RoundRecord" if run.summary["nodes"][path]["kind"] == "client" else "AggregationRecord"
        assert any(wanted in line for line in lines), path
    assert (run.folder / "metrics.csv").read_text(encoding="utf-8").startswith("now_s,tokens,node,name,value\n")
    assert not (run.folder / "tensorboard").exists()
    assert len(run.metrics(node="world", name="loss")) >= 1
    assert run.model("world") is not None
