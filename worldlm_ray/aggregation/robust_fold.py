"""Aggregation that does not trust the children: what most of them agree on, coordinate by coordinate.

    v_i  = s(tau_i) change_i      one per child
    next = model + rate trimmed_mean_i(v_i)      or the median

Nothing but staleness weighs an update: tokens are what a child claims. A child is heard once, however often it pushes:
its updates are averaged first. There is no attention over key layers, since a child could earn attention by what it
sends. All updates of an aggregation have to be kept until it is made: one model per child.

Source: Yin et al., arXiv 1803.01498, definitions 1 and 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from worldlm_ray.aggregation.fold import Fold
from worldlm_ray.aggregation.rules import aggregation_rule
from worldlm_ray.aggregation.server_optimizer import ServerOptimizer
from worldlm_ray.aggregation.staleness import discount
from worldlm_ray.config import names
from worldlm_ray.config.federated import AggregationConfig
from worldlm_ray.config.registry import Registry
from worldlm_ray.errors import AggregationError
from worldlm_ray.exchange.messages import Update
from worldlm_ray.tensors.buffers import Flat, add_scaled, blocks

_CHILD = "of."


RobustRule = Callable[[Flat, float], Flat]
"""From values [children, coordinates], which it may overwrite, and `trim` to one value per coordinate."""
ROBUST_RULES: Registry[RobustRule] = names.ROBUST_RULES


def robust_rule(name: str) -> Callable[[RobustRule], RobustRule]:
    """Register a rule that says, coordinate by coordinate, what most children agree on.

    Args:
        name: what `aggregation.robust.rule` calls it.
    """

    def register(function: RobustRule) -> RobustRule:
        ROBUST_RULES.add(name, function, function)
        return function

    return register


@robust_rule("trimmed_mean")
def trimmed_mean(rows: Flat, trim: float) -> Flat:
    """The mean without the share `trim` at either end. Source: Yin et al., arXiv 1803.01498, definition 2."""
    rows.sort(axis=0)
    drop = min(int(np.ceil(trim * len(rows))), (len(rows) - 1) // 2)
    agreed: Flat = rows[drop : len(rows) - drop].mean(axis=0, dtype=np.float64).astype(np.float32)
    return agreed


@robust_rule("median")
def median(rows: Flat, trim: float) -> Flat:
    """The median; `trim` means nothing. Source: Yin et al., arXiv 1803.01498, definition 1."""
    return np.median(rows, axis=0).astype(np.float32)


@aggregation_rule("robust")
class RobustFold(Fold):
    """The updates of one aggregation, and what most of them agree on. Source: Yin et al., arXiv 1803.01498."""

    _sums: dict[str, Flat]
    _counts: dict[str, int]

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._sums, self._counts = {}, {}

    @classmethod
    def models_held(cls, rules: AggregationConfig, children: int) -> int:
        """Every child's update is kept until the aggregation is made."""
        return children

    @classmethod
    def incompatible_with(cls, rules: AggregationConfig) -> str | None:
        """It needs a rule for a coordinate."""
        return "aggregation.robust.rule is none" if rules.robust.rule == "none" else None

    def add(self, update: Update, tau: int, theta: Flat) -> list[float]:
        """Keep an update."""
        kept = self._sums.setdefault(update.sender, np.zeros(self.layout.size, np.float32))
        add_scaled(kept, update.values, discount(self.rules.staleness, tau) * self.clipping(update))
        self._counts[update.sender] = self._counts.get(update.sender, 0) + 1
        self.count(update)
        return []

    def finish(
        self, theta: Flat, optimizer: ServerOptimizer, *, absent: Sequence[Sequence[float]]
    ) -> tuple[Flat, float, list[list[float]]]:
        """Turn what the children agree on into the next model; see `Fold.finish`."""
        if not self._sums:
            raise AggregationError("nothing was folded in: there is no update to aggregate")
        split, senders = self.layout.backbone_size, list(self._sums)
        for part in blocks(self.layout.size):
            rows = np.stack([self._sums[name][part] / np.float32(self._counts[name]) for name in senders])
            self.flat[part] = self.agreed(rows)
        scale = self.present(len(absent)) if self.rules.server_optimizer.lr is None else 1.0
        keys = self.flat[split:]
        keys *= np.float32(scale)
        keys += theta[split:]
        norm = optimizer.apply(self.flat[:split], theta[:split], scale=scale)
        return self.flat, norm, []

    def agreed(self, rows: Flat) -> Flat:
        """What the children agree on, of values [children, coordinates], which may be overwritten."""
        agreed: Flat = ROBUST_RULES.get(self.rules.robust.rule)(rows, self.rules.robust.trim)
        return agreed

    def state(self) -> dict[str, Any]:
        """Everything but the buffers, as JSON values."""
        return super().state() | {"counts": dict(self._counts)}

    def arrays(self) -> dict[str, Flat]:
        """The buffers."""
        return super().arrays() | {f"{_CHILD}{name}": values for name, values in self._sums.items()}

    def restore(self, saved: dict[str, Any], arrays: dict[str, Flat]) -> None:
        """Become what `state` and `arrays` described."""
        super().restore(saved, arrays)
        self._counts = dict(saved["counts"])
        self._sums = {name: np.array(arrays[f"{_CHILD}{name}"]) for name in self._counts}
