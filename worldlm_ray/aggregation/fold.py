"""Updates on their way to becoming the next model: one buffer, folded into as they arrive.

    flat = [ sum_i tokens_i s(tau_i) backbone change_i  |  unnormalised softmax blend of key layers' changes ]

A change is measured from the parent's model that the child began with. A child that has been away for some versions
is therefore blended as it would stand now, and does not take back what its siblings have done meanwhile.

A node's memory therefore does not grow with its number of children, and when the fold is finished the same buffer
*is* the next model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from worldlm_ray.aggregation.attention import OnlineAttention, log_sum, scores, with_prior
from worldlm_ray.aggregation.rules import aggregation_rule
from worldlm_ray.aggregation.server_optimizer import ServerOptimizer
from worldlm_ray.aggregation.staleness import discount
from worldlm_ray.config.federated import AggregationConfig
from worldlm_ray.errors import AggregationError, CheckpointError
from worldlm_ray.exchange.messages import Update
from worldlm_ray.tensors.buffers import Flat, add_scaled, squared_norm
from worldlm_ray.tensors.layout import Layout

OWN = "(own)"
"""The node itself, among the candidates of attention."""
_FIRST, _SUM = "first", "sum"


@aggregation_rule("mean")
class Fold:
    """The running sums of one aggregation: the mean, weighted by tokens and staleness.

    Source: FedAvg, arXiv 1602.05629; FedBuff, algorithm 1; the softmax blend of key layers: attention.py.

    The rules that say what kind of fold it is hold until the aggregation is made: the sums of one are none of another.

    Args:
        layout: the model's layout.
        rules: staleness, attention, clipping, and whether the server optimizer's rate was set.
        origin: the run's initial key layers.
        first_s: when the first update arrived.
        buffer: to fold into, instead of a new one; its contents do not matter. Fresh memory costs as much as a copy.
    """

    kind: str
    """Its name among the rules."""

    def __init__(
        self,
        layout: Layout,
        rules: AggregationConfig,
        *,
        origin: Flat,
        first_s: float,
        buffer: Flat | None = None,
    ) -> None:
        self.layout, self.rules, self.origin, self.first_s = layout, rules, origin, first_s
        self.flat = np.empty(layout.size, np.float32) if buffer is None else buffer
        self.flat[layout.backbone_size :] = 0.0
        self._first: tuple[Flat, float] | None = None
        """The backbone of the first update and its weight, as long as it is the only one. It is in `flat` only when the
        next pass, for the second or for the next model, has read it."""
        self.claimed: dict[str, int] = {}
        """Undiscounted weight by child."""
        self.attention = OnlineAttention(layout.key_layers, self.flat[layout.backbone_size :])
        self.fits: list[list[float]] = []
        """Scores of the updates' key layers against the node's own, by the temperature."""
        self.tokens = 0
        """Undiscounted weight of all updates."""
        self.contributors: list[str] = []

    @classmethod
    def models_held(cls, rules: AggregationConfig, children: int) -> int:
        """Models that are kept until the aggregation is made, beside the one that is built: none."""
        return 0

    @classmethod
    def incompatible_with(cls, rules: AggregationConfig) -> str | None:
        """A setting that does not go with the rule, as `key is value`; None if all do."""
        return None

    def add(self, update: Update, tau: int, theta: Flat) -> list[float]:
        """Fold an update in: one pass over its backbone, and one over its key layers.

        Args:
            update: a child's update.
            tau: its staleness.
            theta: the node's model now; its key layers are the query.

        Returns:
            The scores of the update's key layers against the node's own, by the temperature.
        """
        weight, clipped = update.tokens * discount(self.rules.staleness, tau), self.clipping(update)
        fit = self.fit(update, theta, clipped=clipped)
        self.fold(update, weight, with_prior(fit, weight), clipped=clipped)
        self.count(update)
        return fit

    def fit(self, update: Update, theta: Flat, *, clipped: float) -> list[float]:
        """Scores of the update's key layers against the node's own, by the temperature; none without key layers."""
        if not self.layout.key_layers:
            return []
        own = theta[self.layout.backbone_size :]
        changed = own + self._key_change(update, clipped)
        fit = scores(self.rules.attention, self.layout.key_layers, own, changed, self.origin)
        self.fits.append(fit)
        return fit

    def fold(self, update: Update, weight: float, logits: Sequence[float], *, clipped: float) -> None:
        """Add an update to the sums.

        Args:
            update: a child's update.
            weight: of its backbone.
            logits: of its key layers.
            clipped: by how much it is shortened.
        """
        split = self.layout.backbone_size
        backbone = update.values[:split]
        if not self.claimed:
            self._first = (backbone, weight * clipped)
        else:
            add_scaled(self.flat[:split], backbone, weight * clipped, first=self._first)
            self._first = None
        if self.layout.key_layers:
            self.attention.fold(update.sender, self._key_change(update, clipped), logits)

    def _key_change(self, update: Update, clipped: float) -> Flat:
        change = update.values[self.layout.backbone_size :]
        return change if clipped == 1.0 else np.float32(clipped) * change

    def count(self, update: Update) -> None:
        """Note who is in the sum, with what."""
        self.tokens += update.tokens
        self.contributors.append(update.sender)
        self.claimed[update.sender] = self.claimed.get(update.sender, 0) + update.tokens

    def clipping(self, update: Update) -> float:
        """By how much an update is shortened: 1 unless it goes too far."""
        bound = self.rules.robust.clip_norm
        return 1.0 if bound is None else min(1.0, bound / max(math.sqrt(squared_norm(update.values)), 1e-12))

    def finish(
        self, theta: Flat, optimizer: ServerOptimizer, *, absent: Sequence[Sequence[float]]
    ) -> tuple[Flat, float, list[list[float]]]:
        """Turn the sums into the next model. The fold must not be used afterwards.

        The node's own key layers join the candidates for the children that are not in this aggregation, with the
        weight that each of them would have had by its last scores: in a full round they count for nothing (the blend of
        equal children is their plain mean), and with a buffer of one they keep the others' share. The step of the
        backbone is shortened to the share of children present in the same way, unless its rate was set.

        Args:
            theta: the model now.
            optimizer: the node's server optimizer.
            absent: what `add` returned last for each child that belongs to the node and is not in this aggregation;
                empty of a child that was in none yet.

        Returns:
            The next model, the L2 norm of the backbone's step, and the attention weights [key layers, candidates].

        Raises:
            AggregationError: nothing was folded in.
        """
        if self.tokens <= 0:
            raise AggregationError("nothing was folded in: there is no update to aggregate")
        split = self.layout.backbone_size
        weights: list[list[float]] = []
        if self.layout.key_layers:
            own = theta[split:]
            self.attention.fold(OWN, None, self._own_logits(absent))
            weights = self.attention.weights()
            keys = self.attention.result()
            keys += own
        # Dividing by the undiscounted weight lets stale updates shorten the step (FedBuff, algorithm 1).
        scale = 1.0 / self.divisor
        if self.rules.server_optimizer.lr is None:
            scale *= self.present(len(absent))
        norm = optimizer.apply(self.flat[:split], theta[:split], scale=scale, first=self._first)
        return self.flat, norm, weights

    @property
    def divisor(self) -> float:
        """What the sum is divided by: the undiscounted weight of all updates."""
        return sum(self.claimed.values())

    def present(self, absent: int) -> float:
        """Share of the children that are in this aggregation.

        Updates that come one by one would otherwise add up to a step as many times too long.
        """
        return len(self.claimed) / (len(self.claimed) + absent)

    def _own_logits(self, absent: Sequence[Sequence[float]]) -> list[float]:
        """The weight of the node's own key layers, which stand for absent children."""
        tokens = self.tokens / len(self.contributors)
        # Of a child that has sent nothing yet, these here are the best guess.
        middle = [sum(column) / len(column) for column in zip(*self.fits, strict=True)]
        if not absent:
            return [-math.inf] * len(middle)
        return with_prior(log_sum([fit or middle for fit in absent]), tokens)

    def state(self) -> dict[str, Any]:
        """Everything but the buffers, as JSON values."""
        attention = self.attention
        return {
            "kind": self.kind,
            "rules": self._kind_rules(),
            "tokens": self.tokens,
            "fits": [list(fit) for fit in self.fits],
            "contributors": list(self.contributors),
            "first_s": self.first_s,
            "claimed": dict(self.claimed),
            "first_weight": None if self._first is None else self._first[1],
            "maximum": list(attention.maximum),
            "total": list(attention.total),
            "names": list(attention.names),
            "logits": [list(row) for row in attention.logits],
        }

    def arrays(self) -> dict[str, Flat]:
        """The buffers."""
        split = self.layout.backbone_size
        found = {"keys": self.flat[split:]}
        if self._first is not None:
            found[_FIRST] = self._first[0]
        elif self.claimed:
            found[_SUM] = self.flat[:split]
        return found

    def _kind_rules(self) -> dict[str, Any]:
        """The settings on which the kind depends, by key."""
        return {
            "aggregation.rule": self.rules.rule,
            "aggregation.max_share": self.rules.max_share,
            "aggregation.robust.rule": self.rules.robust.rule,
        }

    def _require_kind(self, saved: dict[str, Any]) -> None:
        """Refuse sums of another kind."""
        old = "capped" if "kept" in saved else "robust" if "counts" in saved else self.kind
        if (old := saved.get("kind", old)) == self.kind:
            return
        mine, before = self._kind_rules(), {"aggregation.rule": "mean"} | saved.get("rules", {})
        if self.kind != "robust" and old != "robust":
            del mine["aggregation.robust.rule"]  # max_share alone makes the difference
        changed = [key for key in mine if before.get(key) != mine[key]]
        now = ", ".join(f"{key} is {mine[key]}" for key in changed)
        if "private" in (old, self.kind):
            changed, now = [], "privacy.unit is another one"
        cure = " ".join(f"{key}={before[key]}" for key in changed if key in before) or "its value of before"
        held = f"{len(set(saved['contributors']))} children's updates wait in an aggregation that was begun otherwise"
        raise CheckpointError(f"{now}, but {held}; resume with {cure}")

    def restore(self, saved: dict[str, Any], arrays: dict[str, Flat]) -> None:
        """Become what `state` and `arrays` described.

        Raises:
            CheckpointError: they are of another kind of fold.
        """
        self._require_kind(saved)
        split, weight = self.layout.backbone_size, saved["first_weight"]
        self.claimed = dict(saved["claimed"])
        self._first = None if weight is None else (arrays[_FIRST], weight)
        self.flat[split:] = arrays["keys"]
        if _SUM in arrays:
            self.flat[:split] = arrays[_SUM]
        self.tokens, self.contributors = saved["tokens"], list(saved["contributors"])
        self.fits = [list(fit) for fit in saved["fits"]]
        self.first_s = saved["first_s"]
        self.attention.maximum, self.attention.total = list(saved["maximum"]), list(saved["total"])
        self.attention.names, self.attention.logits = list(saved["names"]), [list(row) for row in saved["logits"]]
