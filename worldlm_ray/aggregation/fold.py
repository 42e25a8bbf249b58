"""Updates on their way to becoming the next model: one buffer, folded into as they arrive.

    flat = [ sum_i tokens_i s(tau_i) backbone change_i  |  unnormalised softmax blend of key layers ]

A node's memory therefore does not grow with its number of children, and when the fold is finished the same buffer
*is* the next model.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from worldlm_ray.aggregation.attention import OnlineAttention, scores, with_prior
from worldlm_ray.aggregation.server_optimizer import ServerOptimizer
from worldlm_ray.aggregation.staleness import discount
from worldlm_ray.config import AggregationConfig
from worldlm_ray.errors import AggregationError
from worldlm_ray.messages import Update
from worldlm_ray.params import Flat, Layout, add_scaled, squared_norm

OWN = "(own)"
"""The node itself, among the candidates of attention."""


class Fold:
    """The running sums of one aggregation.

    Args:
        layout: the model's layout.
        rules: staleness and attention.
        origin: the run's initial key layers.
        first_s: when the first update arrived.
    """

    def __init__(self, layout: Layout, rules: AggregationConfig, *, origin: Flat, first_s: float) -> None:
        self.layout, self.rules, self.origin, self.first_s = layout, rules, origin, first_s
        self.flat = np.zeros(layout.size, np.float32)
        self.attention = OnlineAttention(layout.key_layers, self.flat[layout.backbone_size :])
        self.tokens = 0
        """Undiscounted weight."""
        self.contributors: list[str] = []
        self.shares: dict[str, float] = {}
        """Weight of every child's work in the sum; after `finish`, in the mean."""

    def add(self, update: Update, tau: int, theta: Flat) -> list[float]:
        """Fold an update in: one pass over each of its parts.

        Args:
            update: a child's update.
            tau: its staleness.
            theta: the node's model now; its key layers are the query.

        Returns:
            The scores of the update's key layers against the node's own.
        """
        split = self.layout.backbone_size
        weight = update.tokens * discount(self.rules.staleness, tau)
        factor, keys = self.clipping(update, theta), update.values[split:]
        add_scaled(self.flat[:split], update.values[:split], weight * factor)
        if factor < 1.0:
            keys = theta[split:] + np.float32(factor) * (keys - theta[split:])
        fit = self._attend(update.sender, keys, weight, query=theta[split:])
        self.tokens += update.tokens
        self.contributors.append(update.sender)
        self.shares[update.sender] = self.shares.get(update.sender, 0.0) + weight
        return [value * self.rules.attention.temperature for value in fit]

    def clipping(self, update: Update, theta: Flat) -> float:
        """By how much an update is shortened: 1 unless its backbone change or any key layers go too far."""
        bound, split = self.rules.robust.clip_norm, self.layout.backbone_size
        if bound is None:
            return 1.0
        squared = squared_norm(update.values[:split]) + squared_norm(update.values[split:], theta[split:])
        return min(1.0, bound / max(math.sqrt(squared), 1e-12))

    def finish(self, theta: Flat, optimizer: ServerOptimizer, *, members: int) -> tuple[Flat, float, list[list[float]]]:
        """Turn the sums into the next model. The fold must not be used afterwards.

        The node's own key layers join the candidates for the children that are not in this aggregation, with as
        much weight as each of them would have had: in a full round they count for nothing (the blend of equal
        children is their plain mean), and with a buffer of one they keep the others' share. The step of the
        backbone is shortened to the share of children present in the same way, unless its rate was set.

        Args:
            theta: the model now.
            optimizer: the node's server optimizer.
            members: number of children that belong to the node.

        Returns:
            The next model, the L2 norm of the backbone's step, and the attention weights [key layers][candidates].

        Raises:
            AggregationError: nothing was folded in.
        """
        if self.tokens <= 0:
            raise AggregationError("nothing was folded in: there is no update to aggregate")
        split = self.layout.backbone_size
        absent = max(members - len(set(self.contributors)), 0)
        mean_tokens = self.tokens / len(self.contributors)
        weights: list[list[float]] = []
        if self.layout.key_layers:
            own, mass = theta[split:], mean_tokens * (absent + self.rules.attention.self_weight)
            self._attend(OWN, own, mass, query=own)
            weights = self.attention.weights()
            self.attention.result()
        # Dividing by the undiscounted weight lets stale updates shorten the step (FedBuff, algorithm 1).
        scale = 1.0 / self.tokens
        if self.rules.server_optimizer.lr is None:
            # Updates that come one by one would otherwise add up to a step as many times too long.
            scale *= 1.0 - absent / max(members, 1)
        self.shares = {name: weight * scale for name, weight in self.shares.items()}
        norm = optimizer.apply(self.flat[:split], theta[:split], scale=scale)
        return self.flat, norm, weights

    def _attend(self, name: str, keys: Flat, prior: float, *, query: Flat) -> list[float]:
        if not self.layout.key_layers:
            return []
        fit = scores(self.rules.attention, self.layout.key_layers, query, keys, self.origin)
        self.attention.fold(name, keys, with_prior(fit, prior))
        return fit

    def state(self) -> dict[str, Any]:
        """Everything but the buffers, as JSON values."""
        attention = self.attention
        return {
            "tokens": self.tokens,
            "contributors": list(self.contributors),
            "shares": dict(self.shares),
            "first_s": self.first_s,
            "maximum": list(attention.maximum),
            "total": list(attention.total),
            "names": list(attention.names),
            "logits": [list(row) for row in attention.logits],
        }

    def arrays(self) -> dict[str, Flat]:
        """The buffers."""
        return {"flat": self.flat}

    def restore(self, saved: dict[str, Any], arrays: dict[str, Flat]) -> None:
        """Become what `state` and `arrays` described."""
        self.flat[:] = arrays["flat"]
        self.tokens, self.contributors = saved["tokens"], list(saved["contributors"])
        self.shares = dict(saved.get("shares", {}))
        self.first_s = saved["first_s"]
        self.attention.maximum, self.attention.total = list(saved["maximum"]), list(saved["total"])
        self.attention.names, self.attention.logits = list(saved["names"]), [list(row) for row in saved["logits"]]
