"""Tables, plots and one HTML page of a comparison: everything in OUT/report/ from OUT/results.json.

    gap closed = (L_fedavg - L_method) / (L_fedavg - L_local)

with FedAvg judged by its global model and every other method by its clients' own models, each on the client's own text.

`sooner` is how many times earlier, in virtual time, the world's model is as good as that of the synchronous method at
its end: of worldlm+synchronous where it was run, of fedavg elsewhere.
"""

from __future__ import annotations

import base64
import csv
import html
import json
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from worldlm_ray import audit
from worldlm_ray.report import amount

COLUMNS = {
    "method": "method",
    "own": "own model, own text (nats/byte)",
    "spread": "spread over seeds",
    "world": "world's model, all texts",
    "gap_closed": "gap closed",
    "worst_vs_local": "worst client against local",
    "bytes_up": "bytes up",
    "bytes_down": "bytes down",
    "virtual_s": "virtual time (s)",
    "sooner": "as good as synchronous, times sooner",
}


def summarize(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per method: means over seeds and clients.

    Args:
        results: the content of results.json.
    """
    methods = list(dict.fromkeys(run["method"] for run in results["runs"]))
    by_method = {method: [run for run in results["runs"] if run["method"] == method] for method in methods}
    fedavg = _mean_loss(by_method.get("fedavg", []), "world")
    local = _mean_loss(by_method.get("local", []), "own")
    reference = by_method.get("worldlm+synchronous") or by_method.get("fedavg") or []
    local_by_client = _by_client(by_method.get("local", []))
    rows = []
    for method, runs in by_method.items():
        own = [statistics.fmean(client["own"] for client in run["clients"]) for run in runs]
        judged = fedavg if method == "fedavg" else statistics.fmean(own)
        gap = None
        if fedavg is not None and local is not None and judged is not None and fedavg != local:
            gap = (fedavg - judged) / (fedavg - local)
        mine = _by_client(runs)
        worst = max((mine[c] / local_by_client[c] - 1.0 for c in mine), default=None) if local_by_client else None
        rows.append(
            {
                "method": method,
                "own": statistics.fmean(own),
                "spread": max(own) - min(own),
                "world": _mean_loss(runs, "world"),
                "gap_closed": gap,
                "worst_vs_local": worst,
                "bytes_up": statistics.fmean(sum(level["bytes_up"] for level in run["levels"]) for run in runs),
                "bytes_down": statistics.fmean(sum(level["bytes_down"] for level in run["levels"]) for run in runs),
                "virtual_s": statistics.fmean(run["virtual_s"] for run in runs),
                "sooner": _sooner(runs, reference),
            }
        )
    return rows


def _sooner(runs: Sequence[dict[str, Any]], reference: Sequence[dict[str, Any]]) -> float | None:
    """Mean over seeds of the time that the reference took over the time in which the method's world was as good."""
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


def _by_client(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Mean own loss by client, over seeds."""
    found: dict[str, list[float]] = {}
    for run in runs:
        for client in run["clients"]:
            found.setdefault(client["client"], []).append(client["own"])
    return {client: statistics.fmean(losses) for client, losses in found.items()}


def cell(name: str, value: Any) -> str:
    """A value as the tables show it."""
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


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| " + " | ".join(COLUMNS.values()) + " |", "|---" + "|---:" * (len(COLUMNS) - 1) + "|"]
    lines += ["| " + " | ".join(cell(name, row[name]) for name in COLUMNS) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def write(out: Path) -> Path:
    """Write OUT/report/ from OUT/results.json; returns the HTML page."""
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    folder = out / "report"
    folder.mkdir(exist_ok=True)
    rows = summarize(results)
    (folder / "table.md").write_text(markdown(rows), encoding="utf-8")
    with (folder / "table.csv").open("w", newline="", encoding="utf-8") as stream:
        table = csv.DictWriter(stream, list(COLUMNS))
        table.writeheader()
        table.writerows(rows)
    plots = {
        "loss_by_tokens": ("Clients' own models, mean held-out loss by tokens of all clients", _by("tokens")),
        "loss_by_time": ("The same by virtual time", _by("virtual_s")),
        "world_by_tokens": ("The world's model on all texts, by tokens", _by("tokens", "world_curve")),
        "world_by_time": ("The same by virtual time", _by("virtual_s", "world_curve")),
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
    page.write_text(_page(out.name, rows, {n: title for n, (title, _) in plots.items()}, folder), encoding="utf-8")
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
    clients = list(_by_client(runs))
    width = 0.8 / len(methods)
    for index, method in enumerate(methods):
        losses = _by_client([run for run in runs if run["method"] == method])
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
                    if line.get("verdict") == audit.ACCEPTED:
                        counts[line["tau"]] += 1
        total = counts.total()
        taus = sorted(counts)
        axes.plot(taus, [counts[tau] / total for tau in taus], marker="o", color=f"C{index}", label=method)
    axes.set_xlabel("tau (versions)")
    axes.set_ylabel("share of updates")
    axes.legend()


def _page(name: str, rows: Sequence[dict[str, Any]], plots: dict[str, str], folder: Path) -> str:
    head = "".join(f"<th>{html.escape(title)}</th>" for title in COLUMNS.values())
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell(column, row[column]))}</td>" for column in COLUMNS) + "</tr>"
        for row in rows
    )
    figures = "".join(
        f"<h2>{html.escape(title)}</h2><img alt='{html.escape(title)}' "
        f"src='data:image/png;base64,{base64.b64encode((folder / f'{key}.png').read_bytes()).decode()}'>"
        for key, title in plots.items()
    )
    style = (
        "body{font:15px sans-serif;max-width:1150px;margin:2em auto;padding:0 1em}table{border-collapse:collapse}"
        "td,th{padding:.35em .8em;border-bottom:1px solid #ccc;text-align:right}"
        "td:first-child,th:first-child{text-align:left}img{max-width:100%}"
    )
    return (
        f"<!doctype html><meta charset='utf-8'><title>{html.escape(name)}</title><style>{style}</style>"
        f"<h1>{html.escape(name)}</h1><table><tr>{head}</tr>{body}</table>{figures}"
    )
