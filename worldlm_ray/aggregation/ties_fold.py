"""Models that were trained apart, merged by TIES: trim, elect the sign, merge what agrees with it.

    trim    of a child's whole change, the fifth of the numbers with the largest magnitude stay, the others become 0
    elect   a number's sign is that of the sum of the trimmed changes
    merge   next = model + mean of the trimmed changes that have this sign

Small changes no longer thin out what others have learned, and changes that pull apart no longer cancel. Every child
counts alike, whatever its tokens. All updates of an aggregation are kept until it is made: one model per child.

Source: Yadav et al., arXiv 2306.01708, algorithm 1, with the paper's settings for where nothing is tuned: k = 20 % and
lambda = 1, which is `server_optimizer.lr` here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from worldlm_ray.aggregation.robust_fold import RobustFold
from worldlm_ray.aggregation.rules import aggregation_rule
from worldlm_ray.aggregation.server_optimizer import ServerOptimizer
from worldlm_ray.config.federated import AggregationConfig
from worldlm_ray.tensors.buffers import Flat

KEPT = 0.2
"""Share of a child's numbers that stay."""


@aggregation_rule("ties")
class TiesFold(RobustFold):
    """The mean of the trimmed updates that have the elected sign. Source: Yadav et al., arXiv 2306.01708."""

    @classmethod
    def incompatible_with(cls, rules: AggregationConfig) -> str | None:
        """Key layers get no scores, by which residuals are found."""
        return "aggregation.residuals.per_round is above 0" if rules.residuals.per_round else None

    def finish(
        self, theta: Flat, optimizer: ServerOptimizer, *, absent: Sequence[Sequence[float]]
    ) -> tuple[Flat, float, list[list[float]]]:
        """Turn the trimmed changes into the next model; see `Fold.finish`."""
        for change in self._sums.values():
            trim(change)
        return super().finish(theta, optimizer, absent=absent)

    def agreed(self, rows: Flat) -> Flat:
        """The mean of the values that have the sign of their sum; 0 where there is none."""
        sign = np.sign(rows.sum(axis=0, dtype=np.float64))
        agrees = (np.sign(rows) == sign) & (sign != 0.0)
        total = np.where(agrees, rows, np.float32(0.0)).sum(axis=0, dtype=np.float64)
        merged: Flat = (total / np.maximum(agrees.sum(axis=0), 1)).astype(np.float32)
        return merged


def trim(change: Flat, kept: float = KEPT) -> None:
    """Set all but the largest numbers of a change to 0, in place. Of equals at the threshold all stay.

    Args:
        change: of one child, all of its numbers.
        kept: share of the numbers that stay; at least one does.
    """
    magnitude = np.abs(change)
    smallest = change.size - max(1, round(kept * change.size))
    threshold = np.partition(magnitude, smallest)[smallest]
    change[magnitude < threshold] = 0.0
