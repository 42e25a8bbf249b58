"""Aggregation in which no child has more than a share of the weight (`aggregation.max_share`).

    t_i     tokens of child i in this aggregation
    c_i     min(t_i, c), with the largest c for which no c_i is above max_share sum_j c_j
    next  = model + rate sum_i (c_i / t_i) sum_k t_ik s(tau_ik) change_ik / sum_j c_j        k: its updates

The weight that a child may not have is thus dealt out to the others, in proportion to theirs. Where fewer than
1 / max_share children have come (at the end of a run, or since one has come twice), each has exactly max_share, and the
node's own model, which moves nothing, has the rest. For key layers the same is done with the weights of the softmax,
layer by layer; there the node's own candidate is not capped.

The cap depends on all weights of an aggregation, the last one included. All its updates are kept until it is made.

Proof that the share holds: s(tau) <= 1 and sum_k t_ik = t_i, so that child i has at most c_i / sum_j c_j <= max_share.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from worldlm_ray.aggregation.attention import with_prior
from worldlm_ray.aggregation.fold import Fold
from worldlm_ray.aggregation.rules import aggregation_rule
from worldlm_ray.aggregation.server_optimizer import ServerOptimizer
from worldlm_ray.aggregation.staleness import discount
from worldlm_ray.config.federated import AggregationConfig
from worldlm_ray.errors import AggregationError
from worldlm_ray.exchange.messages import Update
from worldlm_ray.exchange.outbox import fields, revived
from worldlm_ray.tensors.buffers import Flat

_KEPT = "kept."
_ROUNDING = 1e-9


@dataclass(frozen=True)
class _Kept:
    """An update that waits for its aggregation."""

    update: Update
    discount: float
    """By its staleness when it came."""
    fit: list[float]
    """Scores of its key layers when it came, by the temperature."""


@aggregation_rule("capped")
class CappedFold(Fold):
    """The updates of one aggregation, weighed when all of them are there. Source: ours; see the module."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._kept: list[_Kept] = []
        self._divisor = 0.0
        self._own: list[float] | None = None
        """The node's own logits, once they are settled."""

    @classmethod
    def models_held(cls, rules: AggregationConfig, children: int) -> int:
        """All updates are kept; of `time_up` more than children, if one pushes more than once."""
        return rules.buffer_size if rules.trigger == "goal_achieved" else children

    def add(self, update: Update, tau: int, theta: Flat) -> list[float]:
        """Keep an update; see `Fold.add`."""
        fit = self.fit(update, theta, clipped=self.clipping(update))
        self._kept.append(_Kept(update, discount(self.rules.staleness, tau), fit))
        self.tokens += update.tokens
        self.contributors.append(update.sender)
        return fit

    def finish(
        self, theta: Flat, optimizer: ServerOptimizer, *, absent: Sequence[Sequence[float]]
    ) -> tuple[Flat, float, list[list[float]]]:
        """Weigh what was kept, fold it, and turn it into the next model; see `Fold.finish`."""
        if not self._kept:
            raise AggregationError("nothing was folded in: there is no update to aggregate")
        factors = self._factors()
        logits: list[list[float]] = [[] for _ in self._kept]
        if self.layout.key_layers:
            logits = self._logits(absent)
        for kept, mine in zip(self._kept, logits, strict=True):
            update = kept.update
            weight = update.tokens * kept.discount * factors[update.sender]
            self.fold(update, weight, mine, clipped=self.clipping(update))
            self.claimed[update.sender] = self.claimed.get(update.sender, 0) + update.tokens
        return super().finish(theta, optimizer, absent=absent)

    @property
    def divisor(self) -> float:
        """See `Fold.divisor`."""
        return self._divisor

    def _factors(self) -> dict[str, float]:
        """By how much each child's weight is cut; and the divisor."""
        claimed: dict[str, int] = defaultdict(int)
        for kept in self._kept:
            claimed[kept.update.sender] += kept.update.tokens
        before = [math.log(count) for count in claimed.values()]
        after, own = capped(before, self.rules.max_share)
        factors = [math.exp(now - was) for now, was in zip(after, before, strict=True)]
        pairs = zip(claimed.values(), factors, strict=True)
        self._divisor = math.fsum(count * factor for count, factor in pairs) + math.exp(own)
        return dict(zip(claimed, factors, strict=True))

    def _logits(self, absent: Sequence[Sequence[float]]) -> list[list[float]]:
        """Logits of every update's key layers, cut so that no child has too much of the softmax."""
        own = super()._own_logits(absent)
        rows = [with_prior(kept.fit, kept.update.tokens * kept.discount) for kept in self._kept]
        senders = [kept.update.sender for kept in self._kept]
        names = list(dict.fromkeys(senders))
        for layer in range(len(self.layout.key_layers)):
            pairs = list(zip(senders, rows, strict=True))
            before = [_log_sum(row[layer] for sender, row in pairs if sender == name) for name in names]
            after, own[layer] = capped(before, self.rules.max_share, own=own[layer])
            triples = zip(names, before, after, strict=True)
            cuts = {name: now - was if was > -math.inf else 0.0 for name, was, now in triples}
            for sender, row in pairs:
                row[layer] += cuts[sender]
        self._own = own
        return rows

    def _own_logits(self, absent: Sequence[Sequence[float]]) -> list[float]:
        assert self._own is not None, "they are settled before the parent's finish asks for them"
        return self._own

    def state(self) -> dict[str, Any]:
        """Everything but the buffers, as JSON values."""
        kept = [{"update": fields(k.update), "discount": k.discount, "fit": list(k.fit)} for k in self._kept]
        return super().state() | {"kept": kept}

    def arrays(self) -> dict[str, Flat]:
        """The buffers."""
        return super().arrays() | {f"{_KEPT}{index}": kept.update.values for index, kept in enumerate(self._kept)}

    def restore(self, saved: dict[str, Any], arrays: dict[str, Flat]) -> None:
        """Become what `state` and `arrays` described."""
        super().restore(saved, arrays)
        self._kept = [
            _Kept(revived(entry["update"], arrays, f"{_KEPT}{index}"), entry["discount"], list(entry["fit"]))
            for index, entry in enumerate(saved["kept"])
        ]


def capped(logs: Sequence[float], share: float, *, own: float = -math.inf) -> tuple[list[float], float]:
    """Cut weights so that none is above a share of their sum.

    Args:
        logs: logarithms of the children's weights: of key layers they lie further apart than numbers do.
        share: the largest share that one of them may have.
        own: logarithm of one more weight, which is not cut.

    Returns:
        The logarithms, and that of `own`: larger than it was only where there are too few children for anything else.
    """
    ordered = sorted((log for log in logs if log > -math.inf), reverse=True)
    if not ordered or ordered[0] <= math.log(share) + _log_sum([own, *ordered]):
        return list(logs), own
    for count in range(1, len(ordered) + 1):
        rest = _log_sum([own, *ordered[count:]])
        if rest == -math.inf or count * share >= 1.0:
            break
        cap = rest + math.log(share) - math.log1p(-count * share)
        if count == len(ordered) or ordered[count] <= cap + _ROUNDING:
            return [min(log, cap) for log in logs], own
    cap, missing = ordered[-1], 1.0 / share - len(ordered)
    return [min(log, cap) for log in logs], cap + math.log(missing) if missing > _ROUNDING else -math.inf


def _log_sum(logs: Iterable[float]) -> float:
    """log sum exp; -inf of nothing."""
    found = list(logs)
    largest = max(found, default=-math.inf)
    return largest + math.log(math.fsum(math.exp(log - largest) for log in found)) if largest > -math.inf else largest
