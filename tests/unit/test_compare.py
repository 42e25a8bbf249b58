"""A comparison from the command line: runs, results, report, continuation."""

from __future__ import annotations

import html
import io
import json
import os
import select
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from worldlm_ray.cli import main as cli
from worldlm_ray.config.schema import BudgetConfig
from worldlm_ray.errors import ConfigError, RunError
from worldlm_ray.experiments import harness_results
from worldlm_ray.experiments.compare import check_overrides, compare, make_folder
from worldlm_ray.experiments.comparison_numbers import summarize
from worldlm_ray.experiments.comparison_page import page_of
from worldlm_ray.experiments.comparison_progress import (
    DONE,
    MEASURING,
    TRAINING,
    WAITING,
    ComparisonProgress,
    RunProgress,
    headline,
)
from worldlm_ray.experiments.comparison_report import write
from worldlm_ray.experiments.comparison_run import folder_of
from worldlm_ray.experiments.comparison_table import COLUMNS
from worldlm_ray.huggingface.card import TaskResult
from worldlm_ray.plan.plan import Plan, make_plan
from worldlm_ray.reports.terminal import Terminal


@pytest.mark.slow
def test_a_comparison_runs_reports_and_continues(tiny: Callable[..., Plan], tmp_path: Path) -> None:
    config = tiny(budget={"rounds": 2}, evaluation={"tokens": 64, "final_tokens": 128, "every_rounds": 1}).config
    out, done, seen = tmp_path / "comparison", [], []
    rows = compare(
        config,
        ["fedavg", "local"],
        [0],
        out=out,
        command="worldlm compare tiny",
        on_done=lambda method, *_: done.append(method),
        on_progress=seen.append,
    )
    assert done == ["fedavg", "local"]
    assert [(run.method, run.seed) for run in seen[0]] == [("fedavg", 0), ("local", 0)]
    assert {run.state for run in seen[-1]} == {DONE}
    assert len(rows) == 2 * 4
    assert {row["steps"] for row in rows} == {2 * config.training.local_steps}
    again = compare(config, ["fedavg", "local", "worldlm"], [0], out=out, command="worldlm compare tiny again")
    assert again[:8] == rows
    page = write(out).read_text(encoding="utf-8")
    assert "lm-evaluation-harness" not in page
    answers = TaskResult(task="rivers", metric="acc", value=0.25, stderr=None, n=8)
    harness_results.write(folder_of(out, "local", 0), "world/a", None, [answers], version="1")
    page = write(out).read_text(encoding="utf-8")
    cells = ["local", "0", "world/a", "rivers", "acc", "0.2500", "–", "8"]  # noqa: RUF001 - as tables show "none"
    assert "".join(f"<td>{cell}</td>" for cell in cells) in page
    assert page.count("data:image/png;base64,") == 9
    assert "http" not in page.replace("http-equiv", "")
    assert (out / "report" / "table.csv").read_text(encoding="utf-8").count("\n") == 4
    steps = 2 * config.training.local_steps
    for said in [
        "<h1>tiny</h1>",
        "Clients&#x27; own models, each on its client&#x27;s held-out text: ",
        f"Every client took {steps} optimizer steps in every method.",
        "2 rounds",
        "<dt>Seeds</dt><dd>0</dd>",
        "UTC  worldlm compare tiny\n",
        "UTC  worldlm compare tiny again",
        f"torch {torch.__version__}",
        "local_steps: ",
        *(html.escape(quantity.meaning) for quantity in COLUMNS.values()),
    ]:
        assert said in page, said
    assert page.index("class='verdict'") < page.index("<table>")
    text = (out / "report" / "table.md").read_text(encoding="utf-8")
    assert text.startswith("* Headroom is not known: it needs the methods local and pooled+ft.\n* Clients' own models")
    table = {row["method"]: row for row in summarize(json.loads((out / "results.json").read_text(encoding="utf-8")))}
    assert table["local"]["worst_vs_local"] == 0.0
    assert table["local"]["flops"] == 6 * make_plan(config).layout.size * table["local"]["tokens"]
    with pytest.raises(RunError, match="another configuration"):
        compare(replace(config, name="other"), ["local"], [0], out=out)


