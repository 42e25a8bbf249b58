"""Client-level privacy: updates clipped as a whole as they arrive, and noise on their sum.

    flat = sum_i s(tau_i) clip(change_i, C)
    next = model + rate (flat + N(0, (z C)^2)) / K

Nothing but the clipping looks at an update: its weight is not its tokens, there is no attention over key layers, and
K is the number of updates that an aggregation is meant to have, not of those that it has. Unless the server optimizer's
rate was set, the number of children that belong to the node takes its place where that is larger. One client is in one
aggregation at most once, and s(tau) <= 1, so that adding or leaving out a client changes the sum by C at most.

Source: McMahan et al., arXiv 1710.06963, algorithm 1, with a fixed denominator.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from worldlm_ray.aggregation.fold import Fold
from worldlm_ray.aggregation.server_optimizer import ServerOptimizer
from worldlm_ray.aggregation.staleness import discount
from worldlm_ray.config.federated import AggregationConfig
from worldlm_ray.errors import AggregationError
from worldlm_ray.exchange.messages import Update
from worldlm_ray.privacy.gaussian import composed_epsilon
from worldlm_ray.tensors.buffers import Flat, add_scaled, blocks, squared_norm
from worldlm_ray.tensors.layout import Layout


@dataclass(frozen=True)
class ClientPrivacy:
    """What a node promises the clients directly below it."""

    federations: frozenset[str]
    """Children whose updates carry their own noise. All others are clients: clipped, and paid for."""
    bound: float
    """L2 norm to which a whole update is clipped (C)."""
    noise: float
    """Noise multiplier (z)."""
    delta: float
    limits: Mapping[str, int]
    """Updates that are accepted of a client at most; without an entry, any number."""
    expected: int
    """Updates that an aggregation is meant to have (K)."""
    generator: np.random.Generator
    """Of the noise; seeded from the operating system, and never saved."""
    before: Mapping[str, list[float]] = field(default_factory=dict)
    """The noise of every contribution that a client had made when this node was started."""

    def epsilon(self, client: str, contributions: int) -> float:
        """What so many contributions have cost a client, those before this node was started included."""
        before = list(self.before.get(client, ()))
        return composed_epsilon([*before, *[self.noise] * (contributions - len(before))], delta=self.delta)


class PrivateFold(Fold):
    """The running sum of one aggregation under client-level privacy.

    Args:
        layout: the model's layout.
        rules: staleness.
        privacy: clipping and noise.
        origin: the run's initial key layers.
        first_s: when the first update arrived.
        buffer: to fold into, instead of a new one.
    """

    kind = "private"

    def __init__(
        self,
        layout: Layout,
        rules: AggregationConfig,
        privacy: ClientPrivacy,
        *,
        origin: Flat,
        first_s: float,
        buffer: Flat | None = None,
    ) -> None:
        super().__init__(layout, rules, origin=origin, first_s=first_s, buffer=buffer)
        self.privacy = privacy
        self.flat[:] = 0.0

    def add(self, update: Update, tau: int, theta: Flat) -> list[float]:
        """Clip an update and fold it in."""
        weight = discount(self.rules.staleness, tau)
        if update.sender not in self.privacy.federations:
            weight *= min(1.0, self.privacy.bound / max(math.sqrt(squared_norm(update.values)), 1e-12))
        add_scaled(self.flat, update.values, weight)
        self.count(update)
        return []

    def finish(
        self, theta: Flat, optimizer: ServerOptimizer, *, absent: Sequence[Sequence[float]]
    ) -> tuple[Flat, float, list[list[float]]]:
        """Add the noise and turn the sum into the next model; see `Fold.finish`."""
        if self.tokens <= 0:
            raise AggregationError("nothing was folded in: there is no update to aggregate")
        split, privacy = self.layout.backbone_size, self.privacy
        if privacy.noise > 0.0:
            for part in blocks(self.layout.size):
                block = self.flat[part]
                noise = privacy.generator.standard_normal(block.size, np.float32)
                noise *= np.float32(privacy.noise * privacy.bound)
                block += noise
        scale = 1.0 / privacy.expected
        if self.rules.server_optimizer.lr is None:
            scale *= min(privacy.expected / (len(set(self.contributors)) + len(absent)), 1.0)
        keys = self.flat[split:]
        keys *= np.float32(scale)
        keys += theta[split:]
        norm = optimizer.apply(self.flat[:split], theta[:split], scale=scale)
        return self.flat, norm, []
