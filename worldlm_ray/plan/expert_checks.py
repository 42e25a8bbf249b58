"""What settings of experts and of exact sums mean together; see `worldlm_ray/plan/checks.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from worldlm_ray.config.schema import NodeSettings
from worldlm_ray.errors import ConfigError
from worldlm_ray.training import deepspeed_config

if TYPE_CHECKING:
    from worldlm_ray.plan.plan import Plan

KEY = "model.lora.experts"


def sums_of_experts(plan: Plan) -> Iterable[ConfigError]:
    """A sum needs children that say their weight, and experts need parents that give sums."""
    experts = plan.config.model.lora.experts
    for node in plan.distinct_inner:
        rule, key = node.settings.aggregation.rule, f"{node.key}.aggregation.rule"
        if experts != "none" and rule != "sums":
            got = f"{rule}, but {KEY} is {experts}: experts of others are differences of sums"
            yield ConfigError(key, got, "set it to sums")
        if experts == "none" and rule == "sums":
            yield ConfigError(key, f"sums, but {KEY} is none: no client says its weight in a sum", "set either")


def exact_parts(plan: Plan) -> Iterable[ConfigError]:
    """A part of a sum is subtracted to the bit: what arrives must be what was sent."""
    for node in plan.distinct:
        codec = node.settings.exchange.codec
        if plan.config.model.lora.experts != "none" and codec != "fp32":
            got = f"{codec}, but {KEY} is {plan.config.model.lora.experts}, whose sums are exact"
            yield ConfigError(f"{node.key}.exchange.codec", got, "set it to fp32")


def one_own_adapter(plan: Plan) -> Iterable[ConfigError]:
    """A client has one own adapter, and a model of several experts is no single flat buffer."""
    experts = plan.config.model.lora.experts
    if experts == "none":
        return
    if plan.config.evaluation.keep_best:
        got = f"true, but {KEY} is {experts}: the best round's mixture is not kept"
        yield ConfigError("evaluation.keep_best", got, "set it to false")
    for _, client in plan.distinct_clients:
        for key, value, cure in _of_one_adapter(client.settings):
            yield ConfigError(f"{client.key}.{key}", f"{value}, but {KEY} is {experts}", cure)


def _of_one_adapter(settings: NodeSettings) -> Iterable[tuple[str, str, str]]:
    """Settings of a client that has one model: key, value and cure."""
    merge = settings.merge
    if merge.has_base:
        cure = "set it to 1 to begin every round from the federation's mean, or to 0 to leave own adapters alone"
        yield "merge.client", f"{merge.client}", cure
    if merge.fine_tune:
        yield "merge.fine_tune", f"{merge.fine_tune:g}", "set it to 0: the routers weigh the own adapter"
    if merge.serve_parent:
        yield "merge.serve_parent", "true", "set it to false: the client serves its mixture"
    if settings.privacy.unit == "record":
        yield "privacy.unit", "record", "set it to none: the router is trained without noise, and so are the experts"
    if deepspeed_config.is_zero(settings):
        yield "training.zero_stage", f"{settings.training.zero_stage}", "set it to 0 and resources.workers to 1"
    if settings.resources.clients_per_process > 1:
        number = settings.resources.clients_per_process
        yield "resources.clients_per_process", f"{number}", "set it to 1: routers have no slots to swap"
    if not settings.simulation.train:
        yield "simulation.train", "false", "set it to true: the cost model has no experts"


RULES: tuple[Callable[[Plan], Iterable[ConfigError]], ...] = (sums_of_experts, exact_parts, one_own_adapter)
"""Every rule, in the order in which they are checked."""
