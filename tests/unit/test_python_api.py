"""The Python interface: the same runs as by the command line, with Python's values."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.compared import KNOWN
from support.worlds import TINY_MODEL, two_levels
from typer.testing import CliRunner

import worldlm_ray as wr
from worldlm_ray import launch
from worldlm_ray.api import comparison
from worldlm_ray.api.settings import as_overrides, configured
from worldlm_ray.cli.main import app
from worldlm_ray.errors import ConfigError, Interrupted, RunError
from worldlm_ray.plan import rundir
from worldlm_ray.plan.plan import make_plan
from worldlm_ray.records import RoundRecord
from worldlm_ray.reports.outcome import Outcome

IMPORT_S = 0.3


@pytest.fixture
def world(tmp_path: Path) -> dict[str, Any]:
    """What a YAML file of a small world holds."""
    return {
        "name": "small",
        "run_dir": str(tmp_path / "run"),
        "model": TINY_MODEL,
        "budget": {"rounds": 2},
        "training": {"local_steps": 2, "batch_size": 2},
        "merge": {"client": 1.0},
        "evaluation": {"tokens": 64, "final_tokens": 128},
        "data": {"cache_dir": str(tmp_path / "cache")},
        "world": {"children": two_levels(tmp_path)},
    }


def test_importing_the_package_is_quick_and_loads_nothing_heavy() -> None:
    code = (
        "import sys, time; before = time.process_time(); import worldlm_ray; "
        "took = time.process_time() - before; "
        "print(took, sorted({'torch', 'ray', 'numpy', 'rich'} & set(sys.modules)), 'train' in dir(worldlm_ray))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    took, rest = done.stdout.split(maxsplit=1)
    assert rest.split() == ["[]", "True"]
    assert float(took) <= IMPORT_S


def test_every_public_name_is_there_and_documented() -> None:
    for name in wr.__all__:
        assert getattr(wr, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = wr.trian  # type: ignore[attr-defined]


def test_a_simulation_gives_its_summary_its_curves_and_its_models(world: dict[str, Any]) -> None:
    records, snapshots = list[Any](), list[dict[str, Any]]()
    run = wr.simulate(
        world, "training.lr=2e-3", seed=3, on_record=records.append, on_progress=snapshots.append, progress=False
    )
    assert (run.summary["status"], run.summary["seed"]) == ("finished", 3)
    assert (run.config["training"]["lr"], run.status["tokens"]) == (2e-3, run.summary["tokens"])
    assert sum(isinstance(record, RoundRecord) for record in records) == 2 * len(run.samples)
    assert snapshots[0]["nodes"].keys() == set(run.nodes)
    losses = run.metrics(node="world", name="loss")
    assert list(losses.columns) == ["now_s", "tokens", "node", "name", "value"]
    assert losses["value"].iloc[-1] == pytest.approx(run.summary["nodes"]["world"]["loss"])
    assert len(run.metrics()) > len(losses)
    inner = next(path for path in run.nodes if path.count("/") == 1)
    model = wr.load(run.folder).model(inner.partition("/")[2])
    assert not model.training
    assert model(torch.zeros((1, 4), dtype=torch.long)).shape[:2] == (1, 4)
    assert len(run.sample(tokens=3, prompt="a")) >= 1
    assert "final" not in repr(run)
    assert "world" in run._repr_html_()
    with pytest.raises(ConfigError, match="there is no node 'mars'"):
        run.model("mars")


def test_metrics_are_a_list_where_pandas_is_not_installed(
    world: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = wr.simulate(world, budget={"rounds": 1}, progress=False)
    monkeypatch.setitem(sys.modules, "pandas", None)
    rows = run.metrics(name="loss")
    assert isinstance(rows, list)
    assert {row["name"] for row in rows} == {"loss"}


def test_a_simulation_in_another_thread_can_be_stopped(world: dict[str, Any]) -> None:
    found = list[wr.Run]()

    def simulate() -> None:
        found.append(wr.simulate(world, should_stop=lambda: True, progress=False))

    thread = threading.Thread(target=simulate)
    thread.start()
    thread.join()
    assert found[0].summary["status"] == "stopped"


def test_keywords_are_the_overrides_of_the_command_line(world: dict[str, Any]) -> None:
    assert as_overrides({"budget": {"tokens": 1e6}, "training.lr": 1e-3, "seed": np.int64(4)}) == [
        "budget.tokens=1000000.0",
        "training.lr=0.001",
        "seed=4",
    ]
    config = configured(
        world, ["name=b"], {"budget": {"tokens": 1e6}, "placement": {"labels": {"a.b/c": "d"}}, "run_dir": None}
    )
    assert (config.name, config.budget.tokens, config.budget.rounds) == ("b", 1_000_000, None)
    assert config.placement.labels == {"a.b/c": "d"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainin": {"lr": 1}}, "trainin"),
        ({"training": {"lr": "quick"}}, r"training\.lr"),
        ({"training": {"lr": object()}}, r"training\.lr: got a object; give a number"),
        ({"seed": float("nan")}, "seed"),
    ],
)
def test_a_wrong_keyword_is_one_error_of_the_package(
    world: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        wr.simulate(world, **settings)
    assert not Path(world["run_dir"]).exists()


def test_runs_that_are_not_there_or_have_not_ended_say_so(world: dict[str, Any]) -> None:
    with pytest.raises(RunError, match="there is no run 'mars'"):
        wr.load("mars")
    plan = rundir.create(make_plan(configured(world)))
    run = wr.load(plan.run_dir)
    with pytest.raises(RunError, match="has not ended"):
        _ = run.summary
    with pytest.raises(RunError, match="there is no run in"):
        _ = run.status
    assert "there is no run in" in run._repr_html_()


def test_training_on_ray_passes_on_its_callbacks_and_its_errors(
    world: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = list[str]()

    def train(plan: Any, *, on_progress: Callable[..., None], should_stop: Callable[[], bool], **more: Any) -> Outcome:
        told.append(f"{plan.config.budget.tokens} tokens")
        if should_stop():
            raise Interrupted("nothing has begun")
        on_progress({"nodes": {}, "run": "run"})
        if more["on_record"] is not None:
            more["on_record"]("a record")
        return Outcome(summary={"warnings": [], "status": "finished"}, samples={"world/a": "words"})

    monkeypatch.setattr(launch, "train", train)
    monkeypatch.setattr("worldlm_ray.reports.progress.Progress.show", lambda _, snapshot: None)
    run = wr.train(world, budget={"tokens": 1e3}, on_progress=lambda shown: told.append(shown["run"]))
    assert (told, run.samples) == (["1000 tokens", "run"], {"world/a": "words"})
    again = wr.resume(run, budget={"tokens": 2e3}, on_record=told.append)
    assert (again.folder, told[-2:]) == (run.folder, ["2000 tokens", "a record"])
    with pytest.raises(Interrupted):
        wr.train(world, run_dir=run.folder.with_name("other"), should_stop=lambda: True)
    assert not run.folder.with_name("other").exists(), "a run that could not begin leaves no folder"


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparisons whose runs are known beforehand."""

    def run_all(config: Any, methods: Any, seeds: Any, *, out: Path, on_done: Callable[..., None], **_: Any) -> None:
        for run in KNOWN:
            on_done(run["method"], run["seed"], 2.0)
        (out / "results.json").write_text(json.dumps({"about": {}, "rows": [], "runs": KNOWN}), encoding="utf-8")

    monkeypatch.setattr(comparison, "run_all", run_all)
    monkeypatch.setattr("worldlm_ray.experiments.comparison_report.write", lambda folder: folder)


@pytest.mark.usefixtures("compared")
def test_a_comparison_gives_a_row_per_method(world: dict[str, Any], tmp_path: Path) -> None:
    done = list[str]()
    found = wr.compare(
        world | {"run_dir": None},
        methods=["local", "worldlm"],
        out=tmp_path / "c",
        on_done=lambda *of: done.append(of[0]),
    )
    assert list(found.table()["method"]) == ["fedavg", "local", "worldlm"]
    assert done == ["fedavg", "local", "worldlm"]
    assert "worldlm" in found._repr_html_()
    assert found.report == tmp_path / "c" / "report" / "report.html"
    with pytest.raises(ConfigError, match="seed: a comparison sets it itself"):
        wr.compare(world, seed=3)


@pytest.mark.usefixtures("compared")
def test_a_comparison_as_json_is_json_alone(world: dict[str, Any], tmp_path: Path) -> None:
    conf = tmp_path / "small.yaml"
    conf.write_text(json.dumps(world | {"run_dir": None}), encoding="utf-8")
    done = CliRunner().invoke(app, ["compare", str(conf), "--out", str(tmp_path / "c"), "--json"])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert [row["method"] for row in facts["methods"]] == ["fedavg", "local", "worldlm"]
    assert facts["verdict"]
