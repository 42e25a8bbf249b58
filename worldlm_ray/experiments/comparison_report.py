"""Tables and plots of a comparison: everything in OUT/report/ from OUT/results.json.

    gap closed = (L_fedavg - L_method) / (L_fedavg - L_local)

FedAvg is judged by its global model, every other method by its clients' own models, each on the client's text.

`sooner` says how many times earlier, in virtual time, the world's model is as good as the final one of the synchronous
method. That is worldlm+synchronous if it was run, else fedavg.
"""

from __future__ import annotations

import csv
import json
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.text import Text

from worldlm_ray.exchange.replies import ACCEPTED
from worldlm_ray.experiments.comparison_page import page_of
from worldlm_ray.experiments.verdict import against_local, by_method, client_means, equal_work, verdict
from worldlm_ray.reports.tables import amount
from worldlm_ray.reports.terminal import Column, FittingTable
from worldlm_ray.tracking import audit


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
    "spread": Quantity(
        title="spread over seeds",
        short="over\nseeds",
        meaning="Largest minus smallest of these means over the seeds; not known with one seed.",
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
    "gap_closed": Quantity(
        title="gap closed",
        short="gap\nclosed",
        meaning="How far the own loss goes on the way from FedAvg's global model (0) to training alone (1); above 1 it "
        "is better than both. Not defined where training alone is no better than FedAvg's model.",
        rank=2,
    ),
    "bytes_up": Quantity(
        title="bytes up", short="up", meaning="Sent towards the world over all edges, mean over seeds.", rank=3
    ),
    "bytes_down": Quantity(
        title="bytes down", short="down", meaning="Taken from parents over all edges, mean over seeds.", rank=5
    ),
    "virtual_s": Quantity(
        title="virtual time (s)",
        short="time\n(s)",
        meaning="Length of the simulated run, mean over seeds: the machines and links are those of the configuration.",
        rank=1,
    ),
    "sooner": Quantity(
        title="as good as synchronous, times sooner",
        short="times\nsooner",
        meaning="How many times earlier, in virtual time, the world's model is as good as the synchronous method's at "
        "its end (worldlm+synchronous where it was run, else fedavg).",
        better="high",
        rank=4,
    ),
}
NO_FEDERATION = ("local", "centralized")
"""Methods without a federation. They are not marked as the best for the clients."""


