"""Aggregation rules: how the updates of one aggregation become the next model.

A node makes one rule per aggregation, adds updates to it as they come, and finishes it once. `mean` is the default;
`aggregation.robust.rule` and `aggregation.max_share` choose `robust` and `capped`; `aggregation.rule` names any other.
No name chooses the rule of client-level privacy (private_fold.py): privacy is a promise, and not an option.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from worldlm_ray.aggregation.attention import OnlineAttention
from worldlm_ray.aggregation.server_optimizer import ServerOptimizer
from worldlm_ray.config import names
from worldlm_ray.config.federated import AggregationConfig
from worldlm_ray.config.registry import Registry
from worldlm_ray.exchange.messages import Update
from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.tensors.layout import Layout


class AggregationRule(Protocol):
    """What a node asks of a rule. `aggregation.fold.Fold` meets it: derive from it, and override `add` or `finish`."""

    kind: str
    """Its name, which a checkpoint holds: the sums of one rule are none of another."""
    first_s: float
    """Run time at which the first update arrived."""
    tokens: int
    """Tokens of all updates so far."""
    contributors: list[str]
    """The sender of each update so far."""
    attention: OnlineAttention
    """The weights of key layers, for the record."""

    def __init__(
        self, layout: Layout, rules: AggregationConfig, *, origin: Flat, first_s: float, buffer: Flat | None = None
    ) -> None: ...

    def add(self, update: Update, tau: int, theta: Flat) -> list[float]:
        """Take an update in; see `Fold.add`."""

    def finish(
        self, theta: Flat, optimizer: ServerOptimizer, *, absent: Sequence[Sequence[float]]
    ) -> tuple[Flat, float, list[list[float]]]:
        """Turn the updates into the next model; see `Fold.finish`."""

    def state(self) -> dict[str, Any]:
        """Everything but the buffers, as JSON values."""

    def arrays(self) -> dict[str, Flat]:
        """The buffers, by names that `state` does not have."""

    def restore(self, saved: dict[str, Any], arrays: dict[str, Flat]) -> None:
        """Become what `state` and `arrays` described."""

    @classmethod
    def models_held(cls, rules: AggregationConfig, children: int) -> int:
        """Models that it keeps until the aggregation is made, beside the one that it builds."""

    @classmethod
    def incompatible_with(cls, rules: AggregationConfig) -> str | None:
        """A setting that does not go with the rule, as `key is value`; None if all do."""


Rule = TypeVar("Rule", bound=type[AggregationRule])
AGGREGATION_RULES: Registry[type[AggregationRule]] = names.AGGREGATION_RULES


def aggregation_rule(name: str) -> Callable[[Rule], Rule]:
    """Register an aggregation rule.

    Args:
        name: what `aggregation.rule` calls it.
    """

    def register(rule: Rule) -> Rule:
        AGGREGATION_RULES.add(name, rule, rule)
        rule.kind = name
        return rule

    return register


def rule_name(rules: AggregationConfig) -> str:
    """The name of the rule that settings choose: a robust rule and a cap stand before `aggregation.rule`."""
    if rules.robust.rule != "none":
        return "robust"
    return "capped" if rules.max_share < 1.0 else rules.rule


def rule_of(rules: AggregationConfig) -> type[AggregationRule]:
    """The rule that settings choose.

    Raises:
        ConfigError: there is none of that name.
    """
    return AGGREGATION_RULES.get(rule_name(rules))
