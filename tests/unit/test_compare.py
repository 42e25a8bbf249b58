"""A comparison from the command line: runs, results, report, continuation."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from worldlm_ray.compare import compare
from worldlm_ray.comparison_report import markdown, summarize, write
from worldlm_ray.config import BudgetConfig
from worldlm_ray.errors import ConfigError, RunError
from worldlm_ray.plan import Plan, make_plan


@pytest.mark.slow
def test_a_comparison_runs_reports_and_continues(tiny: Callable[..., Plan], tmp_path: Path) -> None:
    config = tiny(budget={"rounds": 2}, evaluation={"tokens": 64, "final_tokens": 128, "every_rounds": 1}).config
    out, done = tmp_path / "comparison", []
    rows = compare(config, ["fedavg", "local"], [0], out=out, on_done=lambda method, *_: done.append(method))
    assert len(rows) == 2 * 4
    assert {row["steps"] for row in rows} == {2 * config.training.local_steps}
    again = compare(config, ["fedavg", "local", "worldlm"], [0], out=out)
    assert again[:8] == rows
    page = write(out).read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 8
    assert "http" not in page.replace("http-equiv", "")
    assert (out / "report" / "table.csv").read_text(encoding="utf-8").count("\n") == 4
    table = {row["method"]: row for row in summarize(json.loads((out / "results.json").read_text(encoding="utf-8")))}
    assert table["local"]["gap_closed"] == pytest.approx(1.0)
    assert table["fedavg"]["gap_closed"] == pytest.approx(0.0)
    assert table["local"]["worst_vs_local"] == 0.0
    with pytest.raises(RunError, match="another configuration"):
        compare(replace(config, name="other"), ["local"], [0], out=out)


@pytest.mark.slow
def test_a_budget_in_tokens_is_the_same_for_all_methods(tiny: Callable[..., Plan], tmp_path: Path) -> None:
    tokens = 4_000
    settings = {"tokens": 64, "final_tokens": 128, "every_rounds": 1}
    config = tiny(budget={"tokens": tokens}, evaluation=settings).config
    compare(config, ["worldlm", "worldlm+synchronous", "centralized"], [0], out=tmp_path)
    runs = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["runs"]
    round_tokens = config.training.local_steps * config.training.batch_size * make_plan(config).shape.context
    for run in runs:
        assert tokens <= run["tokens"] <= tokens + round_tokens * (4 if run["method"] == "centralized" else 1)
        assert run["world_curve"][-1]["tokens"] > tokens / 2
    assert runs[0]["taken"]
    with pytest.raises(ConfigError, match="budget: in seconds"):
        compare(replace(config, budget=BudgetConfig(seconds=1.0)), ["local"], [0], out=tmp_path)


def test_the_table_of_known_losses() -> None:
    def run(method: str, own: list[float], world: float) -> dict[str, object]:
        clients = [{"client": f"c{i}", "own": loss, "world": world} for i, loss in enumerate(own)]
        level = {"level": 1, "bytes_up": 1000, "bytes_down": 2000}
        curve = [{"virtual_s": 1.0, "tokens": 1, "loss": world + 0.5}, {"virtual_s": 5.0, "tokens": 2, "loss": world}]
        return {
            "method": method,
            "seed": 0,
            "virtual_s": 5.0,
            "clients": clients,
            "levels": [level],
            "world_curve": curve,
        }

    runs = [run("fedavg", [2.5, 2.5], 3.0), run("local", [2.0, 2.0], 4.0), run("worldlm", [1.9, 2.2], 2.9)]
    rows = {row["method"]: row for row in summarize({"runs": runs})}
    # FedAvg is judged by its global model: (3.0 - 2.05) / (3.0 - 2.0)
    assert rows["worldlm"]["gap_closed"] == pytest.approx(0.95)
    assert rows["fedavg"]["gap_closed"] == 0.0
    assert (rows["fedavg"]["sooner"], rows["local"]["sooner"], rows["worldlm"]["sooner"]) == (1.0, None, 1.0)
    assert rows["worldlm"]["worst_vs_local"] == pytest.approx(0.1)
    assert "| worldlm | 2.0500 |" in markdown(list(rows.values()))
