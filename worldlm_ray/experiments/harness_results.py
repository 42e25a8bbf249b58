"""What lm-evaluation-harness has said of a run's models: lm_eval.json, and its table.

    RUN/lm_eval.json   {"nodes": {PATH: {"params_sha256": ..., "lm_eval": VERSION, "rows": [...]}}}

A row holds the task, the metric, its value and standard error, and the number of examples. A model that has been
trained since has another fingerprint: its old rows are shown nowhere.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from worldlm_ray.errors import RunError
from worldlm_ray.experiments.evaluate import theta
from worldlm_ray.huggingface.card import TaskResult
from worldlm_ray.plan.plan import Plan
from worldlm_ray.reports.tables import NOTHING
from worldlm_ray.reports.terminal import Column, FittingTable
from worldlm_ray.storage import filesystem
from worldlm_ray.tensors.buffers import params_sha256
from worldlm_ray.tracking.status import replace_json

FILE = "lm_eval.json"


def read(folder: Path, node: str, sha: str | None) -> list[TaskResult]:
    """The rows of a node's model; none of another model of that node, and none where the file cannot be read.

    Args:
        folder: of the run, or of an export.
        node: its path.
        sha: fingerprint of the model's parameters.
    """
    entry = _nodes(folder).get(node)
    return _rows(entry) if isinstance(entry, dict) and entry.get("params_sha256") == sha else []


def all_rows(folder: Path) -> dict[str, list[TaskResult]]:
    """The rows of every node of a run that has ended, by path."""
    return {node: _rows(entry) for node, entry in _nodes(folder).items() if isinstance(entry, dict)}


def of_run(plan: Plan) -> dict[str, list[TaskResult]]:
    """The rows of every node whose model is still the one that was measured."""
    nodes = [path for path in _nodes(plan.run_dir) if path in plan.specs]
    found = {path: read(plan.run_dir, path, params_sha256(theta(plan, plan.specs[path]))) for path in nodes}
    return {path: rows for path, rows in found.items() if rows}


def write(folder: Path, node: str, sha: str | None, rows: Sequence[TaskResult], *, version: str) -> None:
    """Add rows of a node's model to lm_eval.json. Those of the same tasks are replaced, and those of an older model.

    Args:
        folder: of the run, or of an export.
        node: its path.
        sha: fingerprint of the model's parameters.
        rows: results.
        version: of lm-evaluation-harness.

    Raises:
        RunError: the file cannot be written.
    """
    measured = {row.task for row in rows}
    all_rows = [row for row in read(folder, node, sha) if row.task not in measured] + list(rows)
    entry = {"params_sha256": sha, "lm_eval": version, "rows": [asdict(row) for row in all_rows]}
    try:
        replace_json(folder / FILE, {"nodes": {**_nodes(folder), node: entry}})
    except OSError as error:
        why = error.strerror or error
        raise RunError(f"{folder / FILE}: cannot be written ({why}); make it writable and measure again") from error


def rows_of(results: Mapping[str, Any]) -> list[TaskResult]:
    """The numbers of lm-evaluation-harness, by task and metric.

    Args:
        results: what `lm_eval.simple_evaluate` returns. A metric is named `acc,none`: the name and a filter.
    """
    found, counts = [], results.get("n-samples", {})
    for task, values in results["results"].items():
        for name, value in values.items():
            metric, _, chosen = name.partition(",")
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not chosen or metric.endswith("_stderr") or not is_number or not math.isfinite(value):
                continue
            error = values.get(f"{metric}_stderr,{chosen}")
            found.append(
                TaskResult(
                    task=task,
                    metric=metric if chosen == "none" else f"{metric} ({chosen})",
                    value=float(value),
                    stderr=float(error) if isinstance(error, int | float) and math.isfinite(error) else None,
                    n=counts.get(task, {}).get("effective"),
                )
            )
    return found


def table(title: str, found: Mapping[str, Sequence[TaskResult]]) -> FittingTable:
    """The rows as a table for the terminal.

    Args:
        title: of the table.
        found: rows by path of the node.
    """
    columns = [Column("node", is_number=False, rank=1), Column("task", is_number=False)]
    columns += [Column("metric", is_number=False), Column("value"), Column("stderr"), Column("n", rank=1)]
    drawn = FittingTable(title, columns)
    for node, rows in found.items():
        for row in rows:
            drawn.add_row(node, *cells(row))
    return drawn


def cells(row: TaskResult) -> list[str]:
    """Task, metric, value, standard error and number of examples as text."""
    error = NOTHING if row.stderr is None else f"{row.stderr:.4f}"
    return [row.task, row.metric, f"{row.value:.4f}", error, NOTHING if row.n is None else f"{row.n:,}"]


def _nodes(folder: Path) -> dict[str, Any]:
    try:
        with filesystem.refusals(folder):
            found = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    nodes = found.get("nodes") if isinstance(found, dict) else None
    return nodes if isinstance(nodes, dict) else {}


def _rows(entry: Mapping[str, Any]) -> list[TaskResult]:
    rows = [_row(line) for line in entry.get("rows", []) if isinstance(line, dict)]
    return [row for row in rows if row is not None]


def _row(line: Mapping[str, Any]) -> TaskResult | None:
    try:
        return TaskResult(
            task=str(line["task"]),
            metric=str(line["metric"]),
            value=float(line["value"]),
            stderr=None if line["stderr"] is None else float(line["stderr"]),
            n=None if line["n"] is None else int(line["n"]),
        )
    except (KeyError, TypeError, ValueError):
        return None
