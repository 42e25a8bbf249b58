"""A paused client follows its parent: it trains no more, and takes the parent's model from time to time.

It moves to the parent's model by its merge rule. What it has learned itself stays in it. A client that does not train
has no movement of its own by which `adaptive` could judge. Its last round decides once more, and that stands: a client
that went with the others goes on following, and one that had parted keeps its model.

This costs no privacy: nothing is read but what was paid for and what the parent publishes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from worldlm_ray.aggregation.merge import Moved
from worldlm_ray.exchange.messages import Model
from worldlm_ray.records import Record

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
    pushed = link.end_exchange()
    moved = Moved(now=own, since=link.anchor) if pushed is None else Moved(now=own, change=pushed.values)
    m, judged = client.merger.judge(model, moved if client.round else None, now_s=now_s)
    if client.followed is None:
        client.followed = m if client.round else 1.0
    else:
        judged = replace(judged, m=client.followed, agreement=None)
    client.merger.backbone(client.followed, own, own, model, out=link.anchor)
    tokens = float(client.round_tokens)
    weights = client.merger.keys(client.followed, own, own, model, own_tokens=tokens, now_s=now_s, out=link.anchor)
    client.trainer.write(link.anchor)
    link.heard(model)
    client.progress = model.progress
    return [judged] if weights is None else [judged, weights]
