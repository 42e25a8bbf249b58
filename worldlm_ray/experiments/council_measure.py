"""`worldlm evaluate --council`: the council against each of its members, on the held-out text of every client."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from worldlm_ray.experiments import council
from worldlm_ray.experiments.council import CouncilRules, Floats
from worldlm_ray.experiments.council_members import Members, members_of
from worldlm_ray.experiments.council_scores import PRIOR_TOKENS, Scores, Text, scored, texts_of
from worldlm_ray.plan import kept, rundir
from worldlm_ray.reports.tables import amount
from worldlm_ray.reports.terminal import Column, FittingTable
from worldlm_ray.tracking.node_state import finite
from worldlm_ray.training.making import plain_trainer

COUNCIL = "council"
DOCUMENT = 1024
"""Tokens of a text after which the weights begin anew, unless the user says otherwise."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model, or the council, on the held-out texts."""

    losses: dict[str, float]
    """Nats per byte by path of the client whose text it is."""
    loss: float
    """Mean over the texts, weighted by their held-out bytes."""
    models: int
    memory_bytes: int
    """Of the parameters."""
    passes_per_token: float
    seconds: float
    """Wall seconds that this process took. The council takes all passes here, even those that `top` saves."""


@dataclass(frozen=True, kw_only=True)
class CouncilMeasures:
    """A council and its members, measured."""

    rows: dict[str, Row]
    """By path of the node; the council first, under `COUNCIL`."""
    weights: dict[str, dict[str, float]]
    """By path of the client, then of the member: its mean weight at the end of a document."""
    heldout_bytes: dict[str, int]
    """Size of the held-out text by path of the client."""
    left_out: list[str]
    """Lines for the user."""
    document: int
    """Tokens of a text after which the weights begin anew."""


def evaluate_council(
    run: str,
    *,
    tokens: int,
    members: str | None = None,
    rules: CouncilRules | None = None,
    document: int = DOCUMENT,
    fit_prior: bool = False,
    on_phase: Callable[[str], None] = lambda _: None,
) -> CouncilMeasures:
    """Measure a council of a run's models, and each of them alone.

    Texts of clients with private losses are left out, as by `worldlm evaluate`. A model sees the tokens of one window
    of `model.context`; the weights run on over the windows of a document.

    Args:
        run: the run's folder or name.
        tokens: held-out tokens per client, at most.
        members: nodes with commas between them; None for all whose models may serve.
        rules: how the council weighs its members.
        document: tokens of a text after which the weights begin anew.
        fit_prior: whether the weights of a text begin as its client's validation text says, where there is one.
            Otherwise they are uniform.
        on_phase: called with what is measured next.

    Raises:
        RunError: there is no such run, or its tokenizer has changed.
        ConfigError: a node is unknown or may not serve.
        CheckpointError: a node has no whole checkpoint, or no model can serve.
    """
    plan = rundir.reopen(run)
    kept.check_originals(plan.config)
    found = members_of(plan, members)
    # It only holds a model, on the device and the cores of the first client.
    trainer = plain_trainer(plan.shape, plan.layout, plan.root.clients[0].settings)
    texts = texts_of(plan, plan.root.clients, trainer, part="heldout", tokens=tokens)
    scores = scored(trainer, found, texts, on_phase=on_phase)
    priors = {path: council.uniform(len(found.thetas)) for path in texts}
    if fit_prior:
        on_phase("fitting the priors on validation text")
        chosen_on = texts_of(plan, plan.root.clients, trainer, part="validation", tokens=PRIOR_TOKENS)
        priors |= {path: council.fitted(each) for path, each in scored(trainer, found, chosen_on).log_p.items()}
    on_phase("weighing the models")
    return _measured(found, texts, scores, priors, rules or CouncilRules(), document)


