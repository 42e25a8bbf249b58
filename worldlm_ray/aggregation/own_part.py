"""A child's own part in its parent's sums (sums.py): what it is, how it changes, and what remains without it.

A node is not to be counted twice where it mixes its own model with its parent's. So it takes its part out:

    rest = (S - n_i B_i) / (N - n_i)

where B_i is the model as the parent has last accepted it. By the same subtraction a client leaves without a trace.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from worldlm_ray.aggregation.sums import GRID, Exact, contribution, whole
from worldlm_ray.exchange.messages import Model, Update
from worldlm_ray.exchange.replies import ACCEPTED, Verdict
from worldlm_ray.tensors.buffers import Flat, blocks, frozen


@dataclass(frozen=True, kw_only=True)
class _Pending:
    """An update that the parent has not answered yet."""

    seq: int
    weight: int
    """Of the child once it is accepted."""
    adds: Exact
    """To the sum."""


class OwnPart:
    """What the parent's sums hold of one child, a client or a federation.

    Args:
        size: of the model, in parameters.
    """

    def __init__(self, size: int) -> None:
        self.held: Exact = np.zeros(size, np.int64)
        """n_i B_i, as the parent has accepted it. Replaced, and never changed in place."""
        self.weight = 0
        """n_i, likewise; 0 while nothing was accepted."""
        self.seq = 0
        """Of the newest update in it."""
        self.is_known = True
        """False of a child that has come back from a checkpoint older than its newest accepted update."""
        self._pending: _Pending | None = None

    # ---- up --------------------------------------------------------------------------------------------------

    def change(self, target: Exact, weight: int, *, out: Flat) -> dict[str, Any]:
        """The fields of the update that makes the part `target`.

        Of a client, whose parameters lie on the grid, fp32 holds the values. Of a federation, whose sum has more
        digits, what fp32 does not hold goes along as `low`: the parent's sum is exact at once.

        Args:
            target: n_i B_i as it is to be.
            weight: n_i as it is to be; 0 to have no part any more.
            out: takes the values [size].

        Returns:
            What the update says beside its values. Its weight is n_i or, where that is to be 0, what it was.
        """
        factor = weight or self.weight or 1
        low, is_exact = np.empty_like(out), True
        for part in blocks(out.size):
            change = target[part] - self.held[part]
            out[part] = change / (factor / GRID)
            change -= whole(out[part], factor)
            low[part] = change / (factor / GRID)
            is_exact = is_exact and not change.any()
        return {"weight": factor, "withdraws": weight == 0, "low": None if is_exact else frozen(low)}

    def sent(self, update: Update) -> Update:
        """Remember an update that goes to the parent now. Returns it."""
        weight = 0 if update.withdraws else update.weight
        self._pending = _Pending(seq=update.seq, weight=weight, adds=contribution(update))
        return update

    def welcomed(self, last_seq: int) -> None:
        """The parent has accepted all up to this one."""
        if self._pending is not None and self._pending.seq <= last_seq:
            self._accept(self._pending)
        self.is_known = self.is_known and last_seq <= self.seq

    def answered(self, seq: int, verdict: Verdict) -> None:
        """The parent's verdict on an update. One that it has accepted before and lost since counts once."""
        if self._pending is not None and self._pending.seq == seq and verdict.reason in (ACCEPTED, "duplicate"):
            self._accept(self._pending)

    def _accept(self, pending: _Pending) -> None:
        self.held, self.weight, self.seq = self.held + pending.adds, pending.weight, pending.seq
        self._pending = None

    # ---- down ------------------------------------------------------------------------------------------------

    def rest(self, model: Model, *, beyond: bool) -> tuple[Flat | None, int]:
        """The mean of the parent's sums without this child's part, and its weight; None where nothing remains.

        Args:
            model: the parent's.
            beyond: take in what lies beyond the parent, too.
        """
        siblings = model.weight - self.weight
        with_beyond = beyond and model.rest is not None and model.rest_weight > 0
        weight = max(siblings, 0) + (model.rest_weight if with_beyond else 0)
        if siblings <= 0:
            return (model.rest, weight) if with_beyond else (None, 0)
        found = np.empty(self.held.size, np.float32)
        for part in blocks(found.size):
            total = model.values[part].astype(np.float64) * model.weight - self.held[part] * GRID
            if with_beyond:
                assert model.rest is not None
                total += model.rest[part].astype(np.float64) * model.rest_weight
            found[part] = total / weight
        return found, weight

    # ---- durability ------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a restart needs."""
        meta: dict[str, Any] = {name: getattr(self, name) for name in _STATE}
        arrays: dict[str, Any] = {"own_part.held": self.held}
        if self._pending is not None:
            meta["pending"] = {"seq": self._pending.seq, "weight": self._pending.weight}
            arrays["own_part.adds"] = self._pending.adds
        return meta, arrays

    def restore(self, saved: dict[str, Any], arrays: dict[str, Any]) -> None:
        """Become what `state` described."""
        for name in _STATE:
            setattr(self, name, saved[name])
        self.held, self._pending = arrays["own_part.held"], None
        if "pending" in saved:
            self._pending = _Pending(**saved["pending"], adds=arrays["own_part.adds"])


_STATE = ("weight", "seq", "is_known")
