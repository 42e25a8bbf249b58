"""The rule `sums`: updates are changes of exact sums, and the next model is their mean (sums.py)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from worldlm_ray.aggregation.fold import Fold
from worldlm_ray.aggregation.rules import aggregation_rule
from worldlm_ray.aggregation.server_optimizer import ServerOptimizer
from worldlm_ray.aggregation.sums import Sums
from worldlm_ray.config.federated import AggregationConfig
from worldlm_ray.errors import AggregationError
from worldlm_ray.exchange.messages import Update
from worldlm_ray.tensors.buffers import Flat, squared_norm
from worldlm_ray.tensors.layout import Layout


@aggregation_rule("sums")
class SumsFold(Fold):
    """The mean S / N over all children that have ever pushed, each with its newest model and one fixed weight.

    A child that is late leaves its former model in the mean: there is nothing to discount. The sums outlive the
    aggregation; an update is in them at once, and in the published model with the aggregation.

    Source: arXiv 2403.12313 (the mean of B is exact where A is frozen).

    Args:
        layout: as for `Fold`; without key layers.
        rules: as for `Fold`.
        origin: as for `Fold`.
        first_s: as for `Fold`.
        buffer: as for `Fold`.
        sums: of the node.
    """

    def __init__(
        self,
        layout: Layout,
        rules: AggregationConfig,
        *,
        origin: Flat,
        first_s: float,
        buffer: Flat | None = None,
        sums: Sums | None = None,
    ) -> None:
        super().__init__(layout, rules, origin=origin, first_s=first_s, buffer=buffer)
        self.sums = Sums(layout.size) if sums is None else sums

    @classmethod
    def models_held(cls, rules: AggregationConfig, children: int) -> int:
        """S and, of a federation, its part in its parent's sums and what that changes by: two each; and the rest."""
        return 7

    @classmethod
    def incompatible_with(cls, rules: AggregationConfig) -> str | None:
        """What would change a child's update: its part in the sums could then not be taken out again."""
        if rules.server_optimizer.name != "sgd" or rules.server_optimizer.lr not in (None, 1.0):
            return "aggregation.server_optimizer is no mean (sgd with lr 1.0)"
        if rules.staleness.fn != "constant":
            return f"aggregation.staleness.fn is {rules.staleness.fn}"
        if rules.robust.clip_norm is not None:
            return f"aggregation.robust.clip_norm is {rules.robust.clip_norm:g}"
        waits = (rules.trigger == "goal_achieved" and rules.buffer_size > 1) or rules.trigger == "time_up"
        # A child subtracts its own part of what it pulls, so that all that was accepted of it must be in there.
        return f"aggregation.trigger is {rules.trigger}, with updates that wait" if waits else None

    def add(self, update: Update, tau: int, theta: Flat) -> list[float]:
        """Take an update into the sums; see `Fold.add`."""
        self.sums.add(update)
        self.count(update)
        return []

    def finish(
        self, theta: Flat, optimizer: ServerOptimizer, *, absent: Sequence[Sequence[float]]
    ) -> tuple[Flat, float, list[list[float]]]:
        """The mean is the next model; see `Fold.finish`.

        Raises:
            AggregationError: nothing was folded in.
        """
        if not self.contributors:
            raise AggregationError("nothing was folded in: there is no update to aggregate")
        self.sums.mean(self.flat)
        return self.flat, float(np.sqrt(squared_norm(self.flat, theta))), []
