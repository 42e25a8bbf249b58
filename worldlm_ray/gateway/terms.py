"""What the two sides of a border must have alike, from the plan of either."""

from __future__ import annotations

import hashlib

from worldlm_ray.data.tokenizer import tokenizer_file
from worldlm_ray.gateway import wire
from worldlm_ray.gateway.link import hello_of
from worldlm_ray.plan import build
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.tree import NodeSpec
from worldlm_ray.tensors.buffers import params_sha256

SHAPE = ("hidden_size", "layers", "heads", "kv_heads", "context", "vocab_size")
"""Numbers of a model that its layout does not show, or does not name."""


def sizes_of(plan: Plan, parent: NodeSpec) -> wire.Sizes:
    """How large what crosses a border is.

    Args:
        plan: the run, of either side.
        parent: the node that members have for a parent.
    """
    rules = parent.settings.aggregation.residuals
    residuals = max(rules.per_round, rules.offers) if rules.per_round else 0
    return wire.Sizes(layout=plan.layout, codecs=(plan.config.exchange.codec,), residuals=residuals)


def hello(plan: Plan, parent: NodeSpec) -> wire.Hello:
    """What this side has. It computes the initial parameters, which takes memory for a while.

    Args:
        plan: the run.
        parent: the node that members have for a parent.

    Raises:
        ConfigError: the initial parameters or the tokenizer cannot be read.
    """
    initial = params_sha256(build.initial(plan))
    return hello_of(sizes_of(plan, parent), initial=initial, same=same(plan, parent))


def same(plan: Plan, parent: NodeSpec) -> tuple[str, ...]:
    """Settings that must be alike, each `key=value`; those that a person finds first."""
    rules = parent.settings.aggregation.residuals
    found = {f"model.{name}": getattr(plan.shape, name, "") for name in SHAPE}
    found |= {
        "model.key_layers": " ".join(plan.config.model.key_layers)[:200],
        "data.tokenizer": _tokenizer(plan),
        **{f"budget.{unit}": amount for unit, amount in vars(plan.config.budget).items()},
        "exchange.codec": plan.config.exchange.codec,
        "aggregation.residuals.per_round": rules.per_round,
        "aggregation.residuals.offers": rules.offers,
    }
    if plan.config.model.initial_from is None:
        found["seed"] = plan.config.seed
    return tuple(f"{key}={value}" for key, value in found.items())


def _tokenizer(plan: Plan) -> str:
    if plan.tokenizer == "bytes":
        return plan.tokenizer
    return f"sha256:{hashlib.sha256(tokenizer_file(plan.tokenizer).read_bytes()).hexdigest()[:16]}"
