"""The table of methods: its columns and what they mean, as text, as Markdown and for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.text import Text

from worldlm_ray.experiments.comparison_numbers import is_federated, is_pooled
from worldlm_ray.reports.tables import amount
from worldlm_ray.reports.terminal import Column, FittingTable


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """A column of the table of methods."""

    title: str
    short: str
    """Its heading in a terminal."""
    meaning: str
    better: Literal["low", "high", ""] = ""
    """Which value is marked as the best one; none if empty."""
    rank: int = 0
    """A terminal that is too narrow hides columns of the highest rank first."""


COLUMNS = {
    "method": Quantity(
        title="method",
        short="method",
        meaning="A configuration of the same code (experiments/methods.py); a variant stands after a plus sign.",
    ),
    "own": Quantity(
        title="own model, own text (nats/byte)",
        short="own\nnats/byte",
        meaning="Held-out loss of each client's own model on its own text: mean over clients, then over seeds.",
        better="low",
    ),
    "difference": Quantity(
        title="own minus local, paired by seed",
        short="own minus\nlocal",
        meaning="Mean over the seeds of the difference to training alone with the same seed, and its standard error, "
        "which is not known with one seed.",
        rank=2,
    ),
    "gain": Quantity(
        title="gain over local",
        short="gain",
        meaning="1 - own loss / that of training alone, stopped early (local).",
        better="high",
    ),
    "of_headroom": Quantity(
        title="gain / headroom",
        short="gain\n/ H",
        meaning="The gain as a share of the headroom H, which is the gain of pooled+ft: one model of all texts in one "
        "place, fine-tuned by every client. Not defined where that is no better than training alone.",
        better="high",
        rank=1,
    ),
    "world": Quantity(
        title="world's model, all texts (nats/byte)",
        short="world\nnats/byte",
        meaning="Held-out loss of the world's model on every client's text: mean over clients and seeds.",
        better="low",
    ),
    "gains": Quantity(
        title="clients that gain",
        short="clients\nthat gain",
        meaning="Clients whose own loss, in the mean over seeds, is below that of training alone (the method local).",
        better="high",
    ),
    "worst_vs_local": Quantity(
        title="worst client against local",
        short="worst\nclient",
        meaning="Relative change of the own loss against local of the client that does worst; above zero it loses.",
        better="low",
    ),
    "tail": Quantity(
        title="10th percentile of clients against local",
        short="10th\npercentile",
        meaning="The same of the client at the 10th percentile: nine of ten clients do better.",
        better="low",
        rank=3,
    ),
    "tokens": Quantity(
        title="tokens",
        short="tokens",
        meaning="Trained by all clients, in all stages: mean over seeds.",
        rank=5,
    ),
    "flops": Quantity(
        title="FLOPs of training",
        short="FLOPs",
        meaning="6 x parameters x tokens, and twice that of a client that may train two models with each token "
        "(merge.client: validated or apart). Measuring and aggregation are left out.",
        rank=6,
    ),
    "bytes_up": Quantity(
        title="bytes up", short="up", meaning="Sent towards the world over all edges, mean over seeds.", rank=7
    ),
    "bytes_down": Quantity(
        title="bytes down", short="down", meaning="Taken from parents over all edges, mean over seeds.", rank=9
    ),
    "virtual_s": Quantity(
        title="virtual time (s)",
        short="time\n(s)",
        meaning="Length of the simulated run, mean over seeds: the machines and links are those of the configuration.",
        rank=4,
    ),
    "sooner": Quantity(
        title="as good as synchronous, times sooner",
        short="times\nsooner",
        meaning="How many times earlier, in virtual time, the world's model is as good as the synchronous method's at "
        "its end (worldlm+synchronous where it was run, else fedavg).",
        better="high",
        rank=8,
    ),
}
_OF_THE_FEDERATION = ("gain", "of_headroom", "gains", "worst_vs_local", "tail")
"""Columns whose best value is that of a federation: neither training alone nor pooled text is one."""


def cell(name: str, value: Any) -> str:
    """A value as text for the tables."""
    if value is None:
        return "-"
    if name in ("own", "world"):
        return f"{value:.4f}"
    if name in ("sooner", "of_headroom"):
        return f"{value:.2f}"
    if name in ("worst_vs_local", "tail", "gain"):
        return f"{value:+.1%}"
    if name.startswith("bytes"):
        return f"{amount(value)}B"
    if name in ("tokens", "flops"):
        return amount(value)
    return f"{value:.0f}" if isinstance(value, float) else str(value)


def best(rows: Sequence[dict[str, Any]]) -> dict[str, set[str]]:
    """The methods with the best value, by column: several if the table shows equal values. Pooled text has no part."""
    found: dict[str, set[str]] = {}
    for name, quantity in COLUMNS.items():
        values = {row["method"]: row[name] for row in rows if quantity.better and _is_number(row[name])}
        left_out = {m for m in values if is_pooled(m) or (name in _OF_THE_FEDERATION and not is_federated(m))}
        values = {method: value for method, value in values.items() if method not in left_out}
        if len(values) > 1:
            top = min(values.values()) if quantity.better == "low" else max(values.values())
            found[name] = {method for method, value in values.items() if cell(name, value) == cell(name, top)}
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and value == value


def cells(row: dict[str, Any]) -> dict[str, str]:
    """A row as text for the tables, by column."""
    shown = {name: cell(name, row[name]) for name in COLUMNS} | {"gains": "-", "difference": "-"}
    if row["difference"] is not None:
        error = "" if row["error"] is None else f" ± {row['error']:.4f}"
        shown["difference"] = f"{row['difference']:+.4f}{error}"
    if row["gains"] is not None and row["method"] != "local":
        shown["gains"] = f"{row['gains']} of {row['clients']}"
    return shown


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table; the best values are bold."""
    titles, marks = [quantity.title for quantity in COLUMNS.values()], best(rows)
    lines = ["| " + " | ".join(titles) + " |", "|---" + "|---:" * (len(COLUMNS) - 1) + "|"]
    for row in rows:
        bold = [f"**{text}**" if row["method"] in marks.get(name, ()) else text for name, text in cells(row).items()]
        lines.append("| " + " | ".join(bold) + " |")
    return "\n".join(lines) + "\n"


def table(rows: Sequence[dict[str, Any]]) -> FittingTable:
    """The rows for a terminal. The best values have a star."""
    columns = [Column(each.short, rank=each.rank, is_number=name != "method") for name, each in COLUMNS.items()]
    marks = best(rows)
    caption = "* best; own: each client's model on its own text; gains and worst client: against training alone (local)"
    found = FittingTable("", columns, caption=caption if marks else "")
    for row in rows:
        line = []
        for name, text in cells(row).items():
            is_best = row["method"] in marks.get(name, ())
            line.append(Text(f"{text}*" if is_best else text, style="bold" if is_best else ""))
        found.add_row(*line)
    return found
