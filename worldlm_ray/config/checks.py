"""Checks that types alone cannot make: the bounds of each number, and what the settings of one node mean together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from worldlm_ray.config.schema import SMALLEST_PRV_NOISE, BudgetConfig, NodeSettings, PrivacyConfig, RunConfig
from worldlm_ray.config.values import Problems
from worldlm_ray.errors import ConfigError
from worldlm_ray.storage.filesystem import expanded


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


def check_settings(settings: NodeSettings, key: str, problems: Problems, *, complete: bool = True) -> None:
    """Checks of one node's inherited settings.

    Args:
        settings: the settings in force at the node.
        key: dotted key of the node, for messages; empty at top level.
        problems: takes what is wrong.
        complete: False where a value could not be read, and its default stands here.
    """
    at = f"{key}." if key else ""
    before = len(problems.found)
    check_bounds(settings, BOUNDS, at, problems)
    if len(problems.found) > before or not complete:
        return  # what several values mean together is checked once each of them can be
    for check in (_common, _robust, _privacy):
        with problems.kept():
            check(settings, at)


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


def _cosine(value: float, key: str) -> None:
    if not -1.0 <= value <= 1.0:
        raise ConfigError(key, f"got {value}", "give a cosine, from -1 to 1")


def _between(value: float, key: str) -> None:
    if not 0.0 < value < 1.0:
        raise ConfigError(key, f"got {value}", "give a number between 0 and 1")


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
    if isinstance(value, str) and value != "adaptive":
        raise ConfigError(key, f"got {value!r}", "write a number from 0 to 1, or adaptive")
    if not isinstance(value, str):
        fraction(value, key)


def _zero_stage(value: int, key: str) -> None:
    if value not in (0, 1, 2, 3):
        raise ConfigError(key, f"got {value}", "there are ZeRO stages 0 to 3")


def _common(settings: NodeSettings, at: str) -> None:
    """Whether a client can train its parent's model beside its own."""
    share, batch, key = settings.merge.common_fraction, settings.training.batch_size, f"{at}merge.common_fraction"
    if not share:
        return
    if settings.merge.client != "adaptive":
        got = f"got {share}, but merge.client is {settings.merge.client}"
        raise ConfigError(key, got, "set merge.client to adaptive, or this to 0: others never leave their parent")
    if settings.merge.common_rows(batch) == batch:
        got = f"{share} of {batch} sequences leaves none for the client's own model"
        raise ConfigError(key, got, "lower it, or raise training.batch_size")
    if settings.privacy.unit == "record":
        got = f"got {share}, but privacy.unit is record, whose noise is for one model"
        raise ConfigError(key, got, "set it to 0 at clients that promise privacy of records")
    if settings.training.zero_stage or settings.resources.worker_range[1] > 1:
        got = f"got {share}, but the client has DeepSpeed's workers, which hold one model"
        raise ConfigError(key, got, "set it to 0 at clients with several workers or a zero_stage")


def _robust(settings: NodeSettings, at: str) -> None:
    aggregation, key = settings.aggregation, f"{at}aggregation"
    robust = aggregation.robust
    if robust.rule == "none":
        return
    if aggregation.trigger == "goal_achieved" and aggregation.buffer_size < 3:
        got = f"{robust.rule} of {aggregation.buffer_size} updates trusts them all"
        raise ConfigError(
            f"{key}.robust.rule", got, "set aggregation.buffer_size to 3 or more, or trigger: synchronous"
        )
    if aggregation.residuals.per_round:
        got = f"{robust.rule} does not score key layers, by which residuals are found"
        raise ConfigError(f"{key}.robust.rule", got, "set aggregation.residuals.per_round to 0")


