"""How a node moves to its parent on a pull; the same for clients and federations.

    backbone   theta <- theta + m (parent - anchor)
    keys       attention over the node's own and the parent's

The anchor is the node's backbone as it was when it last pushed. Where nothing happened since, anchor and theta are one
and the rule reads theta = (1 - m) own + m parent. Where children went on meanwhile, their progress theta - anchor is
kept whole, whatever m is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from worldlm_ray.aggregation.attention import attend
from worldlm_ray.aggregation.fold import OWN
from worldlm_ray.config import AttentionConfig
from worldlm_ray.messages import Model
from worldlm_ray.params import Flat, Layout, lerp
from worldlm_ray.records import AttentionRecord

PARENT = "(parent)"
"""The parent, among the candidates of attention."""


@dataclass(frozen=True, kw_only=True)
class Merger:
    """The rule of one node.

    Args:
        path: the node's path, for the record.
        layout: the model's layout.
        attention: how key layers are blended.
        m: how far the backbone moves to the parent, 0 to 1.
        origin: the run's initial key layers.
    """

    path: str
    layout: Layout
    attention: AttentionConfig
    m: float
    origin: Flat

    def backbone(self, theta: Flat, anchor: Flat, parent: Flat, *, out: Flat) -> Flat | None:
        """Merge the backbone parts of whole buffers into `out`.

        Returns:
            The new anchor, whole; None where it is the merged model itself.
        """
        part = slice(0, self.layout.backbone_size)
        if anchor is theta:
            lerp(theta[part], parent[part], self.m, out=out[part])
            return None
        moved = anchor.copy()
        lerp(anchor[part], parent[part], self.m, out=moved[part])
        np.subtract(moved[part], anchor[part], out=out[part])
        np.add(out[part], theta[part], out=out[part])
        return moved

    def keys(self, own: Flat, model: Model, *, own_tokens: float, now_s: float, out: Flat) -> AttentionRecord | None:
        """Blend the key parts of whole buffers into `out`.

        Args:
            own: the node's model.
            model: the parent's.
            own_tokens: tokens per update of the node's own work, beside the parent's `model.tokens`.
            now_s: run time, for the record.
            out: the merged model; its key part is overwritten.

        Returns:
            The weights, or None where there are no key layers or they are personal.
        """
        layout, part = self.layout, slice(self.layout.backbone_size, None)
        if not layout.key_layers:
            return None
        if self.attention.personal:
            out[part] = own[part]
            return None
        out[part] = 0.0
        candidates = [(OWN, own[part], own_tokens), (PARENT, model.values[part], model.tokens)]
        blend = attend(self.attention, layout.key_layers, own[part], candidates, self.origin, out=out[part])
        weights = blend.weights()
        blend.result()
        return AttentionRecord(
            node=self.path,
            now_s=now_s,
            version=model.version,
            direction="down",
            layers=tuple(layer.name for layer in layout.key_layers),
            candidates=tuple(blend.names),
            weights=tuple(tuple(row) for row in weights),
        )
