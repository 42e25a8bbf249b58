"""Exact sums of children's models, from which any part can be taken out again: what a node of the rule `sums` keeps.

    S += n_i * change_i        N = sum of n_i        model = S / N

`n_i` is the weight of child i: of a client the tokens of a local round, of a federation the N of its own sum. S counts
in whole multiples of GRID, so that sums do not depend on their order, and what is subtracted leaves no trace:
`S - n_i B_i` has the bits of a sum in which child i never was. No model per child is kept.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from worldlm_ray.exchange.messages import Update
from worldlm_ray.tensors.buffers import Flat, blocks, frozen

Exact = npt.NDArray[np.int64]
"""A buffer of whole multiples of GRID."""

GRID = 2.0**-22
"""What a sum counts in. Clients round their parameters to it: 2.4e-7, while those of an adapter are some 1e-2."""
LARGEST = 2.0
"""Of a parameter that is pushed; a larger one is cut off. The change from -2 to 2 is still exact in fp32."""


def on_grid(values: Flat, weight: int) -> Exact:
    """What parameters [size] come to in a sum, with a weight: each is rounded to the grid, and cut off at LARGEST."""
    return whole(np.clip(values, -LARGEST, LARGEST), 1) * weight


def contribution(update: Update) -> Exact:
    """What an update adds to the sum [size]: the same number at its sender and at its receiver."""
    found = whole(update.values, update.weight)
    return found if update.low is None else found + whole(update.low, update.weight)


def whole(values: Flat, weight: int) -> Exact:
    """Parameters [size] times a weight, in whole multiples of the grid."""
    return np.rint(values.astype(np.float64) * (weight / GRID)).astype(np.int64)


class Sums:
    """The sum of one node.

    Args:
        size: of the model, in parameters.
    """

    def __init__(self, size: int) -> None:
        self.total: Exact = np.zeros(size, np.int64)
        """S. Changed in place."""
        self.weights: dict[str, int] = {}
        """n_i by child, of those that have a part in S."""
        self.weight = 0
        """N of the published model: that of S, unless an aggregation is being made."""
        self.rest: Flat | None = None
        """The mean of what lies beyond this node, as its parent's sums and their rest give it; None where nothing
        does. Never changed in place."""
        self.rest_weight = 0
        """The weight of it."""

    @property
    def newest_weight(self) -> int:
        """N of S as it is now."""
        return sum(self.weights.values())

    def add(self, update: Update) -> None:
        """Take the change of a child's part in."""
        self.total += contribution(update)
        if update.withdraws:
            self.weights.pop(update.sender, None)
        else:
            self.weights[update.sender] = update.weight

    def mean(self, out: Flat) -> None:
        """Write S / N as the model to be published; zeros where N is 0."""
        self.weight = self.newest_weight
        scale = GRID / self.weight if self.weight else 0.0
        for part in blocks(out.size):
            out[part] = self.total[part] * scale

    def heard(self, rest: Flat | None, weight: int) -> None:
        """The parent's model says what lies beyond this node."""
        self.rest, self.rest_weight = (None if rest is None else frozen(rest)), weight

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a restart needs."""
        meta = {"weights": dict(self.weights), "weight": self.weight, "rest_weight": self.rest_weight}
        arrays: dict[str, Any] = {"sums.total": self.total}
        return meta, arrays if self.rest is None else arrays | {"sums.rest": self.rest}

    def restore(self, saved: dict[str, Any], arrays: dict[str, Any]) -> None:
        """Become what `state` described."""
        self.weights, self.weight = dict(saved["weights"]), saved["weight"]
        self.total = np.array(arrays["sums.total"])
        self.heard(arrays.get("sums.rest"), saved["rest_weight"])
