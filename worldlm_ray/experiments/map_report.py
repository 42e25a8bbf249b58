"""The result of a map: a table for the terminal, map.csv, map.md and the figure map.png."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.text import Text

from worldlm_ray.experiments.map_cells import size
from worldlm_ray.experiments.map_run import Result
from worldlm_ray.reports.terminal import Column, FittingTable

TITLE = "When does federating pay?"
COLUMNS = {
    "text": Column("own text"),
    "kinship": Column("kinship"),
    "seeds": Column("seeds", rank=5),
    "local": Column("local", rank=2),
    "federated": Column("worldlm", rank=2),
    "pooled": Column("pooled\n+ft", rank=3),
    "gain": Column("gain"),
    "error": Column("standard\nerror", rank=4),
    "headroom": Column("headroom"),
    "of_headroom": Column("gain of\nheadroom", rank=3),
    "gains": Column("clients\nthat gain", rank=1),
    "worst_vs_local": Column("worst\nclient", rank=2),
    "note": Column("", rank=1, is_number=False),
}
"""Columns of the table."""
MEANING = (
    "own text: bytes of each client to train on; kinship: share of them that is of a source common to all clients. "
    "local, worldlm, pooled+ft: own models on own held-out text, nats per byte. gain = 1 - worldlm / local; "
    "headroom = 1 - pooled+ft / local; worst client: its relative change against local."
)
LEAST_SPAN = 0.01
"""Of the scale of colours on either side of 0: below, noise would look like a result."""

DARK = 0.65
"""Share of the scale from which on a colour wants white ink."""


def cells_of(result: Result) -> dict[str, str]:
    """A row of the table, as text by column."""
    cell, numbers = result.cell, result.numbers
    shown = dict.fromkeys(COLUMNS, "-") | {"text": size(cell.text), "kinship": str(cell.kinship), "note": result.note}
    if numbers is None:
        return shown
    shown["seeds"] = str(len(cell.seeds))
    for name in ("local", "federated", "pooled"):
        shown[name] = f"{numbers[name]:.4f}"
    for name in ("gain", "headroom", "worst_vs_local"):
        if numbers[name] is not None:
            shown[name] = f"{numbers[name]:+.1%}"
    if numbers["error"] is not None:
        shown["error"] = f"{numbers['error']:.1%}"
    if numbers["of_headroom"] is not None:
        shown["of_headroom"] = f"{numbers['of_headroom']:.2f}"
    shown["gains"] = f"{numbers['gains']} of {numbers['clients']}"
    return shown


def table(results: Sequence[Result]) -> FittingTable:
    """The cells for a terminal."""
    found = FittingTable(TITLE, list(COLUMNS.values()), caption=MEANING)
    for result in results:
        found.add_row(*cells_of(result).values())
    return found


def markdown(results: Sequence[Result]) -> str:
    """The cells as a Markdown table, with the figure."""
    heads = [" ".join(column.name.split()) or "note" for column in COLUMNS.values()]
    lines = [f"# {TITLE}\n", f"![{TITLE}](map.png)\n", f"{MEANING}\n"]
    lines += ["| " + " | ".join(heads) + " |", "|" + "---:|" * (len(heads) - 1) + "---|"]
    lines += ["| " + " | ".join(cells_of(result).values()) + " |" for result in results]
    return "\n".join(lines) + "\n"


def write(results: Sequence[Result], out: Path) -> Path:
    """Write map.csv, map.md and map.png into a folder; returns the figure's path."""
    names = [name for name in COLUMNS if name not in ("text", "kinship", "seeds", "note")]
    with (out / "map.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "kinship", "seeds", *names, "note"])
        for result in results:
            numbers = result.numbers or {}
            first = [result.cell.text, float(result.cell.kinship), len(result.cell.seeds) if numbers else 0]
            writer.writerow([*first, *(numbers.get(name) for name in names), result.note])
    (out / "map.md").write_text(markdown(results), encoding="utf-8")
    figure = Figure(figsize=(9, 6), dpi=130, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    draw(figure, results)
    canvas.print_png(str(out / "map.png"))
    return out / "map.png"


# ---- the figure --------------------------------------------------------------------------------------------------


def draw(figure: Figure, results: Sequence[Result]) -> None:
    """Own text from left to right, kinship upwards, the gain as colour, headroom as contour lines."""
    axes = figure.add_subplot()
    texts = sorted({result.cell.text for result in results})
    kinships = sorted({result.cell.kinship for result in results})
    xs, ys = [math.log2(text) for text in texts], [float(kinship) for kinship in kinships]
    rows = {(result.cell.text, result.cell.kinship): result.numbers for result in results}
    gains = _grid(rows, texts, kinships, "gain")
    span = max([LEAST_SPAN, *(abs(value) for row in gains for value in row if math.isfinite(value))])
    left, bottom = edges(xs, around=1.0), edges(ys, around=0.5)
    mesh = axes.pcolormesh(left, bottom, gains, cmap="RdBu", vmin=-span, vmax=span, edgecolors="white", linewidth=1.5)
    bar = figure.colorbar(mesh, ax=axes, format=lambda value, _: f"{value:+.0%}")
    bar.set_label("gain of worldlm over training alone (blue: federating pays)")
    labels = _contours(axes, xs, ys, _grid(rows, texts, kinships, "headroom"))
    for row, kinship in enumerate(kinships):
        for column, text in enumerate(texts):
            corner, far = (left[column], bottom[row]), (left[column + 1], bottom[row + 1])
            if not math.isfinite(gains[row][column]):
                sides = far[0] - corner[0], far[1] - corner[1]
                axes.add_patch(Rectangle(corner, *sides, fill=False, hatch="//", edgecolor="lightgrey"))
            _write(axes, xs[column], ys[row], rows.get((text, kinship)), depth=gains[row][column] / span)
    axes.set_xticks(xs, labels=[size(text) for text in texts])
    axes.set_yticks(ys, labels=[str(kinship) for kinship in kinships])
    axes.set_xlabel("own text of a client to train on (logarithmic)")
    axes.set_ylabel("kinship: share of it from a source common to all clients")
    axes.set_title(f"{TITLE}\nnumbers: gain ± standard error, and headroom H; lines: H", fontsize=11)
    _make_room(figure, axes, labels)


def _grid(rows: dict[Any, Any], texts: Sequence[Any], kinships: Sequence[Any], name: str) -> list[list[float]]:
    """The values of a number, [kinships, texts]; NaN where there is none."""
    found = [[(rows.get((text, kinship)) or {}).get(name) for text in texts] for kinship in kinships]
    return [[math.nan if value is None else float(value) for value in row] for row in found]


def edges(centres: Sequence[float], *, around: float) -> list[float]:
    """Borders of cells with these centres, half-way between them; `around` is the width of an only cell."""
    if len(centres) == 1:
        return [centres[0] - around / 2, centres[0] + around / 2]
    inner = [(low + high) / 2 for low, high in pairwise(centres)]
    return [2 * centres[0] - inner[0], *inner, 2 * centres[-1] - inner[-1]]


def _contours(axes: Axes, xs: Sequence[float], ys: Sequence[float], headroom: Sequence[Sequence[float]]) -> list[Text]:
    """Lines of equal headroom, only where there are enough cells and some difference; returns the lines' labels."""
    known = [value for row in headroom for value in row if math.isfinite(value)]
    if min(len(xs), len(ys)) < 2 or len(known) < 4 or max(known) - min(known) < LEAST_SPAN / 10:
        return []
    lines = axes.contour(xs, ys, headroom, levels=5, colors="black", linewidths=0.9, linestyles="dashed", alpha=0.7)
    return list(axes.clabel(lines, fmt=lambda value: f"H {value:.1%}", fontsize=7))


def _make_room(figure: Figure, axes: Axes, labels: Sequence[Text]) -> None:
    """Take away the labels of lines that lie on the numbers of a cell."""
    figure.draw_without_rendering()
    numbers = [text.get_window_extent() for text in axes.texts if text not in labels]
    for label in labels:
        if any(label.get_window_extent().overlaps(number) for number in numbers):
            label.remove()


def _write(axes: Axes, x: float, y: float, numbers: dict[str, Any] | None, *, depth: float) -> None:
    """The numbers of a cell, in an ink that neither its colour nor a line hides."""
    if numbers is None:
        text, ink = "too little text", "grey"
    elif not math.isfinite(depth):
        text, ink = "diverged", "grey"
    else:
        error = "" if numbers["error"] is None else f" ± {numbers['error']:.1%}"
        room = "" if numbers["headroom"] is None else f"\nH {numbers['headroom']:.1%}"
        text, ink = f"{numbers['gain']:+.1%}{error}{room}", "white" if abs(depth) > DARK else "black"
    halo = withStroke(linewidth=2.0, foreground="black" if ink == "white" else "white", alpha=0.6)
    axes.text(x, y, text, ha="center", va="center", fontsize=9, color=ink, path_effects=[halo])