@pytest.mark.slow
def test_a_budget_in_tokens_is_the_same_for_all_methods(tiny: Callable[..., Plan], tmp_path: Path) -> None:
    tokens = 4_000
    settings = {"tokens": 64, "final_tokens": 128, "every_rounds": 1}
    config = tiny(budget={"tokens": tokens}, evaluation=settings).config
    compare(config, ["worldlm", "worldlm+synchronous", "pooled"], [0], out=tmp_path)
    runs = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["runs"]
    round_tokens = config.training.local_steps * config.training.batch_size * make_plan(config).shape.context
    for run in runs:
        assert tokens <= run["tokens"] <= tokens + round_tokens * (4 if run["method"] == "pooled" else 1)
        assert run["world_curve"][-1]["tokens"] > tokens / 2
    assert runs[0]["taken"]
    with pytest.raises(ConfigError, match="budget: in seconds"):
        compare(replace(config, budget=BudgetConfig(seconds=1.0)), ["local"], [0], out=tmp_path)


def test_the_time_left_follows_from_the_work_of_this_process() -> None:
    runs = [
        RunProgress(method="a", seed=0, state=DONE),
        RunProgress(method="b", seed=0, state=TRAINING, trained=0.5),
        RunProgress(method="c", seed=0, state=WAITING),
        RunProgress(method="d", seed=0, state=MEASURING, trained=1.0),
    ]
    # 1 + 0.45 + 0 + 0.9 of 4 runs; one of them was there before. 1.35 took 27 s, 1.65 are left.
    assert headline(runs, before=1.0, elapsed_s=27.0) == "1 of 4 runs, 59%, about 33 s left"
    assert headline(runs[:1], before=0.0, elapsed_s=5.0) == "1 of 1 runs, 100%"
    assert headline(runs[2:3], before=0.0, elapsed_s=5.0) == "0 of 1 runs, 0%"


def test_progress_is_a_line_now_and_then_on_a_pipe() -> None:
    now = [0.0]
    console = Terminal(file=io.StringIO())
    run = RunProgress(method="worldlm", seed=1, state=TRAINING, trained=0.4)
    with ComparisonProgress(console, clock=lambda: now[0]) as progress:
        for now[0] in (1.0, 5.0, 11.0, 12.0):
            progress.show([run])
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines == ["0 of 1 runs, 36%; worldlm, seed 1: 40%"]


def test_the_page_shows_text_as_text() -> None:
    page = page_of(
        {"name": "<b>", "work": "equal", "configuration": "<script>", "commands": ["worldlm compare '<i>'"]},
        ["a < b"],
        heads={"method": ("method", "what")},
        rows=[{"method": "<u>"}],
        best={},
        plots=[],
        seeds=[0, 1],
    )
    for tag in ("<b>", "<script>", "<i>", "<u>"):
        assert tag not in page
    assert "a &lt; b" in page
    assert "<dd>0, 1</dd>" in page


@pytest.mark.parametrize(
    ("change", "option"), [("seed=7", "--seeds"), (" method = local", "--methods"), ("run_dir=q", "--out")]
)
def test_a_change_of_what_a_comparison_sets_itself_is_refused(change: str, option: str) -> None:
    with pytest.raises(ConfigError, match=f"a comparison sets it itself; use {option}"):
        check_overrides(["training.lr=1e-3", change])
    check_overrides(["training.lr=1e-3", "name=other"])
    done = CliRunner().invoke(cli.app, ["compare", "quickstart", change])
    assert isinstance(done.exception, ConfigError)


def test_a_folder_that_cannot_be_made_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/x"), tmp_path / ("a" * 300)):
        with pytest.raises(RunError, match=r"cannot write .*; give another --out"):
            make_folder(folder)


def test_a_folder_of_a_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"--out: .* holds a run; give another folder"):
        make_folder(tmp_path)
    done = CliRunner().invoke(cli.app, ["compare", "quickstart", "--out", str(tmp_path)])
    assert isinstance(done.exception, ConfigError)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


KILLED = """
import os, sys, time
from worldlm_ray.experiments.compare import processes

if __name__ == "__main__":
    with processes(1) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 600).result()
"""


def test_a_comparison_that_is_killed_leaves_no_process_behind(tmp_path: Path) -> None:
    (tmp_path / "killed.py").write_text(KILLED, encoding="utf-8")
    with subprocess.Popen([sys.executable, tmp_path / "killed.py"], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = os.pidfd_open(int(parent.stdout.readline()))
        parent.kill()
    try:
        assert select.select([child], [], [], 30.0)[0], "it has ended"
    finally:
        os.close(child)
