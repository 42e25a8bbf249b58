"""`pooled+ft`: one model of all texts in one place, and then every client alone with it on its own text.

It is what the clients of a world could hope for. A run has one tree, and this method has two: so it takes two runs, its
stages. The tokens of both count, and together they are those of any other method. Both stop early on validation text
(`evaluation.keep_best`): scarce text can be learned by heart in one place, too. The second stage has a fifth of the
budget. It begins from the best model of the first, with a third of the configured learning rate. The clients draw their
text in another order than in the first stage.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from worldlm_ray.config.loading import from_mapping, to_mapping
from worldlm_ray.config.schema import BudgetConfig, RunConfig
from worldlm_ray.errors import ConfigError
from worldlm_ray.experiments.methods import configure, set_everywhere
from worldlm_ray.experiments.variants import FINE_TUNED, Scaled

SHARE = 0.2
"""Share of the budget for the second stage."""
LR = Scaled(1 / 3)
"""Learning rate of the second stage, by that of the configuration."""


def has_two(method: str) -> bool:
    """Whether a method has two stages."""
    base, *variants = method.split("+")
    return base == "pooled" and FINE_TUNED in variants


def stages(config: RunConfig, method: str) -> list[RunConfig]:
    """The runs of a method, in their order. A second one is to begin from the model of the first's only client.

    Args:
        config: the world.
        method: as for `configure`.

    Raises:
        ConfigError: as `configure`; or the budget is too small for two stages.
    """
    if not has_two(method):
        return [configure(config, method)]
    plain = "+".join(part for part in method.split("+") if part != FINE_TUNED)
    before, after = shared_out(config.budget)
    pooled = configure(replace(config, budget=before), plain)
    pooled = replace(pooled, evaluation=replace(pooled.evaluation, keep_best=True, every_rounds=1))
    return [pooled, _fine_tuning(replace(config, budget=after), method)]


def shared_out(budget: BudgetConfig) -> tuple[BudgetConfig, BudgetConfig]:
    """A budget in two parts, of which the second has about its share.

    Raises:
        ConfigError: it has fewer than two rounds.
    """
    if budget.rounds is not None:
        after = max(1, round(budget.rounds * SHARE))
        if after >= budget.rounds:
            raise ConfigError("budget.rounds", f"got {budget.rounds}", "fine-tuning needs two rounds at least")
        return BudgetConfig(rounds=budget.rounds - after), BudgetConfig(rounds=after)
    assert budget.tokens is not None, "a comparison has no budget in seconds"
    tokens = max(1, round(budget.tokens * SHARE))
    return BudgetConfig(tokens=budget.tokens - tokens), BudgetConfig(tokens=tokens)


def from_model(config: RunConfig, folder: str) -> RunConfig:
    """A configuration that begins from the model in a folder."""
    return replace(config, model=replace(config.model, initial_from=folder))


def _fine_tuning(config: RunConfig, method: str) -> RunConfig:
    """Every client alone, with a low learning rate, stopped early."""
    mapping = to_mapping(configure(config, "local"))
    set_everywhere(mapping, ["training", "lr"], LR)
    for client in mapping["world"]["children"]:
        data: dict[str, Any] = client["data"]
        data["order"] = f"{data['order']}/ft"
    return from_mapping(mapping | {"method": method, "name": f"{config.name}-{method}"}, resolved=True)