def _measured(
    members: Members,
    texts: Mapping[str, Text],
    scores: Scores,
    priors: Mapping[str, Floats],
    rules: CouncilRules,
    document: int,
) -> CouncilMeasures:
    """Weigh the members on every text, from the log prior of its client."""
    nodes, began = list(members.thetas), time.perf_counter()
    ours, weights, passes = dict[str, float](), dict[str, dict[str, float]](), 0
    for path, log_p_TK in scores.log_p.items():
        readings = [council.read(part, priors[path], rules) for part in _documents(log_p_TK, document)]
        nats = -sum(float(each.log_p_T.sum()) for each in readings)
        ours[path] = nats / len(log_p_TK) / texts[path].bytes_per_token
        ends_DK = np.concatenate([np.exp(each.weights.now_K) for each in readings])
        weights[path] = dict(zip(nodes, ends_DK.mean(axis=0).tolist(), strict=True))
        passes += sum(each.passes for each in readings)
    seconds = sum(scores.seconds) + time.perf_counter() - began
    sizes = {path: text.bytes for path, text in texts.items()}
    rows = dict[str, Row]()
    if ours:
        tokens = sum(map(len, scores.log_p.values()))
        memory = sum(theta.nbytes for theta in members.thetas.values())
        rows[COUNCIL] = Row(
            losses=ours,
            loss=_mean(ours, sizes),
            models=len(nodes),
            memory_bytes=memory,
            passes_per_token=passes / tokens,
            seconds=seconds,
        )
        rows |= _alone(members, texts, scores)
    return CouncilMeasures(
        rows=rows, weights=weights, heldout_bytes=sizes, left_out=members.left_out, document=document
    )


def _documents(log_p_TK: Floats, size: int) -> list[Floats]:
    """A text cut into documents [T, D, K], to be read side by side: the whole ones, then the rest as one."""
    size = min(size, len(log_p_TK))
    whole = len(log_p_TK) // size
    parts = [log_p_TK[: whole * size].reshape(whole, -1, log_p_TK.shape[-1]), log_p_TK[None, whole * size :]]
    return [part.swapaxes(0, 1) for part in parts if part.size]


def _alone(members: Members, texts: Mapping[str, Text], scores: Scores) -> dict[str, Row]:
    """Every member as a single model, by path of its node."""
    sizes, rows = {path: text.bytes for path, text in texts.items()}, {}
    for index, (node, theta) in enumerate(members.thetas.items()):
        losses = {
            path: -float(log_p_TK[:, index].mean()) / texts[path].bytes_per_token
            for path, log_p_TK in scores.log_p.items()
        }
        rows[node] = Row(
            losses=losses,
            loss=_mean(losses, sizes),
            models=1,
            memory_bytes=theta.nbytes,
            passes_per_token=1.0,
            seconds=scores.seconds[index],
        )
    return rows


def _mean(losses: Mapping[str, float], sizes: Mapping[str, int]) -> float:
    """The mean of losses by path, weighted by the sizes of the texts."""
    return sum(loss * sizes[path] for path, loss in losses.items()) / sum(sizes.values())


def values(measures: CouncilMeasures) -> dict[str, Any]:
    """The measures as JSON."""
    return dict(finite(asdict(measures)))


def table(run: str, measures: CouncilMeasures) -> FittingTable:
    """The measures as a table for the terminal: a row for each model, a column for each text."""
    price = [Column("models", rank=2), Column("bytes\nin memory", rank=2), Column("passes\nper token", rank=2)]
    texts = [Column(path.partition("/")[2].replace("/", "\n"), rank=3) for path in measures.heldout_bytes]
    heads = [Column("model", is_number=False), Column("all texts"), *texts, *price, Column("seconds", rank=2)]
    caption = f"nats per byte by text; the weights begin anew after {measures.document:,} tokens of a text"
    drawn = FittingTable(f"{run}: held-out text, the council and its members", heads, caption=caption)
    for name, row in measures.rows.items():
        losses = [f"{row.losses[path]:.4f}" for path in measures.heldout_bytes]
        paid = [str(row.models), amount(row.memory_bytes), f"{row.passes_per_token:.2f}", f"{row.seconds:.1f}"]
        drawn.add_row(name, f"{row.loss:.4f}", *losses, *paid, style="bold" if name == COUNCIL else "")
    return drawn
