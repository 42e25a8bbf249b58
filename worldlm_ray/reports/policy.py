"""The rules of a run in words: how each node aggregates, what it takes from its parent, and its promise of privacy."""

from __future__ import annotations

from collections.abc import Iterator

from worldlm_ray.config.federated import AggregationConfig, MergeConfig
from worldlm_ray.config.schema import NodeSettings
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.tree import NodeSpec

_OF_CLIENTS = {
    "validated": "its clients train its model for it, and a personal model each, which validation text chooses",
    "apart": "its clients train its model for it, and a personal model each, which takes nothing from it",
}


def policy(plan: Plan, *, most: int = 50) -> dict[str, str]:
    """The rules of every inner node, by path, parents first.

    Args:
        plan: the run.
        most: nodes that are described.
    """
    return {spec.path: "; ".join(_rules(spec, plan.shape.context)) for spec in plan.root.inner[:most]}


def _rules(spec: NodeSpec, context: int) -> Iterator[str]:
    rules = spec.settings.aggregation
    yield _trigger(rules)
    yield _aggregation(rules)
    if rules.staleness.fn != "constant":
        yield f"discounts stale updates ({rules.staleness.fn})"
    if rules.max_staleness is not None:
        yield f"refuses updates that are more than {rules.max_staleness} versions old"
    if rules.max_update_norm is not None:
        yield f"refuses updates with a norm above {rules.max_update_norm:g}"
    if spec.kind != "world":
        yield f"takes {_share(spec.settings.merge.federation)} its parent's model"
    clients = [child for child in spec.children if child.kind == "client"]
    yield from dict.fromkeys(_of_clients(child.settings.merge) for child in clients)
    yield from dict.fromkeys(filter(None, (_privacy(child.settings, context) for child in clients)))


def _trigger(rules: AggregationConfig) -> str:
    if rules.trigger == "synchronous":
        return "waits for an update of every live child"
    if rules.trigger == "time_up":
        return f"aggregates every {rules.time_up_s:g} s, with {rules.quorum} updates or more"
    return "aggregates each update" if rules.buffer_size == 1 else f"aggregates {rules.buffer_size} updates at a time"


def _aggregation(rules: AggregationConfig) -> str:
    how = "mean, weighted by tokens" if rules.rule == "mean" else f"rule {rules.rule}"
    if rules.robust.rule != "none":
        how = f"{rules.robust.rule} of the updates"
    if rules.robust.clip_norm is not None:
        how += f", clipped to norm {rules.robust.clip_norm:g}"
    if rules.max_share < 1.0:
        how += f", at most {rules.max_share:.0%} of the weight to a child"
    return f"{how}, server optimizer {rules.server_optimizer.name}"


def _of_clients(merge: MergeConfig) -> str:
    if isinstance(merge.client, str):
        return _OF_CLIENTS.get(merge.client, f"merge of its clients: {merge.client}")
    return f"its clients take {_share(merge.client)} its model"


def _share(part: float) -> str:
    return "all of" if part == 1.0 else "nothing of" if part == 0.0 else f"{part:.0%} of"


def _privacy(settings: NodeSettings, context: int) -> str:
    privacy = settings.privacy
    if privacy.unit == "none":
        return ""
    budget = "" if privacy.target_epsilon is None else f", epsilon at most {privacy.target_epsilon:g}"
    if privacy.unit == "record":
        unit = f"private clients add noise to gradients (DP-SGD, a record is a sequence of {context} tokens"
    else:
        unit = "it adds noise to whole updates of its clients (a unit is a client"
    return f"{unit}, clipped to {privacy.max_grad_norm:g}{budget}, delta {privacy.delta:g})"
