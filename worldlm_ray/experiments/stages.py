"""Methods of two stages: a federation's model, and then every client alone with it on its own text.

    variant     share of the budget for the second stage
    ft          a fifth
    ft_tenth    a tenth
    ft_third    a third
    ft_half     half

`fedavg+ft` is FedAvg with fine-tuning, and `pooled+ft` the best that could be hoped for: one model of all texts in one
place, fine-tuned by every client. The tokens of both stages count, and together they are those of any other method.
Fine-tuning begins from the world's model with a third of the configured learning rate, and stops early on validation
text (`evaluation.keep_best`). The clients draw their text in another order than in the first stage.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from worldlm_ray.config.loading import from_mapping, to_mapping
from worldlm_ray.config.schema import BudgetConfig, RunConfig
from worldlm_ray.errors import ConfigError
from worldlm_ray.experiments.methods import Scaled, configure, set_everywhere
from worldlm_ray.plan import tree

SHARES = {"ft": 0.2, "ft_tenth": 0.1, "ft_third": 1 / 3, "ft_half": 0.5}
"""Share of the budget that each variant fine-tunes with."""
FINE_TUNING_LR = Scaled(1 / 3)
"""Learning rate of fine-tuning, by that of the configuration."""


def share_of(method: str) -> float:
    """Share of the budget that a method fine-tunes with; 0 if it has one stage."""
    return max((SHARES.get(variant, 0.0) for variant in method.split("+")[1:]), default=0.0)


def stages(config: RunConfig, method: str) -> list[RunConfig]:
    """The runs of a method, in their order. The second one is to begin from the world's model of the first.

    Args:
        config: the world.
        method: as for `configure`, with one of `SHARES` among its variants or without.

    Raises:
        ConfigError: as `configure`; or there is nothing to fine-tune, or nothing to do it with.
    """
    share = share_of(method)
    if not share:
        return [configure(config, method)]
    base, *variants = method.split("+")
    if base == "local":
        raise ConfigError("--methods", f"{method}: local has no common model", "fine-tune another method's")
    if private := [spec.path for spec in tree.build(config).clients if spec.settings.privacy.unit == "record"]:
        got = f"{method} trains twice on the text of {private[0]}, whose epsilon is for one run"
        raise ConfigError("--methods", got, "leave it out")
    before, after = shared_out(config.budget, share)
    plain = "+".join([base, *(variant for variant in variants if variant not in SHARES)])
    return [configure(replace(config, budget=before), plain), _fine_tuning(replace(config, budget=after), method)]


def shared_out(budget: BudgetConfig, share: float) -> tuple[BudgetConfig, BudgetConfig]:
    """A budget in two parts, of which the second has about the given share.

    Raises:
        ConfigError: it has fewer than two rounds.
    """
    if budget.rounds is not None:
        after = max(1, round(budget.rounds * share))
        if after >= budget.rounds:
            raise ConfigError("budget.rounds", f"got {budget.rounds}", "fine-tuning needs two rounds at least")
        return BudgetConfig(rounds=budget.rounds - after), BudgetConfig(rounds=after)
    assert budget.tokens is not None, "a comparison has no budget in seconds"
    tokens = max(1, round(budget.tokens * share))
    return BudgetConfig(tokens=budget.tokens - tokens), BudgetConfig(tokens=tokens)


def from_model(config: RunConfig, folder: str) -> RunConfig:
    """A configuration that begins from the model in a folder."""
    return replace(config, model=replace(config.model, initial_from=folder))


def _fine_tuning(config: RunConfig, method: str) -> RunConfig:
    """Every client alone, with a low learning rate, stopped early."""
    mapping = to_mapping(configure(config, "local"))
    set_everywhere(mapping, ["training", "lr"], FINE_TUNING_LR)
    for client in mapping["world"]["children"]:
        data: dict[str, Any] = client["data"]
        data["order"] = f"{data['order']}/ft"
    return from_mapping(mapping | {"method": method, "name": f"{config.name}-{method}"}, resolved=True)