def _privacy(settings: NodeSettings, at: str) -> None:
    privacy, key = settings.privacy, f"{at}privacy"
    if privacy.ledger_dir is not None and not expanded(privacy.ledger_dir).is_absolute():
        got = f"{privacy.ledger_dir!r} would be another folder, and an empty ledger, for whoever starts elsewhere"
        raise ConfigError(f"{key}.ledger_dir", got, "give an absolute path")
    if privacy.max_updates is not None and privacy.unit != "client":
        got = f"is set, but privacy.unit is {privacy.unit}"
        raise ConfigError(f"{key}.max_updates", got, "only unit client counts updates: remove it")
    noise = privacy.noise_multiplier
    if noise is not None and noise < SMALLEST_PRV_NOISE and (privacy.unit, privacy.accountant) == ("record", "prv"):
        got = f"got {noise:g}, for which accountant prv takes minutes and gigabytes"
        raise ConfigError(f"{key}.noise_multiplier", got, f"give {SMALLEST_PRV_NOISE:g} or more, or use accountant rdp")
    if privacy.on_exhausted == "pause" and privacy.unit != "record":
        got = f"pause, but privacy.unit is {privacy.unit}: only a client that keeps its own budget can pause"
        raise ConfigError(f"{key}.on_exhausted", got, "remove it, or set privacy.unit to record")
    chosen = privacy.target_epsilon is not None or privacy.noise_multiplier is not None
    if privacy.unit != "none" and not chosen:
        raise ConfigError(key, "neither target_epsilon nor noise_multiplier is set", "set one of them, or both")
    if privacy.unit == "none" and chosen:
        name = "target_epsilon" if privacy.target_epsilon is not None else "noise_multiplier"
        raise ConfigError(f"{key}.{name}", "is set, but privacy.unit is none", "set privacy.unit to record or client")


def check_stricter(child: PrivacyConfig, parent: PrivacyConfig, key: str) -> None:
    """A node below one that promises privacy may promise more, never less.

    Args:
        child: in force at the node.
        parent: in force at its parent.
        key: dotted key of the node's privacy section, for messages.

    Raises:
        ConfigError: names the value that would weaken the parent's promise.
    """
    if parent.unit == "none":
        return
    weaker = {
        "unit": child.unit != parent.unit,
        "target_epsilon": parent.target_epsilon is not None
        and (child.target_epsilon is None or child.target_epsilon > parent.target_epsilon),
        "noise_multiplier": parent.noise_multiplier is not None
        and (child.noise_multiplier is None or child.noise_multiplier < parent.noise_multiplier),
        "delta": child.delta > parent.delta,
        "max_updates": parent.max_updates is not None
        and (child.max_updates is None or child.max_updates > parent.max_updates),
        "report_metrics": child.report_metrics and not parent.report_metrics,
        "ledger_dir": child.ledger_dir != parent.ledger_dir,
    }
    for name, is_weaker in weaker.items():
        if is_weaker:
            promised, got = getattr(parent, name), getattr(child, name)
            raise ConfigError(f"{key}.{name}", f"{got} weakens the promise of the node above, {promised}", "remove it")


def _workers(workers: Any, key: str) -> None:
    ends = workers if isinstance(workers, list) else [workers, workers]
    whole = all(isinstance(end, int) and not isinstance(end, bool) for end in ends)
    if len(ends) != 2 or not whole or not 0 < ends[0] <= ends[1]:
        raise ConfigError(key, f"got {workers}", "give a whole number above 0, or [min, max]")


def _two_betas(betas: Any, key: str) -> None:
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ConfigError(key, f"got {betas}", "give two numbers from 0 to below 1")


BOUNDS: dict[str, Callable[[Any, str], None]] = {
    "training.local_steps": positive,
    "training.batch_size": positive,
    "training.lr": positive,
    "training.accumulation_steps": positive,
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
    "aggregation.attention.self_weight": not_negative,
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
    "merge.federation": _follows,
    "merge.agreement": _cosine,
    "merge.max_model_step": positive,
    "merge.common_fraction": fraction,
    "exchange.fragments": positive,
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
}
"""What a number of a node's settings may be, by its dotted key."""

RUN_BOUNDS: dict[str, Callable[[Any, str], None]] = {
    "budget.tokens": positive,
    "budget.rounds": positive,
    "budget.seconds": positive,
    "evaluation.tokens": positive,
    "evaluation.final_tokens": positive,
    "evaluation.every_rounds": not_negative,
    "checkpoint.every_s": not_negative,
    "checkpoint.keep": positive,
    "checkpoint.every_updates": positive,
    "checkpoint.patience_s": not_negative,
    "liveness.heartbeat_s": positive,
    "liveness.grace_s": positive,
    "liveness.k": not_negative,
}
"""What a number of the run itself may be."""
