"""What a run did while its machines became more and fewer: a table, and a plot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from worldlm_ray.exchange.replies import ACCEPTED
from worldlm_ray.reports.tables import amount
from worldlm_ray.reports.terminal import Column, FittingTable
from worldlm_ray.tracking import audit

BIN_S = 4.0
"""Seconds over which the plot's tokens/s are taken."""
SETTLING = 0.5
"""Share of a stage at its beginning that its figures leave out: nodes move then, and newcomers start."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stretch of a run during which its machines stay the same."""

    machines: int
    begin_s: float
    """Run time at which the machines had changed."""
    end_s: float


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What was measured in the settled part of a stage."""

    machines: int
    begin_s: float
    end_s: float
    clients: int
    """Clients from which an update was accepted."""
    tokens_per_s: float
    """Of accepted updates."""
    efficiency: float
    """Tokens/s per machine, against the first stage."""
    tau: float | None
    """Mean staleness of all accepted updates, in versions."""
    clients_loss: float | None
    """At the end of the stage: the mean over the clients of their own models' losses, nats per byte."""


def figures(
    run_dir: Path, stages: Sequence[Stage], *, round_tokens: Mapping[str, int], looks: Sequence[dict[str, Any]]
) -> list[Figures]:
    """The figures of every stage, from the audit trail.

    Args:
        run_dir: the run folder.
        stages: in their order.
        round_tokens: tokens of an update, by path of the client.
        looks: snapshots of the run, in their order.
    """
    accepted = _accepted(run_dir)
    found: list[Figures] = []
    for stage in stages:
        begin_s = stage.begin_s + SETTLING * (stage.end_s - stage.begin_s)
        now = [line for line in accepted if begin_s < line["now_s"] <= stage.end_s]
        senders = [f"{line['node']}/{line['sender']}" for line in now]
        trained = sum(round_tokens.get(sender, 0) for sender in senders)
        speed = trained / max(stage.end_s - begin_s, 1e-9)
        first = found[0].tokens_per_s / found[0].machines if found else speed / stage.machines
        taus = [line["tau"] for line in now]
        losses = [look["nodes"]["world"]["clients_loss"] for look in looks if look["now_s"] <= stage.end_s]
        found.append(
            Figures(
                machines=stage.machines,
                begin_s=stage.begin_s,
                end_s=stage.end_s,
                clients=len(set(senders) & set(round_tokens)),
                tokens_per_s=speed,
                efficiency=speed / stage.machines / first if first else math.nan,
                tau=sum(taus) / len(taus) if taus else None,
                clients_loss=losses[-1] if losses else None,
            )
        )
    return found


def table(rows: Sequence[Figures]) -> FittingTable:
    """The figures, for a terminal."""
    names = ("machines", "clients", "tokens/s", "efficiency", "staleness", "clients' loss\n(nats/byte)")
    shown = FittingTable("", [*map(Column, names)])
    for row in rows:
        shown.add_row(
            str(row.machines),
            str(row.clients),
            amount(row.tokens_per_s),
            f"{row.efficiency:.2f}",
            "-" if row.tau is None else f"{row.tau:.2f}",
            "-" if row.clients_loss is None else f"{row.clients_loss:.3f}",
        )
    return shown


def plot(
    path: Path,
    rows: Sequence[Figures],
    *,
    run_dir: Path,
    round_tokens: Mapping[str, int],
    looks: Sequence[dict[str, Any]],
) -> None:
    """Draw tokens/s, efficiency, staleness and loss by run time, with the number of machines behind them.

    Args:
        path: of the PNG.
        rows: the figures.
        run_dir: the run folder.
        round_tokens: tokens of an update, by path of the client.
        looks: snapshots of the run, in their order.
    """
    # Matplotlib takes half a second to import.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(2, 2, sharex=True).flat)
    titles = (
        "tokens/s",
        "efficiency: tokens/s per machine, against the first stage",
        "staleness (versions)",
        "clients' mean loss (nats/byte)",
    )
    for axis, title in zip(axes, titles, strict=True):
        _frame(axis, title, rows)
    speed, efficiency, staleness, loss = axes
    lines = _accepted(run_dir)
    speed.stairs(*_speeds(lines, round_tokens), color="0.6", lw=1, baseline=None, label=f"accepted in {BIN_S:g} s")
    for row in rows:
        settled = [row.begin_s + SETTLING * (row.end_s - row.begin_s), row.end_s]
        label = "in the settled part of a stage" if row is rows[0] else None
        speed.plot(settled, [row.tokens_per_s] * 2, color="black", lw=2, label=label)
        efficiency.plot(settled, [row.efficiency] * 2, color="black", lw=2)
    efficiency.axhline(1.0, color="0.6", lw=1, ls="--")
    staleness.scatter([x["now_s"] for x in lines], [x["tau"] for x in lines], s=6, color="0.3", alpha=0.5)
    known = [(look["now_s"], look["nodes"]["world"]["clients_loss"]) for look in looks]
    loss.plot(*zip(*[pair for pair in known if pair[1] is not None], strict=True), color="black", lw=1.5)
    speed.legend(fontsize=8)
    for axis in (speed, efficiency):
        axis.set_ylim(0.0, 1.1 * axis.get_ylim()[1])
    figure.savefig(path)


def _frame(axis: Any, title: str, rows: Sequence[Figures]) -> None:
    """The title, the grid and the stages of one picture."""
    most = max(row.machines for row in rows)
    axis.set_title(title, fontsize=10, loc="left")
    axis.grid(alpha=0.25)
    axis.margins(x=0.01)
    for row in rows:
        axis.axvspan(row.begin_s, row.end_s, color="tab:blue", alpha=0.04 + 0.14 * row.machines / most, lw=0)
        axis.annotate(
            f"{row.machines}",
            ((row.begin_s + row.end_s) / 2, 1.0),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="top",
            fontsize=9,
            color="tab:blue",
        )
    if axis.get_subplotspec().is_last_row():
        axis.set_xlabel("run time (s); the number of machines above")


def _speeds(lines: Sequence[dict[str, Any]], round_tokens: Mapping[str, int]) -> tuple[list[float], list[float]]:
    """Tokens/s of what was accepted, and the edges of the stretches of time in which it was."""
    bins = [0.0] * (int(max((line["now_s"] for line in lines), default=0.0) / BIN_S) + 1)
    for line in lines:
        bins[int(line["now_s"] / BIN_S)] += round_tokens.get(f"{line['node']}/{line['sender']}", 0) / BIN_S
    return bins, [BIN_S * index for index in range(len(bins) + 1)]


def as_json(rows: Sequence[Figures]) -> list[dict[str, Any]]:
    """The figures as plain values."""
    return [asdict(row) for row in rows]


def _accepted(run_dir: Path) -> list[dict[str, Any]]:
    """Accepted updates by time, each once: what a restart undoes is accepted again."""
    first: dict[tuple[str, str, int], dict[str, Any]] = {}
    for line in audit.read(run_dir):
        if line.get("verdict") == ACCEPTED:
            first.setdefault((line["node"], line["sender"], line["seq"]), line)
    return sorted(first.values(), key=lambda line: line["now_s"])
