"""What the members of a council make of the texts of a run's clients: log probabilities of every token."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from worldlm_ray.client.measure import MeasuredModel
from worldlm_ray.data.dataset import Batch
from worldlm_ray.experiments.council import Floats
from worldlm_ray.experiments.council_members import Members
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.tree import NodeSpec
from worldlm_ray.tensors.targets import IGNORED
from worldlm_ray.training.local import LocalTrainer

PRIOR_TOKENS = 8_192
"""Validation tokens of a client, at most, on which a prior is fitted."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Text:
    """A part of a client's text."""

    batches: list[Batch]
    bytes_per_token: float
    bytes: int
    """Size of the whole part."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """Every text under every member."""

    log_p: dict[str, Floats]
    """Log probabilities of the tokens [T, K], by path of the client."""
    seconds: list[float]
    """Wall seconds by member."""


def texts_of(
    plan: Plan,
    specs: Sequence[NodeSpec],
    trainer: LocalTrainer,
    *,
    part: Literal["heldout", "validation"],
    tokens: int,
) -> dict[str, Text]:
    """A part of the clients' texts, by path. Clients with private losses, or without that part, are left out.

    Args:
        plan: the run.
        specs: the clients.
        trainer: holds a model.
        part: of the text.
        tokens: per client, at most.
    """
    found = {}
    for spec in specs:
        client = MeasuredModel(plan, spec, make_trainer=lambda _: trainer)
        data, sizes = client.dataset, {"context": plan.shape.context, "batch_size": spec.settings.training.batch_size}
        if not client.reports:
            continue
        if part == "heldout":
            batches, mean = data.heldout_windows(tokens, **sizes), data.heldout_bytes_per_token()
            found[spec.path] = Text(batches=list(batches), bytes_per_token=mean, bytes=data.heldout_bytes)
        elif client.has_validation:
            batches, mean = data.validation_windows(tokens, **sizes), data.validation_bytes_per_token()
            found[spec.path] = Text(batches=list(batches), bytes_per_token=mean, bytes=data.validation_bytes)
    return found


def scored(
    trainer: LocalTrainer,
    members: Members,
    texts: Mapping[str, Text],
    *,
    on_phase: Callable[[str], None] = lambda _: None,
) -> Scores:
    """Read every text with every member.

    Args:
        trainer: takes the models, one after the other.
        members: the models.
        texts: by path of the client.
        on_phase: called with the member that reads next.
    """
    seconds = list[float]()
    columns: dict[str, list[Floats]] = {path: [] for path in texts}
    for number, (node, theta) in enumerate(members.thetas.items(), 1):
        on_phase(f"measuring {node} on {len(texts)} texts ({number} of {len(members.thetas)} models)")
        began = time.perf_counter()
        trainer.write(theta)
        for path, text in texts.items():
            columns[path].append(log_probabilities(trainer, text.batches))
        seconds.append(time.perf_counter() - began)
    return Scores(log_p={path: np.stack(found, axis=1) for path, found in columns.items()}, seconds=seconds)


@torch.no_grad()
def log_probabilities(trainer: LocalTrainer, batches: Iterable[Batch]) -> Floats:
    """Log probability of every counted target, [T], in the order of the batches' rows.

    Args:
        trainer: holds the model.
        batches: token ids and targets, [B, context] each.
    """
    torch.set_num_threads(trainer.threads)
    trainer.model.eval()
    found = []
    for inputs, targets in batches:
        tokens_BT = torch.from_numpy(inputs).to(trainer.device)
        targets_BT = torch.from_numpy(targets).to(trainer.device)
        with torch.autocast(trainer.device.type, dtype=torch.bfloat16, enabled=trainer.bf16):
            losses_T = trainer.model.loss(tokens_BT, targets_BT, reduction="none")
        found.append(losses_T[targets_BT.flatten() != IGNORED])
    return -torch.cat(found).double().cpu().numpy()
