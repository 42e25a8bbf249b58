"""What a charter says, from the plan of the world; and what a member has of it, from the plan of its run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from worldlm_ray.config.gateway import LeastPrivacy
from worldlm_ray.data.tokenizer import tokenizer_file
from worldlm_ray.errors import Refused
from worldlm_ray.exchange.limits import LARGEST_COUNT
from worldlm_ray.gateway import wire
from worldlm_ray.gateway.charter import Charter
from worldlm_ray.plan import build
from worldlm_ray.plan.border_checks import least_privacy
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.quotas import quota
from worldlm_ray.plan.tree import NodeSpec
from worldlm_ray.tensors.buffers import params_sha256

SHAPE = ("hidden_size", "layers", "heads", "kv_heads", "context", "vocab_size")
"""Numbers of a model that its layout does not show, or does not name."""
NONE = "none"
LIMITS = {
    "gateway.member_rate_mbps": "{:g} Mbit/s both ways together",
    "gateway.member_gb_per_day": "{:g} GB of updates and models a day (UTC)",
}
"""Limits of one member's traffic that a charter says, and how a person reads them."""


def sizes_of(plan: Plan, parent: NodeSpec) -> wire.Sizes:
    """How large what crosses a border is.

    Args:
        plan: the run, of either side.
        parent: the node that members have for a parent.
    """
    rules = parent.settings.aggregation.residuals
    residuals = max(rules.per_round, rules.offers) if rules.per_round else 0
    return wire.Sizes(layout=plan.layout, codecs=codecs(plan, parent), residuals=residuals)


def codecs(plan: Plan, parent: NodeSpec) -> tuple[str, ...]:
    """Codecs that members may use; at a member's run the one that it uses."""
    if parent.remote:
        return (plan.top.settings.exchange.codec,)
    return tuple(plan.config.gateway.codecs) or (plan.config.exchange.codec,)


def alike(plan: Plan, parent: NodeSpec) -> dict[str, str]:
    """Settings that both sides must have alike; those that a person finds first stand first.

    It computes the initial parameters, which takes memory for a while.

    Args:
        plan: the run, of either side.
        parent: the node that members have for a parent.

    Raises:
        ConfigError: the initial parameters or the tokenizer cannot be read.
    """
    rules = parent.settings.aggregation.residuals
    found: dict[str, Any] = {f"model.{name}": getattr(plan.shape, name, "") for name in SHAPE}
    found |= {
        "model.key_layers": " ".join(plan.config.model.key_layers)[:200] or None,
        "data.tokenizer": _tokenizer(plan),
        **{f"budget.{unit}": amount for unit, amount in vars(plan.config.budget).items()},
        "aggregation.residuals.per_round": rules.per_round,
        "aggregation.residuals.offers": rules.offers,
    }
    if plan.config.model.initial_from is None:
        found["seed"] = plan.config.seed
    found |= {
        "model.parameters": plan.layout.size,
        "model.layout": plan.layout.hash,
        "model.initial": f"sha256:{params_sha256(build.initial(plan))}",
    }
    return _texts(found)


def imposed(plan: Plan, parent: NodeSpec) -> dict[str, str]:
    """What the world imposes on its members.

    Args:
        plan: the world's run.
        parent: the node that members have for a parent.
    """
    rules, least = parent.settings.aggregation, plan.config.gateway.least_privacy
    tokens = max(quota(member, plan.round_tokens, plan.config.budget).update_tokens for member in plan.root.members)
    fields = ["tokens", "started_tokens"]
    fields += ["residuals"] if rules.residuals.per_round else []
    fields += ["weight", "low", "withdraws"] if rules.rule == "sums" else []
    return _texts(
        {
            "exchange.codecs": " ".join(codecs(plan, parent)),
            "aggregation.max_update_norm": rules.max_update_norm,
            "aggregation.max_staleness": rules.max_staleness,
            "aggregation.max_share": rules.max_share,
            "liveness.heartbeat_s": plan.config.liveness.heartbeat_s,
            "liveness.grace_s": plan.config.liveness.grace_s,
            "update_tokens": None if tokens >= LARGEST_COUNT else tokens,
            **{key: getattr(plan.config.gateway, key.rpartition(".")[2]) or None for key in LIMITS},
            "privacy.unit": least.unit,
            "privacy.target_epsilon": least.target_epsilon,
            "fields": " ".join(fields),
        }
    )


def check_run(plan: Plan, charter: Charter, mine: Mapping[str, str]) -> None:
    """Check a member's run against its world's charter.

    Args:
        plan: the member's run.
        charter: the world's.
        mine: of the member's run, by `alike`.

    Raises:
        Refused: wrong_settings: names the first key that does not fit, with the cure; bad_charter.
    """
    for problem in run_problems(plan, charter, mine):
        raise Refused("wrong_settings", problem)


def run_problems(plan: Plan, charter: Charter, mine: Mapping[str, str]) -> Iterator[str]:
    """What of a member's run does not fit its world's charter, one line for each key; the arguments are `check_run`'s.

    Raises:
        Refused: bad_charter.
    """
    yield from charter.unlike(mine, who=plan.top.path)
    of = f"in charter {charter.epoch} of {charter.node}"
    codec = plan.top.settings.exchange.codec
    if codec not in charter.codecs:
        cure = f"set it to one of {', '.join(charter.codecs)}"
        yield f"exchange.codec is {codec} at {plan.top.path}, and not {of}; {cure}"
    beat_s, grace_s = plan.config.liveness.heartbeat_s, number(charter, "liveness.grace_s")
    if grace_s is not None and beat_s > grace_s:
        text = f"liveness.heartbeat_s is {beat_s:g} at {plan.top.path}, and liveness.grace_s {grace_s:g} {of}"
        yield f"{text}; send heartbeats more often"
    for error in least_privacy(plan, privacy_of(charter)):
        yield f"{error.key}: {error.problem} {of}; make it stricter"


def privacy_of(charter: Charter) -> LeastPrivacy:
    """The least privacy of a member's clients.

    Raises:
        Refused: bad_charter: it asks for what this version does not know.
    """
    unit, epsilon = charter.imposed.get("privacy.unit", NONE), number(charter, "privacy.target_epsilon")
    if unit not in ("none", "record", "client"):
        raise Refused("bad_charter", f"privacy.unit is {unit!r} in charter {charter.epoch}; run a newer worldlm_ray")
    return LeastPrivacy(unit=unit, target_epsilon=epsilon)  # type: ignore[arg-type]  # one of the three


def limits(charter: Charter) -> list[str]:
    """Limits of one member's traffic, for a person; none where the charter has none.

    Raises:
        Refused: bad_charter.
    """
    found = ((text, number(charter, key)) for key, text in LIMITS.items())
    return [text.format(value) for text, value in found if value is not None]


def number(charter: Charter, key: str) -> float | None:
    """A number of a charter; None where it has none.

    Raises:
        Refused: bad_charter.
    """
    text = charter.terms.get(key, NONE)
    try:
        return None if text == NONE else float(text)
    except ValueError as error:
        raise Refused("bad_charter", f"{key} is {text!r} in charter {charter.epoch}, expected a number") from error


def _texts(found: Mapping[str, Any]) -> dict[str, str]:
    return {key: NONE if value is None else str(value) for key, value in found.items()}


def _tokenizer(plan: Plan) -> str:
    if plan.tokenizer == "bytes":
        return plan.tokenizer
    return f"sha256:{hashlib.sha256(tokenizer_file(plan.tokenizer).read_bytes()).hexdigest()[:16]}"
