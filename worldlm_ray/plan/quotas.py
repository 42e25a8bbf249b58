"""What the plan lets every child of a node claim (see worldlm_ray/exchange/quota.py).

    client        tokens of one update    those of one local round: an update is one round, or less of it
                  begun and not arrived   the same: rounds are begun one by one, overlapping or not
    federation    tokens of one update    what all clients below train in ROUNDS_APART exchanges, or in the whole run
                  begun and not arrived   two rounds of every client below: one under way, one that waits to be pushed
    member        tokens of one update    its `update_tokens`, or the run's budget of tokens
                  begun and not arrived   the same: its clients are not known here

A federation whose exchanges take longer trains on meanwhile, and no number says for how long. It knows its own limit,
claims no more in one update, and keeps the rest for the next. One with the trigger time_up at itself or below takes as
many updates as there are: its limit is what the whole run trains. So no correct child is refused, however long it was
away and however often it was started again. Its rounds begun may be counted late: what has arrived is counted anyway.
"""

from __future__ import annotations

from collections.abc import Callable

from worldlm_ray.config.schema import BudgetConfig
from worldlm_ray.exchange.limits import LARGEST_COUNT
from worldlm_ray.exchange.quota import Quota, Quotas
from worldlm_ray.plan.tree import NodeSpec

ROUNDS_APART = 100
"""Exchanges of a federation, as often as its configuration has them, that one update may stand for."""


def quotas(spec: NodeSpec, round_tokens: Callable[[NodeSpec], int], budget: BudgetConfig) -> Quotas:
    """What an inner node and its children may claim.

    Args:
        spec: the node.
        round_tokens: tokens of one local round of a client.
        budget: the run's.
    """
    of_kind: dict[str, Quota] = {}  # copies share a key, and one quota
    for child in spec.children:
        if child.key not in of_kind:
            of_kind[child.key] = quota(child, round_tokens, budget)
    own = None if spec.kind == "world" else quota(spec, round_tokens, budget)
    return Quotas(own=own, children={child.name: of_kind[child.key] for child in spec.children})


def quota(spec: NodeSpec, round_tokens: Callable[[NodeSpec], int], budget: BudgetConfig) -> Quota:
    """What a node may claim at its parent; the arguments are those of `quotas`."""
    if spec.kind == "client":
        tokens = round_tokens(spec)
        return Quota(update_tokens=tokens, started_tokens=tokens)
    if spec.members:
        return _of_members(spec, budget)
    below = sum(map(round_tokens, spec.clients))
    once = _exchanged(spec, round_tokens)
    most = LARGEST_COUNT if _counts_time(spec) else ROUNDS_APART * once
    if budget.rounds is not None:
        most = min(most, max(budget.rounds * below, once))
    elif budget.tokens is not None:
        most = min(most, max(budget.tokens, once))
    return Quota(
        update_tokens=min(most, LARGEST_COUNT),
        started_tokens=min(2 * below, LARGEST_COUNT),
        residuals=spec.settings.aggregation.residuals.per_round,
    )


def _of_members(spec: NodeSpec, budget: BudgetConfig) -> Quota:
    """What a member may claim, or a federation with members below it."""
    most = LARGEST_COUNT if budget.tokens is None else budget.tokens
    if spec.update_tokens is not None:
        most = min(most, spec.update_tokens)
    return Quota(update_tokens=most, started_tokens=most, residuals=spec.settings.aggregation.residuals.per_round)


def offered_residuals(parent: NodeSpec) -> int:
    """Residuals that a model of this node may bring."""
    rules = parent.settings.aggregation.residuals
    return rules.offers if rules.per_round else 0


def _counts_time(spec: NodeSpec) -> bool:
    """Whether the updates that one of this node stands for are limited by time and not by their number."""
    return any(node.kind != "client" and node.settings.aggregation.trigger == "time_up" for node in spec.walk())


def _exchanged(spec: NodeSpec, round_tokens: Callable[[NodeSpec], int]) -> int:
    """Tokens of an update whose aggregations took as many updates as they ask for, of every child."""
    if spec.kind == "client":
        return round_tokens(spec)
    rules = spec.settings.aggregation
    updates = rules.buffer_size if rules.trigger == "goal_achieved" else 1
    return rules.push_every * updates * sum(_exchanged(child, round_tokens) for child in spec.children)
