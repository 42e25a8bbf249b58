"""The HTML page of a comparison: one file, with the results on top and the steps to repeat them below."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

TASK_HEADS = ("method", "seed", "node", "task", "metric", "value", "stderr", "n")
STYLE = (
    "body{font:15px/1.45 sans-serif;max-width:1250px;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse;font-variant-numeric:tabular-nums}"
    "td,th{padding:.35em .55em;border-bottom:1px solid #ccc;text-align:right;vertical-align:bottom}"
    "td{white-space:nowrap}td:first-child,th:first-child{text-align:left}td.best{font-weight:bold;background:#e8f3e8}"
    "ul.verdict{font-size:17px;background:#f4f6fa;padding:1em 1em 1em 2.2em;border-left:4px solid #456}"
    "ul.verdict li{margin:.4em 0}dt{font-weight:bold;margin-top:.5em}dd{margin-left:1.5em}"
    "pre{background:#f6f6f6;padding:.8em;white-space:pre-wrap}img{max-width:100%}"
)


def page_of(
    about: Mapping[str, Any],
    verdict: Sequence[str],
    *,
    heads: Mapping[str, tuple[str, str]],
    rows: Sequence[Mapping[str, str]],
    best: Mapping[str, set[str]],
    plots: Sequence[tuple[str, Path]],
    seeds: Sequence[int],
    tasks: Sequence[Sequence[str]] = (),
) -> str:
    """The page.

    Args:
        about: `name`, `work`, and if known `budget`, `configuration`, `commands` and `versions`.
        verdict: sentences.
        heads: title and meaning by column.
        rows: cells by column.
        best: methods with the best value, by column.
        plots: titles and PNG files.
        seeds: of the runs.
        tasks: results of lm-evaluation-harness: cells under `TASK_HEADS`.
    """
    name = escape(str(about["name"]))
    parts = [
        f"<!doctype html><meta charset='utf-8'><title>{name}</title><style>{STYLE}</style><h1>{name}</h1>",
        "<ul class='verdict'>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in verdict) + "</ul>",
        _table(heads, rows, best),
        _tasks(tasks),
        _facts(about, [row["method"] for row in rows], seeds),
        "<h2>What the columns mean</h2><dl>",
        "".join(f"<dt>{escape(title)}</dt><dd>{escape(meaning)}</dd>" for title, meaning in heads.values()),
        "</dl><p>The best value of a column is on green, where one is better than another.</p>",
        "".join(_figure(title, path) for title, path in plots),
        _details(about),
    ]
    return "".join(parts)


def _table(
    heads: Mapping[str, tuple[str, str]], rows: Sequence[Mapping[str, str]], best: Mapping[str, set[str]]
) -> str:
    head = "".join(f"<th title='{escape(meaning)}'>{escape(title)}</th>" for title, meaning in heads.values())
    body = ""
    for row in rows:
        marks = {name: " class='best'" if row["method"] in best.get(name, ()) else "" for name in heads}
        body += "<tr>" + "".join(f"<td{marks[name]}>{escape(row[name])}</td>" for name in heads) + "</tr>"
    return f"<table><tr>{head}</tr>{body}</table>"


def _tasks(rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{title}</th>" for title in TASK_HEADS)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<h2>lm-evaluation-harness</h2><table><tr>{head}</tr>{body}</table>"


def _facts(about: Mapping[str, Any], methods: Sequence[str], seeds: Sequence[int]) -> str:
    """The comparison, its amount of work, and how to repeat it."""
    budget = ", ".join(f"{value:,} {unit}" for unit, value in about.get("budget", {}).items())
    facts = {
        "Equal work": str(about["work"]),
        "Budget": budget,
        "Methods": ", ".join(methods),
        "Seeds": ", ".join(map(str, seeds)),
        "Versions": ", ".join(f"{package} {number}" for package, number in about.get("versions", {}).items()),
    }
    lines = "".join(f"<dt>{title}</dt><dd>{escape(text)}</dd>" for title, text in facts.items() if text)
    commands = "\n".join(about.get("commands", []))
    typed = f"<dt>Commands, with the time at which each began</dt><dd><pre>{escape(commands)}</pre></dd>"
    return f"<h2>What was compared</h2><dl>{lines}{typed if commands else ''}</dl>"


def _figure(title: str, path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f"<h2>{escape(title)}</h2><img alt='{escape(title)}' src='data:image/png;base64,{data}'>"


def _details(about: Mapping[str, Any]) -> str:
    text = about.get("configuration", "")
    if not text:
        return ""
    return f"<h2>Configuration</h2><details open><summary>of all methods</summary><pre>{escape(text)}</pre></details>"
