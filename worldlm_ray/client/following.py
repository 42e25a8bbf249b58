"""A paused client follows its parent: it trains no more, and takes the parent's model from time to time.

It moves to the parent's model by its merge rule. What it has learned itself stays in it. One that has never trained has
learned nothing: it takes the parent's backbone whole.

This costs no privacy: nothing is read but what was paid for and what the parent publishes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from worldlm_ray.exchange.messages import Model
from worldlm_ray.records import MergeRecord, Record

if TYPE_CHECKING:
    from worldlm_ray.client.client import Client


def follow(client: Client, model: Model, *, now_s: float) -> list[Record]:
    """Move a paused client's model to its parent's: see `Client.follow`.

    Args:
        client: whose model it is.
        model: the parent's, newer than the one that the client knows.
        now_s: run time.

    Returns:
        What tracking is told: how far the client followed, and the attention weights of the key layers.
    """
    link, own = client.link, client.trainer.read()
    link.end_exchange()
    m = client.spec.settings.merge.client_m if client.round else 1.0
    client.merger.backbone(m, own, own, model, out=link.anchor)
    tokens = float(client.round_tokens)
    weights = client.merger.keys(own, own, model, own_tokens=tokens, now_s=now_s, out=link.anchor)
    client.trainer.write(link.anchor)
    link.heard(model)
    client.progress = model.progress
    followed = MergeRecord(node=client.spec.path, now_s=now_s, version=model.version, m=m)
    return [followed] if weights is None else [followed, weights]
