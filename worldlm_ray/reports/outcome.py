"""The end of a run on either backend: each model measured on held-out text, summary.json, samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from worldlm_ray.config.schema import BudgetConfig
from worldlm_ray.errors import Interrupted, WorldLMError
from worldlm_ray.plan.plan import Plan
from worldlm_ray.records import FinalRecord, Measure
from worldlm_ray.tensors.buffers import Flat, params_sha256
from worldlm_ray.tracking.summary import Summary, write_summary
from worldlm_ray.tracking.tracker import Tracker

LONGEST_FAILURE = 200
"""Characters of an error's reason that are kept."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A short text from a model, or why there is none."""

    text: str = ""
    failure: str = ""
    """Empty where there is a text."""


def sampled(generate: Callable[[], str]) -> Sample:
    """The text of `generate`, or its failure. A failed sample must not prevent the summary."""
    try:
        return Sample(text=generate())
    except Interrupted:
        raise
    except WorldLMError as error:
        return Sample(failure=str(error))
    except Exception as error:  # noqa: BLE001 - a boundary: see above
        return Sample(failure=" ".join(f"{type(error).__name__}: {error}".split())[:LONGEST_FAILURE])


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a run."""

    summary: dict[str, Any]
    """The content of summary.json."""
    samples: dict[str, str]
    """A short text from every client's model, by path."""
    texts: Mapping[str, Mapping[str, Measure]] = field(default_factory=dict)
    """By node, then by client: the node's own model on the client's text, where the backend measures them here."""


def combine(measures: Iterable[Measure | None]) -> Measure | None:
    """One measure over several clients' texts, each weighted by its held-out bytes. Those that are None are left out.

    Loss is the weighted mean, perplexity per token the exponential of the weighted mean of its logarithm. The result is
    None if all measures are.
    """
    found = [measure for measure in measures if measure is not None]
    if not found:
        return None
    total = sum(measure.heldout_bytes for measure in found)
    loss = sum(m.loss * m.heldout_bytes for m in found) / total
    weighted = [m.heldout_bytes * math.log(m.perplexity_per_token) for m in found if m.perplexity_per_token]
    per_token = math.exp(sum(weighted) / total) if len(weighted) == len(found) else None
    return Measure(loss=loss, heldout_bytes=total, perplexity_per_token=per_token)


def spent(budget: BudgetConfig, trained: int) -> dict[str, Any]:
    """The budget. If it is in tokens, also the tokens that were trained, and those beyond the budget."""
    found: dict[str, Any] = {unit: amount for unit, amount in asdict(budget).items() if amount is not None}
    if budget.tokens is not None:
        found |= {"trained": trained, "beyond": max(trained - budget.tokens, 0)}
    return found


def finish(
    plan: Plan,
    tracker: Tracker,
    *,
    world: Flat | None,
    measures: Mapping[str, Measure | None],
    samples: Mapping[str, Sample],
    wall_s: float,
    status: str,
    backend: str,
) -> Outcome:
    """Write summary.json.

    Args:
        plan: the run.
        tracker: of the run. The summary takes its counters.
        world: final parameters of the uppermost node; None where nothing was trained, or where that is a client.
        measures: final quality by path: clients' own models on their own text, inner nodes' own models on the
            text of all clients below them; None where losses are private.
        samples: generated text by client, or why there is none.
        wall_s: seconds of the run, virtual ones in simulation.
        status: `finished`, or `stopped` for a run that was left early.
        backend: `ray` or `simulate`.
    """
    _record_final(tracker, measures, now_s=wall_s)
    open_clients = {client.path for client in plan.root.clients if client.settings.privacy.unit == "none"}
    texts = {path: sample.text for path, sample in samples.items()}
    tracker.samples({path: text for path, text in texts.items() if path in open_clients}, now_s=wall_s)
    nodes = tracker.summaries()
    trained = sum(node.tokens for node in nodes.values() if node.kind == "client")
    summary = Summary(
        run=plan.config.name,
        method=plan.config.method,
        seed=plan.config.seed,
        wall_s=round(wall_s, 3),
        tokens=trained,
        params_sha256=None if world is None else params_sha256(world),
        nodes=nodes,
        staleness=tracker.staleness(),
        extra={
            "status": status,
            "backend": backend,
            "budget": spent(plan.config.budget, trained),
            **({} if plan.root.settings.simulation.train else {"trained": False}),
            "samples_failed": {path: sample.failure for path, sample in samples.items() if sample.failure},
            "warnings": tracker.warnings,
        },
    )
    return Outcome(summary=write_summary(plan.run_dir, summary), samples=texts)


def _record_final(tracker: Tracker, measures: Mapping[str, Measure | None], *, now_s: float) -> None:
    """Record the final quality of every node that has been measured."""
    for path, node in tracker.summaries().items():
        measure = measures.get(path)
        if measure is not None:
            final = FinalRecord(
                node=path,
                now_s=now_s,
                version=node.version,
                loss=measure.loss,
                perplexity_per_token=measure.perplexity_per_token,
                heldout_bytes=measure.heldout_bytes,
            )
            tracker.record(final)
