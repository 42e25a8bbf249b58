"""A client of two models: what becomes of them when the parent's model comes, and at the end of the run.

The rule is that of worldlm_ray/client/own_model.py; here it meets the trainer and the link to the parent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from worldlm_ray.client.own_model import OWN, PARENT, OwnModel
from worldlm_ray.exchange.messages import Model, Update
from worldlm_ray.records import MergeRecord, Record
from worldlm_ray.tensors.buffers import Flat

if TYPE_CHECKING:
    from worldlm_ray.client.client import Client


def merge(
    client: Client, own_model: OwnModel | None, model: Model, pushed: Update | None, *, now_s: float
) -> list[Record]:
    """The base takes the parent's model, and keeps what it was trained since the push. The own model is chosen.

    Args:
        client: whose models they are.
        own_model: what chooses; None of a client whose own model takes nothing from its parent's.
        model: the parent's.
        pushed: the update of the exchange that has come back, where rounds begin ahead of it.
        now_s: run time.

    Returns:
        What tracking is told: whether the client follows (m is 0 where it goes on with its own model), and the
        attention weights of the key layers.
    """
    own, base, link = client.trainer.read(), client.trainer.beside(), client.link
    trained = own if base is None else base
    keeps = pushed is not None and client.began and client.step > 0
    since = link.anchor if keeps else trained
    taken = np.empty_like(own)
    moved = client.merger.backbone(1.0, trained, since, model, out=taken)
    tokens = float(client.round_tokens)
    weights = client.merger.keys(trained, since, model, own_tokens=tokens, now_s=now_s, out=taken)
    name, chosen = OWN, own
    if own_model is not None:
        choice = own_model.choose(own=own, base=base, parent=taken)
        name, chosen = choice.name, choice.values
    if name == PARENT or not client.trainer.train_beside(taken, own=chosen):
        client.trainer.write(taken)
    if moved is None:
        link.anchor[:] = taken
    else:
        link.anchor = moved
    followed = MergeRecord(node=client.spec.path, now_s=now_s, version=model.version, m=float(name != OWN))
    return [followed] if weights is None else [followed, weights]


def stay(client: Client, model: Model, *, now_s: float) -> list[Record]:
    """Go on with the own model."""
    client.trainer.read(client.link.anchor)
    return [MergeRecord(node=client.spec.path, now_s=now_s, version=model.version, m=0.0)]


def serve(client: Client, parent: Flat) -> None:
    """Make the client's model what it serves, once, by its parent's last model [layout.size].

    A client that promises privacy has no text to choose on. It takes its parent's model: the mean of many updates holds
    less noise than its own. So does a client that is to serve that model (`merge.serve_parent`).
    """
    own_model, trainer = client.own_model, client.trainer
    if own_model is None:
        trainer.write(parent)
    elif own_model.served is None:
        trainer.write(own_model.serve(own=trainer.read(), base=trainer.beside(), parent=parent))
