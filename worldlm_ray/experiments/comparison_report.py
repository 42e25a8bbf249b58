"""Everything in OUT/report/, from OUT/results.json: tables, plots and one HTML page."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from worldlm_ray.experiments.comparison_numbers import summarize
from worldlm_ray.experiments.comparison_page import page_of
from worldlm_ray.experiments.comparison_plots import plots_of
from worldlm_ray.experiments.comparison_run import folder_of
from worldlm_ray.experiments.comparison_table import COLUMNS, best, cells, markdown
from worldlm_ray.experiments.harness_results import all_rows
from worldlm_ray.experiments.harness_results import cells as task_cells
from worldlm_ray.experiments.verdict import equal_work, verdict


def write(out: Path) -> Path:
    """Write OUT/report/ from OUT/results.json; returns the HTML page."""
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    folder = out / "report"
    folder.mkdir(exist_ok=True)
    rows = summarize(results)
    said = verdict(results["runs"])
    work = equal_work(results["runs"])
    text = "".join(f"* {sentence}\n" for sentence in [*said, work]) + "\n" + markdown(rows)
    (folder / "table.md").write_text(text, encoding="utf-8")
    with (folder / "table.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    plots = plots_of(out)
    for name, (_, draw) in plots.items():
        figure = Figure(figsize=(11, 5), dpi=100, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        draw(figure, results["runs"])
        canvas.print_png(str(folder / f"{name}.png"))
    page = folder / "report.html"
    heads = {name: (quantity.title, quantity.meaning) for name, quantity in COLUMNS.items()}
    body = page_of(
        results.get("about", {}) | {"name": results.get("about", {}).get("name", out.name), "work": work},
        said,
        heads=heads,
        rows=[cells(row) for row in rows],
        best=best(rows),
        plots=[(title, folder / f"{name}.png") for name, (title, _) in plots.items()],
        seeds=sorted({run["seed"] for run in results["runs"]}),
        tasks=[row for run in results["runs"] for row in _tasks(out, run["method"], run["seed"])],
    )
    page.write_text(body, encoding="utf-8")
    return page


def _tasks(out: Path, method: str, seed: int) -> list[list[str]]:
    """What lm-evaluation-harness has said of the models of a run, as cells."""
    found = all_rows(folder_of(out, method, seed))
    return [[method, str(seed), node, *task_cells(row)] for node, rows in found.items() for row in rows]
