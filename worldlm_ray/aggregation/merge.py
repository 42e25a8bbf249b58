"""How a node moves to its parent on a pull; the same for clients and federations.

    backbone   theta <- theta + m (parent - anchor)
    keys       theta <- theta + attention(anchor, parent) - anchor

The anchor is the node's model as it was when it last pushed. Where nothing happened since, anchor and theta are one
and the rule reads theta = (1 - m) own + m parent. Where children went on meanwhile, their progress theta - anchor is
kept whole, whatever m is.

m is a number, or `adaptive`: all (1) while the node and the others go the same way, nothing (0) when they part.

    d      where the node is, seen from the parent's model at the node's last pull
    D      how the parent's model moved since then, less the node's own share in that
    m      1 if cos(d, D) >= merge.agreement, else 0

For a node that followed last time, d is the change that its last round made: the direction in which its loss falls, as
far as a round of training can tell. D is where the parent leads. To first order the node gains by following as long as
the two agree. For one that did not, d is mostly the way it has gone alone; it comes back only if the parent comes its
way, since the mean of models that have parted is worse than either. (Judging a blend by its loss at the moment of the
pull always picks the node's own model: a blend has to be trained before it is better.) The test needs no pass over
text, and it looks at nothing that has not been pushed: under differential privacy it costs nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from worldlm_ray.aggregation.attention import attend
from worldlm_ray.aggregation.fold import OWN
from worldlm_ray.aggregation.residuals import fold_residuals
from worldlm_ray.config.federated import AggregationConfig
from worldlm_ray.exchange.messages import Model
from worldlm_ray.records import AttentionRecord, MergeRecord
from worldlm_ray.tensors.buffers import Flat, blocks, frozen, lerp
from worldlm_ray.tensors.layout import Layout

PARENT = "(parent)"
"""The parent, among the candidates of attention."""
_NOTHING = 1e-10
"""Squared movements below this share of the whole are rounding."""


@dataclass(frozen=True, kw_only=True)
class Moved:
    """What a node has to say of itself: where it was when it last pushed, and its work before that."""

    now: Flat
    """The whole model, or its backbone."""
    since: Flat | None = None
    """The same before the work that was pushed ..."""
    change: Flat | None = None
    """... or the change that the work made."""

    def work(self, part: slice) -> npt.NDArray[np.float64]:
        """A block of the change that the work made."""
        if self.change is not None:
            return self.change[part].astype(np.float64)
        assert self.since is not None, "one of since and change is given"
        work: npt.NDArray[np.float64] = self.now[part].astype(np.float64) - self.since[part]
        return work


class Merger:
    """The rule of one node.

    Args:
        path: the node's path, for the record.
        layout: the model's layout.
        rules: how key layers are blended.
        m: how far the backbone moves to the parent, 0 to 1, or `adaptive`.
        agreement: the least cosine at which an adaptive node follows.
        initial: the run's initial parameters; not copied, must not change.
    """

    def __init__(
        self,
        *,
        path: str,
        layout: Layout,
        rules: AggregationConfig,
        m: float | int | str,
        agreement: float,
        initial: Flat,
    ) -> None:
        self.path, self.layout, self.rules = path, layout, rules
        self.m, self.agreement = m, agreement
        self.initial_keys = initial[layout.backbone_size :].copy()
        """The run's initial key layers: scores measure displacements from here."""
        self.last_parent_model = frozen(initial) if self.adaptive else None
        """The parent's model at the last pull; kept only where m is adaptive."""

    @property
    def adaptive(self) -> bool:
        """Whether the node decides on every pull anew."""
        return self.m == "adaptive"

    def judge(self, model: Model, moved: Moved | None, *, now_s: float) -> tuple[float, MergeRecord]:
        """How far to move to this model of the parent; remembers the model for the next time.

        Args:
            model: the parent's.
            moved: the node's own movement; None where it has pushed nothing.
            now_s: run time, for the record.

        Returns:
            m, and what tracking is told.
        """
        m, cosine = self.m, None
        if self.last_parent_model is not None:
            m = 1.0
            if moved is not None:
                cosine = agreement(
                    moved, model.values, self.last_parent_model, share=model.share, size=self.layout.backbone_size
                )
                m = float(cosine >= self.agreement)
            self.last_parent_model = frozen(model.values)
        record = MergeRecord(node=self.path, now_s=now_s, version=model.version, m=float(m), agreement=cosine)
        return float(m), record

    def backbone(self, m: float, theta: Flat, anchor: Flat, model: Model, *, out: Flat) -> Flat | None:
        """Merge the backbones of whole buffers into `out`.

        Args:
            m: what `judge` said.
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
        self, m: float, theta: Flat, anchor: Flat, model: Model, *, own_tokens: float, now_s: float, out: Flat
    ) -> AttentionRecord | None:
        """Blend the key parts of whole buffers into `out`: those of the anchor with the parent's, progress since kept.

        Args:
            m: what `judge` said: a node that does not follow keeps its key layers, too.
            theta: the node's model.
            anchor: the node's model when it last pushed.
            model: the parent's.
            own_tokens: tokens per update of the node's own work, beside the parent's `model.tokens`.
            now_s: run time, for the record.
            out: the merged model; its key part is overwritten.

        Returns:
            The weights, or None where nothing was blended: there are no key layers, they are personal, or the node
            does not follow.
        """
        layout, part = self.layout, slice(self.layout.backbone_size, None)
        if not layout.key_layers:
            return None
        if self.rules.attention.personal or (self.adaptive and m == 0.0):
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


def agreement(moved: Moved, parent: Flat, heard: Flat, *, share: float, size: int) -> float:
    """Cosine of where a node went and where its parent went, without what the node itself put into the parent's.

    Args:
        moved: the node's own movement.
        parent: the parent's model now.
        heard: the parent's model at the last pull.
        share: the multiple of the node's own work that is in the parent's movement.
        size: elements to look at, from the beginning of the buffers.

    Returns:
        -1 to 1; 0 where either has not moved, so that nothing can be said.
    """
    product = mine = others = whole = 0.0
    for part in blocks(size):
        before = heard[part].astype(np.float64)
        d = moved.now[part] - before
        lead = parent[part] - before
        whole += float(np.dot(lead, lead))
        lead -= share * moved.work(part)
        product += float(np.dot(d, lead))
        mine += float(np.dot(d, d))
        others += float(np.dot(lead, lead))
    if mine == 0.0 or others <= _NOTHING * whole:
        return 0.0
    return product / math.sqrt(mine * others)