def summarize(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per method: means over seeds and clients.

    Args:
        results: the content of results.json.
    """
    methods = by_method(results["runs"])
    alone = methods.get("local", [])
    fedavg, local = _mean_loss(methods.get("fedavg", []), "world"), _mean_loss(alone, "own")
    reference = methods.get("worldlm+synchronous") or methods.get("fedavg") or []
    rows = []
    for method, runs in methods.items():
        own = [statistics.fmean(client["own"] for client in run["clients"]) for run in runs]
        judged = fedavg if method == "fedavg" else statistics.fmean(own)
        gap = None
        if fedavg is not None and local is not None and judged is not None and fedavg > local:
            gap = (fedavg - judged) / (fedavg - local)
        change = against_local(runs, alone) if alone else {}
        rows.append(
            {
                "method": method,
                "own": statistics.fmean(own),
                "spread": max(own) - min(own) if len(own) > 1 else None,
                "world": _mean_loss(runs, "world"),
                "gap_closed": gap,
                "gains": sum(value < 0 for value in change.values()) if change else None,
                "clients": len(client_means(runs)),
                "worst_vs_local": max(change.values(), default=None),
                "bytes_up": statistics.fmean(sum(level["bytes_up"] for level in run["levels"]) for run in runs),
                "bytes_down": statistics.fmean(sum(level["bytes_down"] for level in run["levels"]) for run in runs),
                "virtual_s": statistics.fmean(run["virtual_s"] for run in runs),
                "sooner": _sooner(runs, reference),
            }
        )
    return rows


def _sooner(runs: Sequence[dict[str, Any]], reference: Sequence[dict[str, Any]]) -> float | None:
    """Time of the reference divided by the time after which the method's world was as good. Mean over seeds."""
    ratios = []
    for run, other in ((run, other) for run in runs for other in reference if run["seed"] == other["seed"]):
        if not run["world_curve"] or not other["world_curve"]:
            return None
        end = other["world_curve"][-1]
        reached = [point["virtual_s"] for point in run["world_curve"] if point["loss"] <= end["loss"]]
        if not reached:
            return None
        ratios.append(end["virtual_s"] / reached[0])
    return statistics.fmean(ratios) if ratios else None


def _mean_loss(runs: Sequence[dict[str, Any]], which: str) -> float | None:
    losses = [client[which] for run in runs for client in run["clients"]]
    return statistics.fmean(losses) if losses else None


def cell(name: str, value: Any) -> str:
    """A value as text for the tables."""
    if value is None:
        return "-"
    if name in ("own", "world", "spread"):
        return f"{value:.4f}"
    if name in ("gap_closed", "sooner"):
        return f"{value:.2f}"
    if name == "worst_vs_local":
        return f"{value:+.1%}"
    if name.startswith("bytes"):
        return f"{amount(value)}B"
    return f"{value:.0f}" if isinstance(value, float) else str(value)


def best(rows: Sequence[dict[str, Any]]) -> dict[str, set[str]]:
    """The methods with the best value, by column: several if the table shows equal values."""
    found: dict[str, set[str]] = {}
    for name, quantity in COLUMNS.items():
        values = {row["method"]: row[name] for row in rows if quantity.better and _is_number(row[name])}
        if name in ("gains", "worst_vs_local"):
            values = {method: value for method, value in values.items() if method not in NO_FEDERATION}
        if len(values) > 1:
            top = min(values.values()) if quantity.better == "low" else max(values.values())
            found[name] = {method for method, value in values.items() if cell(name, value) == cell(name, top)}
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and value == value


def _cells(row: dict[str, Any]) -> dict[str, str]:
    """A row as text for the tables, by column."""
    shown = {name: cell(name, row[name]) for name in COLUMNS} | {"gains": "-"}
    if row["gains"] is not None and row["method"] != "local":
        shown["gains"] = f"{row['gains']} of {row['clients']}"
    return shown


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table; the best values are bold."""
    titles, marks = [quantity.title for quantity in COLUMNS.values()], best(rows)
    lines = ["| " + " | ".join(titles) + " |", "|---" + "|---:" * (len(COLUMNS) - 1) + "|"]
    for row in rows:
        cells = _cells(row)
        bold = [f"**{text}**" if row["method"] in marks.get(name, ()) else text for name, text in cells.items()]
        lines.append("| " + " | ".join(bold) + " |")
    return "\n".join(lines) + "\n"


def table(rows: Sequence[dict[str, Any]]) -> FittingTable:
    """The rows for a terminal. The best values have a star."""
    columns = [Column(each.short, rank=each.rank, is_number=name != "method") for name, each in COLUMNS.items()]
    marks = best(rows)
    caption = "* best; own: each client's model on its own text; gains and worst client: against training alone (local)"
    found = FittingTable("", columns, caption=caption if marks else "")
    for row in rows:
        cells = []
        for name, text in _cells(row).items():
            is_best = row["method"] in marks.get(name, ())
            cells.append(Text(f"{text}*" if is_best else text, style="bold" if is_best else ""))
        found.add_row(*cells)
    return found


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
        writer = csv.DictWriter(stream, list(COLUMNS), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    plots = {
        "loss_by_tokens": ("Clients' own models, mean held-out loss by tokens of all clients", _by("tokens")),
        "loss_by_time": ("Clients' own models, by virtual time", _by("virtual_s")),
        "world_by_tokens": ("The world's model on all texts, by tokens", _by("tokens", "world_curve")),
        "world_by_time": ("The world's model, by virtual time", _by("virtual_s", "world_curve")),
        "clients": ("Every client's own model on its own text", _bars),
        "texts": ("Every model on every text (first seed)", _matrix),
        "attention": ("What nodes take from each other (first seed): mean weights of their blends", _taken),
        "staleness": ("Staleness of accepted updates", lambda figure, found: _staleness(figure, found, out)),
    }
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
        rows=[_cells(row) for row in rows],
        best=best(rows),
        plots=[(title, folder / f"{name}.png") for name, (title, _) in plots.items()],
        seeds=sorted({run["seed"] for run in results["runs"]}),
    )
    page.write_text(body, encoding="utf-8")
    return page


def _by(axis: str, curve: str = "curve") -> Callable[[Figure, list[dict[str, Any]]], None]:
    def draw(figure: Figure, runs: list[dict[str, Any]]) -> None:
        axes = figure.add_subplot()
        for method in dict.fromkeys(run["method"] for run in runs):
            for index, run in enumerate(run for run in runs if run["method"] == method):
                xs = [point[axis] for point in run[curve]]
                ys = [point["loss"] for point in run[curve]]
                colour = f"C{_position(method, runs)}"
                axes.plot(xs, ys, color=colour, alpha=0.8, label=method if index == 0 else None)
        axes.set_xlabel("tokens" if axis == "tokens" else "virtual seconds")
        axes.set_ylabel("nats per byte")
        lowest = min((point["loss"] for run in runs for point in run[curve]), default=1.0)
        axes.set_ylim(lowest * 0.97, lowest * 1.8)
        axes.grid(alpha=0.3)
        axes.legend()

    return draw


def _position(method: str, runs: list[dict[str, Any]]) -> int:
    return list(dict.fromkeys(run["method"] for run in runs)).index(method)


def _bars(figure: Figure, runs: list[dict[str, Any]]) -> None:
    axes = figure.add_subplot()
    methods = list(dict.fromkeys(run["method"] for run in runs))
    clients = list(client_means(runs))
    width = 0.8 / len(methods)
    for index, method in enumerate(methods):
        losses = client_means([run for run in runs if run["method"] == method])
        places = [place + (index - (len(methods) - 1) / 2) * width for place in range(len(clients))]
        axes.bar(places, [losses.get(client, 0.0) for client in clients], width, label=method)
    axes.set_xticks(range(len(clients)), labels=[client.split("/", 1)[1] for client in clients], rotation=20)
    axes.set_ylabel("nats per byte")
    lowest = min(loss for run in runs for loss in (client["own"] for client in run["clients"]))
    axes.set_ylim(bottom=lowest * 0.8)
    axes.legend(ncols=3)


def _matrix(figure: Figure, runs: list[dict[str, Any]]) -> None:
    first = [run for run in runs if run["seed"] == runs[0]["seed"]][:6]
    lowest = min(loss for run in first for client in run["clients"] for loss in client["by_model"].values())
    for index, run in enumerate(first):
        axes: Axes = figure.add_subplot(1, len(first), index + 1)
        names = [client["client"].split("/")[-1] for client in run["clients"]]
        values = [[client["by_model"][path] for path in client["by_model"]] for client in run["clients"]]
        axes.imshow(values, cmap="Blues_r", vmin=lowest, vmax=2.5 * lowest)
        axes.set_title(run["method"], fontsize=9)
        axes.set_xticks(range(len(names)), labels=names, rotation=90, fontsize=7)
        axes.set_yticks(range(len(names)), labels=names if index == 0 else [""] * len(names), fontsize=7)
        axes.set_xlabel("model of")
        if index == 0:
            axes.set_ylabel("text of")


def _taken(figure: Figure, runs: list[dict[str, Any]]) -> None:
    """One heat map per method: rows take, columns give."""
    first = [run for run in runs if run["seed"] == runs[0]["seed"] and run["taken"]]
    first.sort(key=lambda run: not run["method"].startswith("worldlm"))
    if not first:
        figure.text(0.5, 0.5, "no method of this comparison blends", ha="center")
        return
    for index, run in enumerate(first[:3]):
        axes: Axes = figure.add_subplot(1, min(len(first), 3), index + 1)
        takers = sorted(run["taken"])
        givers = sorted({giver for taken in run["taken"].values() for giver in taken})
        values = [[run["taken"][taker].get(giver, float("nan")) for giver in givers] for taker in takers]
        axes.imshow(values, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
        for row, weights in enumerate(values):
            for column, weight in enumerate(weights):
                if weight == weight:
                    ink = "white" if weight > 0.6 else "black"
                    axes.text(column, row, f"{weight:.2f}", ha="center", va="center", fontsize=5, color=ink)
        axes.set_title(run["method"], fontsize=9)
        axes.set_xticks(range(len(givers)), labels=[_short(giver) for giver in givers], rotation=90, fontsize=6)
        axes.set_yticks(range(len(takers)), labels=[_short(taker) for taker in takers], fontsize=6)


def _short(name: str) -> str:
    return name.replace("world/", "")


def _staleness(figure: Figure, runs: list[dict[str, Any]], out: Path) -> None:
    axes = figure.add_subplot()
    for index, method in enumerate(dict.fromkeys(run["method"] for run in runs)):
        counts: Counter[int] = Counter()
        for run in runs:
            if run["method"] == method:
                for line in audit.read(out / "runs" / f"{method}-{run['seed']}"):
                    if line.get("verdict") == ACCEPTED:
                        counts[line["tau"]] += 1
        total = counts.total()
        taus = sorted(counts)
        axes.plot(taus, [counts[tau] / total for tau in taus], marker="o", color=f"C{index}", label=method)
    axes.set_xlabel("tau (versions)")
    axes.set_ylabel("share of updates")
    axes.legend()
