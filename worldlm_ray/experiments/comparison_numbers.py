"""The numbers of a comparison: one row per method, headroom, and the Pareto front.

    headroom H = 1 - L(pooled+ft) / L(local)

L is the mean over clients of each one's own model on its held-out text. `pooled+ft` is one model of all texts,
fine-tuned by every client: what the clients could hope for. `local` is training alone, stopped early on validation
text; where it was run with several settings (`local+lr_third`), the one with the lowest validation loss stands for it.
A gain of a method, 1 - L(method) / L(local), is also given as a share of H.

`sooner` says how many times earlier, in virtual time, the world's model is as good as the final one of the synchronous
method. That is worldlm+synchronous if it was run, else fedavg.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Run = dict[str, Any]
"""One method with one seed: an element of `runs` in results.json."""

ORACLE, ALONE, POOLED = "pooled+ft", "local", "pooled"
TAIL = 90
"""Percentile of the clients' relative changes that the tail is judged by: nine of ten clients do better."""


def by_method(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each method, in the order of the comparison."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run["method"], []).append(run)
    return found


def is_alone(method: str) -> bool:
    """Whether every client trains alone in a method."""
    return method.partition("+")[0] == ALONE


def is_pooled(method: str) -> bool:
    """Whether a method has all texts in one place. Clients that federate have no such choice: it is a yardstick."""
    return method.partition("+")[0] == POOLED


def is_federated(method: str) -> bool:
    """Whether clients federate in a method."""
    return not is_alone(method) and not is_pooled(method)


def alone(runs: Sequence[Run]) -> list[Run]:
    """The runs of training alone: with several settings, those of the one with the lowest validation loss."""
    methods = {method: mine for method, mine in by_method(runs).items() if is_alone(method)}
    return min(methods.values(), key=_chosen_by, default=[])


def _chosen_by(runs: Sequence[Run]) -> float:
    """Mean validation loss. Without validation text, the held-out loss: a choice in favour of training alone."""
    clients = [client for run in runs for client in run["clients"]]
    losses = [client["own"] if client["validation"] is None else client["validation"] for client in clients]
    mean = statistics.fmean(losses)
    return mean if math.isfinite(mean) else math.inf


def client_means(runs: Sequence[Run]) -> dict[str, float]:
    """Mean own loss by client, over seeds."""
    found: dict[str, list[float]] = {}
    for run in runs:
        for client in run["clients"]:
            found.setdefault(client["client"], []).append(client["own"])
    return {client: statistics.fmean(losses) for client, losses in found.items()}


def against_local(runs: Sequence[Run], local: Sequence[Run]) -> dict[str, float]:
    """Relative change of each client's own loss against training alone, mean over seeds. Below zero it gains."""
    before = client_means(local)
    return {client: loss / before[client] - 1.0 for client, loss in client_means(runs).items() if client in before}


def by_seed(runs: Sequence[Run], which: str) -> dict[int, float]:
    """Mean loss over the clients, by seed."""
    return {run["seed"]: statistics.fmean(client[which] for client in run["clients"]) for run in runs}


@dataclass(frozen=True)
class Paired:
    """A difference that is taken seed by seed: both runs of a seed have the same weights and order of text."""

    mean: float
    error: float | None
    """Standard error of the mean over the seeds; None with one seed."""
    seeds: int


def paired(runs: Sequence[Run], others: Sequence[Run], which: str = "own") -> Paired | None:
    """Mean loss of some runs minus that of others, over the seeds that both have; None if there is none."""
    mine, theirs = by_seed(runs, which), by_seed(others, which)
    found = [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())]
    if not found:
        return None
    error = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else None
    return Paired(statistics.fmean(found), error, len(found))


@dataclass(frozen=True)
class Headroom:
    """How much there is to win in a world."""

    share: float
    """H: of the loss of training alone."""
    oracle: float
    alone: float
    """The two losses, in nats per byte, over the seeds that both have."""
    method: str
    """Which setting of training alone was best."""


def headroom(runs: Sequence[Run]) -> Headroom | None:
    """H of a comparison; None unless both methods were run with a common seed and their losses are finite."""
    local, pooled = alone(runs), by_method(runs).get(ORACLE, [])
    mine, theirs = by_seed(pooled, "own"), by_seed(local, "own")
    seeds = sorted(mine.keys() & theirs.keys())
    if not seeds:
        return None
    best, before = (statistics.fmean(losses[seed] for seed in seeds) for losses in (mine, theirs))
    if not (math.isfinite(best) and math.isfinite(before)):
        return None
    return Headroom(1.0 - best / before, best, before, local[0]["method"])


def percentile(values: Sequence[float], share: float) -> float:
    """A percentile from 0 to 100, between two values by linear interpolation."""
    ordered = sorted(values)
    at = (len(ordered) - 1) * share / 100
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names of the points that no other is at least as good as in both coordinates, by the first coordinate.

    Args:
        points: two losses by name. Points with a loss that is not finite are left out.
    """
    finite = {name: point for name, point in points.items() if all(map(math.isfinite, point))}
    front: list[str] = []
    lowest = math.inf
    for name in sorted(finite, key=lambda name: finite[name]):
        if finite[name][1] < lowest:
            front.append(name)
            lowest = finite[name][1]
    return front


def summarize(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per method: means over seeds and clients.

    Args:
        results: the content of results.json.
    """
    methods, local = by_method(results["runs"]), alone(results["runs"])
    reference = methods.get("worldlm+synchronous") or methods.get("fedavg") or []
    room = headroom(results["runs"])
    rows = []
    for method, runs in methods.items():
        change = against_local(runs, local) if local else {}
        difference = paired(runs, local)
        gain = 1.0 - mean_loss(runs, "own") / mean_loss(local, "own") if local else None
        rows.append(
            {
                "method": method,
                "own": mean_loss(runs, "own"),
                "difference": None if difference is None else difference.mean,
                "error": None if difference is None else difference.error,
                "world": None if is_alone(method) else mean_loss(runs, "world"),
                "gain": gain,
                "of_headroom": gain / room.share if gain is not None and room is not None and room.share > 0 else None,
                "gains": sum(value < 0 for value in change.values()) if change else None,
                "clients": len(client_means(runs)),
                "worst_vs_local": max(change.values(), default=None),
                "tail": percentile(list(change.values()), TAIL) if change else None,
                "tokens": statistics.fmean(run["tokens"] for run in runs),
                "flops": statistics.fmean(run["flops"] for run in runs),
                "bytes_up": statistics.fmean(sum(level["bytes_up"] for level in run["levels"]) for run in runs),
                "bytes_down": statistics.fmean(sum(level["bytes_down"] for level in run["levels"]) for run in runs),
                "virtual_s": statistics.fmean(run["virtual_s"] for run in runs),
                "sooner": _sooner(runs, reference),
            }
        )
    return rows


def mean_loss(runs: Sequence[Run], which: str) -> float:
    """Mean over clients and seeds."""
    return statistics.fmean(client[which] for run in runs for client in run["clients"])


def _sooner(runs: Sequence[Run], reference: Sequence[Run]) -> float | None:
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
