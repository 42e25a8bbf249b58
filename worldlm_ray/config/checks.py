"""Checks of single values that types alone cannot make. What several mean together: `worldlm_ray/plan/checks.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from worldlm_ray.config.schema import BudgetConfig, NodeSettings, RunConfig
from worldlm_ray.config.values import Problems
from worldlm_ray.errors import ConfigError


def check_run(config: RunConfig, problems: Problems) -> None:
    """Checks of the run's own values that types alone cannot make."""
    with problems.kept():
        _check_name(config.name)
    chosen = [f.name for f in fields(BudgetConfig) if getattr(config.budget, f.name) is not None]
    is_wrong = not chosen and any(error.key.split(".")[0] == "budget" for error in problems.found)
    if len(chosen) != 1 and not is_wrong:  # a value that was refused is set, if not well
        got = " and ".join(chosen) if chosen else "nothing"
        cure = "set exactly one of tokens, rounds, seconds"
        if chosen:
            cure += f": the others to null, such as budget.{chosen[0]}=null"
        problems.add(ConfigError("budget", f"{got} set", cure))
    check_bounds(config, RUN_BOUNDS, "", problems)


def _check_name(name: str) -> None:
    """A run's name becomes a folder."""
    if name in ("", ".", "..") or name.startswith("-") or any(c == "/" or not c.isprintable() for c in name):
        cure = "give one without '/' and control characters that does not begin with '-', and is not '.' or '..'"
        raise ConfigError("name", f"{name!r} cannot be a folder's name", cure)


def check_bounds(of: Any, bounds: Mapping[str, Callable[[float, str], None]], at: str, problems: Problems) -> None:
    """Check numbers against their bounds. Null is no number, and within all bounds.

    Args:
        of: the dataclass that holds them, or holds their sections.
        bounds: a check of each, by its dotted key.
        at: dotted key of `of` with a dot, for messages; empty at top level.
        problems: takes what is out of bounds.
    """
    for key, check in bounds.items():
        value = of
        for name in key.split("."):
            value = getattr(value, name)
        if value is not None or key == "resources.workers":
            with problems.kept():
                check(value, f"{at}{key}")


def check_settings(settings: NodeSettings, key: str, problems: Problems) -> None:
    """Check the bounds of one node's inherited settings.

    Args:
        settings: the settings in force at the node.
        key: dotted key of the node, for messages; empty at top level.
        problems: takes what is wrong.
    """
    check_bounds(settings, BOUNDS, f"{key}." if key else "", problems)


def positive(value: float, key: str) -> None:
    """Raise a ConfigError unless the value is above zero."""
    if not value > 0:
        raise ConfigError(key, f"got {value}", "give a number above 0")


def not_negative(value: float, key: str) -> None:
    """Raise a ConfigError if the value is below zero."""
    if not value >= 0:
        raise ConfigError(key, f"got {value}", "give a number that is not negative")


def _seconds(value: float, key: str) -> None:
    """Raise a ConfigError unless the value is a time that ends: in [0, 1e9], some thirty years."""
    if not 0.0 <= value <= 1e9:
        raise ConfigError(key, f"got {value}", "give seconds from 0 to 1e9")


def _rate(value: float, key: str) -> None:
    """Raise a ConfigError unless something moves at this rate within a time that ends."""
    if not value >= 1e-6:
        raise ConfigError(key, f"got {value}", "give a number above 0, at least 1e-6")


def fraction(value: float, key: str) -> None:
    """Raise a ConfigError unless the value lies in [0, 1]."""
    if not 0.0 <= value <= 1.0:
        raise ConfigError(key, f"got {value}", "give a number from 0 to 1")


def _between(value: float, key: str) -> None:
    if not 0.0 < value < 1.0:
        raise ConfigError(key, f"got {value}", "give a number between 0 and 1")


def below_one(value: float, key: str) -> None:
    """Raise a ConfigError unless the value lies in [0, 1)."""
    if not 0.0 <= value < 1.0:
        raise ConfigError(key, f"got {value}", "give a number from 0 to below 1")


def _probability(value: float, key: str) -> None:
    if not 0.0 < value < 1.0:
        raise ConfigError(key, f"got {value}", "give a probability below 1 / records, such as 1e-5")


def _share(value: float, key: str) -> None:
    """Raise a ConfigError unless the value lies in (0, 1]."""
    if not 0.0 < value <= 1.0:
        raise ConfigError(key, f"got {value}", "give a share above 0, at most 1")


def _trim(value: float, key: str) -> None:
    if not 0.0 <= value < 0.5:
        raise ConfigError(key, f"got {value}", "give a share from 0 to below 0.5")


def _follows(value: float | str, key: str) -> None:
    if isinstance(value, str) and value not in ("validated", "apart"):
        raise ConfigError(key, f"got {value!r}", "write a number from 0 to 1, validated or apart")
    if not isinstance(value, str):
        fraction(value, key)


