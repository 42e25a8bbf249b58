"""How a node moves to its parent on a pull; the same for clients and federations.

    backbone   theta <- theta + m (parent - anchor)
    keys       theta <- theta + attention(anchor, parent) - anchor

m is `merge.client`, where that is a number, or `merge.federation`. The model that a client of two models trains for its
parent has m = 1. The anchor is the node's model as it was when it last pushed. Where nothing
happened since, anchor and theta are one and the rule reads theta = (1 - m) own + m parent. Where children went on
meanwhile, their progress theta - anchor is kept whole, whatever m is.
"""

from __future__ import annotations

import numpy as np

from worldlm_ray.aggregation.attention import attend
from worldlm_ray.aggregation.fold import OWN
from worldlm_ray.aggregation.residuals import fold_residuals
from worldlm_ray.config.federated import AggregationConfig
from worldlm_ray.exchange.messages import Model
from worldlm_ray.records import AttentionRecord
from worldlm_ray.tensors.buffers import Flat, lerp
from worldlm_ray.tensors.layout import Layout

PARENT = "(parent)"
"""The parent, among the candidates of attention."""


class Merger:
    """The rule of one node.

    Args:
        path: the node's path, for the record.
        layout: the model's layout.
        rules: how key layers are blended.
        initial: the run's initial parameters, of which the key layers are copied.
    """

    def __init__(
        self,
        *,
        path: str,
        layout: Layout,
        rules: AggregationConfig,
        initial: Flat,
    ) -> None:
        self.path, self.layout, self.rules = path, layout, rules
        self.initial_keys = initial[layout.backbone_size :].copy()
        """The run's initial key layers: scores measure displacements from here."""

    def backbone(self, m: float, theta: Flat, anchor: Flat, model: Model, *, out: Flat) -> Flat | None:
        """Merge the backbones of whole buffers into `out`.

        Args:
            m: how far to move, 0 to 1.
            theta: the node's model.
            anchor: the same as it was when it was last pushed.
            model: the parent's.
            out: the merged model; its backbone is overwritten.

        Returns:
            The new anchor, whole; None where it is the merged model itself.
        """
        part = slice(0, self.layout.backbone_size)
        parent = model.values[part]
        if anchor is theta:
            lerp(theta[part], parent, m, out=out[part])
            return None
        moved = anchor.copy()
        lerp(anchor[part], parent, m, out=moved[part])
        np.subtract(moved[part], anchor[part], out=out[part])
        np.add(out[part], theta[part], out=out[part])
        return moved

    def keys(
        self, theta: Flat, anchor: Flat, model: Model, *, own_tokens: float, now_s: float, out: Flat
    ) -> AttentionRecord | None:
        """Blend the key parts of whole buffers into `out`: those of the anchor with the parent's, progress since kept.

        Args:
            theta: the node's model.
            anchor: the node's model when it last pushed.
            model: the parent's.
            own_tokens: tokens per update of the node's own work, beside the parent's `model.tokens`.
            now_s: run time, for the record.
            out: the merged model; its key part is overwritten.

        Returns:
            The weights, or None where nothing was blended: there are no key layers, or they are personal.
        """
        layout, part = self.layout, slice(self.layout.backbone_size, None)
        if not layout.key_layers:
            return None
        if self.rules.attention.personal:
            out[part] = theta[part]
            return None
        own, keys = anchor[part], out[part]
        keys[:] = 0.0
        if own_tokens <= 0.0 and model.tokens <= 0.0:
            own_tokens = 1.0  # neither has aggregated anything: the node keeps its own
        candidates = [(OWN, own, own_tokens), (PARENT, model.values[part], model.tokens)]
        blend = attend(self.rules.attention, layout.key_layers, own, candidates, self.initial_keys, out=keys)
        fold_residuals(model.residuals, blend, own, rules=self.rules, layout=layout, origin=self.initial_keys)
        weights = blend.weights()
        blend.result()
        if anchor is not theta:
            keys += theta[part] - own
        return AttentionRecord(
            node=self.path,
            now_s=now_s,
            version=model.version,
            direction="down",
            layers=tuple(layer.name for layer in layout.key_layers),
            candidates=tuple(blend.names),
            weights=tuple(tuple(row) for row in weights),
        )
