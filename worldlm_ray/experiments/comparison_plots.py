"""The plots of a comparison. Each function draws into a figure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from worldlm_ray.exchange.replies import ACCEPTED
from worldlm_ray.experiments.comparison_numbers import (
    alone,
    by_method,
    by_seed,
    client_means,
    is_alone,
    is_federated,
    mean_loss,
    pareto,
)
from worldlm_ray.tracking import audit

MARKERS = "osD^vPX"
Point = tuple[float, float]
"""Two losses: of the own models, and of the world's."""
FARTHEST = 1.3
"""A method with a loss so many times the best one is outside the frame of the plane."""
Draw = Callable[[Figure, list[dict[str, Any]]], None]
"""Draws the runs of results.json."""


def plots_of(out: Path) -> dict[str, tuple[str, Draw]]:
    """Title and drawing of every plot, by the name of its file.

    Args:
        out: folder of the comparison.
    """
    return {
        "plane": ("Own model on own text against the world's model on all texts", plane),
        "loss_by_tokens": ("Clients' own models, mean held-out loss by tokens of all clients", by("tokens")),
        "loss_by_time": ("Clients' own models, by virtual time", by("virtual_s")),
        "world_by_tokens": ("The world's model on all texts, by tokens", by("tokens", "world_curve")),
        "world_by_time": ("The world's model, by virtual time", by("virtual_s", "world_curve")),
        "clients": ("Every client's own model on its own text", bars),
        "texts": ("Every model on every text (first seed)", matrix),
        "attention": ("What nodes take from each other (first seed): mean weights of their blends", taken),
        "staleness": ("Staleness of accepted updates", lambda figure, found: staleness(figure, found, out)),
    }


def plane(figure: Figure, runs: list[dict[str, Any]]) -> None:
    """Both losses of every method, in both of which less is better, and the Pareto front of the federations.

    Training alone has no common model: it is a line. Pooled text is no federation: its marks are hollow. Small marks
    are single seeds. Methods far from the others are left out of the frame, so that the others can be told apart.
    """
    axes = figure.add_subplot()
    points, single = dict[str, Point](), dict[str, list[Point]]()
    for method, mine in by_method(runs).items():
        if not is_alone(method):
            points[method] = (mean_loss(mine, "own"), mean_loss(mine, "world"))
            owns, worlds = by_seed(mine, "own"), by_seed(mine, "world")
            single[method] = [(owns[seed], worlds[seed]) for seed in owns] if len(owns) > 1 else []
    local = alone(runs)
    shown = _in_frame(axes, points, single, mean_loss(local, "own") if local else None)
    for index, (method, (own, world)) in enumerate(sorted(points.items(), key=lambda each: each[1])):
        colour, marker = f"C{index % 10}", MARKERS[index // 10 % len(MARKERS)]
        face = colour if is_federated(method) else "none"
        label = f"{method}  {own:.3f} / {world:.3f}" + ("" if method in shown else " (outside)")
        look: dict[str, Any] = {"edgecolors": colour, "facecolors": face, "marker": marker}
        axes.scatter(own, world, s=75, linewidths=1.6, zorder=3, label=label, **look)
        for seed in single[method]:
            axes.scatter(*seed, s=12, color=colour, marker=marker)
    front = pareto({method: point for method, point in points.items() if is_federated(method)})
    if len(front) > 1:
        xs, ys = zip(*(points[method] for method in front), strict=True)
        axes.step(xs, ys, where="post", color="grey", linewidth=1.8, zorder=1, label="Pareto front of the federations")
    if local:
        alone_loss = mean_loss(local, "own")
        label = f"{local[0]['method']}  {alone_loss:.3f}: alone, no common model"
        axes.axvline(alone_loss, color="black", linestyle="--", linewidth=1.0, label=label)
    axes.set_xlabel("own model on own text, nats per byte (less is better)")
    axes.set_ylabel("world's model on all texts, nats per byte (less is better)")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside right upper", fontsize=9, title="method  own / world")


def _in_frame(axes: Axes, points: dict[str, Point], single: dict[str, list[Point]], local: float | None) -> set[str]:
    """Set the limits of the plane; returns the methods within them.

    Args:
        axes: the plane.
        points: both losses of each method.
        single: those of each seed, where there are several.
        local: loss of training alone.
    """
    finite = {method: point for method, point in points.items() if all(map(math.isfinite, point))}
    if not finite:
        return set()
    lows = [min(point[axis] for point in finite.values()) for axis in (0, 1)]
    shown = {m for m, point in finite.items() if all(point[axis] <= FARTHEST * lows[axis] for axis in (0, 1))}
    marks = [point for method in shown for point in (finite[method], *single[method])]
    spans = [[point[axis] for point in marks if math.isfinite(point[axis])] or [lows[axis]] for axis in (0, 1)]
    if local is not None and math.isfinite(local):
        spans[0].append(local)
    edges = [0.08 * (max(values) - min(values)) or 0.05 * max(values) for values in spans]
    axes.set_xlim(min(spans[0]) - edges[0], max(spans[0]) + edges[0])
    axes.set_ylim(min(spans[1]) - edges[1], max(spans[1]) + edges[1])
    return shown


def by(axis: str, curve: str = "curve") -> Draw:
    """Draws a curve of every run by tokens or by virtual time."""

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


def bars(figure: Figure, runs: list[dict[str, Any]]) -> None:
    """One group of bars per client, one bar per method."""
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


def matrix(figure: Figure, runs: list[dict[str, Any]]) -> None:
    """One heat map per method: rows are texts, columns are models."""
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


def taken(figure: Figure, runs: list[dict[str, Any]]) -> None:
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


def staleness(figure: Figure, runs: list[dict[str, Any]], out: Path) -> None:
    """Share of the accepted updates by staleness, by the audit trails of the runs."""
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
