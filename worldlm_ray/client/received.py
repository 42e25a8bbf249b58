"""What a client of a smaller rank takes of its parent's model: see worldlm_ray/model/smaller_rank.py."""

from __future__ import annotations

from dataclasses import replace

from worldlm_ray.exchange.messages import Model, Pulled
from worldlm_ray.model.smaller_rank import SmallerRank
from worldlm_ray.tensors.buffers import frozen


def of_rank(model: Pulled, rank: SmallerRank | None) -> Pulled:
    """The model with zeros beyond the client's rank, in its residuals too. It stays as it is without a rank."""
    if rank is None or not isinstance(model, Model):
        return model
    begins = {layer.name: rank.world.backbone_size + layer.start for layer in rank.world.key_layers}
    residuals = tuple(
        replace(each, values=frozen(rank.within(each.values, start=begins[each.layer]))) for each in model.residuals
    )
    return replace(model, values=frozen(rank.within(model.values)), residuals=residuals)