def _zero_stage(value: int, key: str) -> None:
    if value not in (0, 1, 2, 3):
        raise ConfigError(key, f"got {value}", "there are ZeRO stages 0 to 3")


def _workers(workers: Any, key: str) -> None:
    ends = workers if isinstance(workers, list) else [workers, workers]
    whole = all(isinstance(end, int) and not isinstance(end, bool) for end in ends)
    if len(ends) != 2 or not whole or not 0 < ends[0] <= ends[1]:
        raise ConfigError(key, f"got {workers}", "give a whole number above 0, or [min, max]")


def _host_and_port(address: str, key: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 <= int(port) < 65_536:
        raise ConfigError(key, f"got {address!r}", "give HOST:PORT, such as 0.0.0.0:8443")


def _no_or_at_least_one(value: float, key: str) -> None:
    if value and not value >= 1.0:
        raise ConfigError(key, f"got {value}", "give Mbit/s from 1 on, or 0 for no limit")


def _two_betas(betas: Any, key: str) -> None:
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ConfigError(key, f"got {betas}", "give two numbers from 0 to below 1")


BOUNDS: dict[str, Callable[[Any, str], None]] = {
    "training.local_steps": positive,
    "training.draw_steps": positive,
    "training.head_first": below_one,
    "training.batch_size": positive,
    "training.lr": positive,
    "training.accumulation_steps": positive,
    "training.lora_rank": positive,
    "training.weight_decay": not_negative,
    "training.grad_clip": not_negative,
    "training.step_delay_s": _seconds,
    "training.min_lr_ratio": fraction,
    "training.warmup_fraction": fraction,
    "training.betas": _two_betas,
    "training.zero_stage": _zero_stage,
    "aggregation.buffer_size": positive,
    "aggregation.quorum": positive,
    "aggregation.push_every": positive,
    "aggregation.time_up_s": positive,
    "aggregation.max_staleness": not_negative,
    "aggregation.max_update_norm": positive,
    "aggregation.max_share": _share,
    "aggregation.robust.trim": _trim,
    "aggregation.robust.clip_norm": positive,
    "aggregation.attention.temperature": positive,
    "aggregation.residuals.per_round": not_negative,
    "aggregation.residuals.pool": positive,
    "aggregation.residuals.max_age": positive,
    "aggregation.residuals.offers": positive,
    "aggregation.residuals.discount.a": positive,
    "aggregation.residuals.discount.b": not_negative,
    "aggregation.staleness.a": positive,
    "aggregation.staleness.b": not_negative,
    "aggregation.server_optimizer.betas": _two_betas,
    "aggregation.server_optimizer.delay": positive,
    "aggregation.server_optimizer.lr": positive,
    "aggregation.server_optimizer.eps": positive,
    "aggregation.server_optimizer.momentum": fraction,
    "merge.client": _follows,
    "merge.federation": fraction,
    "merge.max_model_step": positive,
    "merge.fine_tune": below_one,
    "merge.mixture": _between,
    "merge.proximal": not_negative,
    "resources.cpus": positive,
    "resources.clients_per_process": positive,
    "resources.gpus": not_negative,
    "resources.memory_gb": positive,
    "resources.workers": _workers,
    "privacy.target_epsilon": positive,
    "privacy.noise_multiplier": positive,
    "privacy.max_grad_norm": positive,
    "privacy.max_updates": positive,
    "privacy.delta": _probability,
    "simulation.tokens_per_s": _rate,
    "simulation.bandwidth_gbps": _rate,
    "simulation.latency_s": _seconds,
    "simulation.speed_spread": not_negative,
    "data.heldout_fraction": _between,
    "data.validation_fraction": below_one,
    "data.train_bytes": positive,
}
"""What a number of a node's settings may be, by its dotted key."""

RUN_BOUNDS: dict[str, Callable[[Any, str], None]] = {
    "budget.tokens": positive,
    "budget.rounds": positive,
    "budget.seconds": positive,
    "evaluation.tokens": positive,
    "evaluation.final_tokens": positive,
    "evaluation.validation_tokens": positive,
    "evaluation.every_rounds": not_negative,
    "evaluation.share": positive,
    "checkpoint.every_s": not_negative,
    "checkpoint.keep": positive,
    "checkpoint.every_updates": positive,
    "checkpoint.patience_s": not_negative,
    "liveness.heartbeat_s": positive,
    "liveness.grace_s": positive,
    "liveness.k": not_negative,
    "gateway.listen": _host_and_port,
    "gateway.staging_gb": positive,
    "gateway.rate_mbps": _no_or_at_least_one,
    "gateway.member_rate_mbps": _no_or_at_least_one,
    "gateway.member_gb_per_day": not_negative,
    "gateway.max_members": positive,
    "gateway.linger_h": not_negative,
    "gateway.least_privacy.target_epsilon": positive,
}
"""What a number of the run itself may be."""
