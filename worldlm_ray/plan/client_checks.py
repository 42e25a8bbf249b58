"""What settings of a client's training and of what it serves mean together; see `worldlm_ray/plan/checks.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from worldlm_ray.errors import ConfigError
from worldlm_ray.training import deepspeed_config

if TYPE_CHECKING:
    from worldlm_ray.plan.plan import Plan


def served_without_choice(plan: Plan) -> Iterable[ConfigError]:
    """A client that serves its parent's model drops its own: to choose that or to fine-tune it would be in vain."""
    for _, client in plan.distinct_clients:
        merge = client.settings.merge
        other = "merge.client validated" if merge.client == "validated" else "merge.fine_tune"
        if merge.serve_parent and (merge.client == "validated" or merge.fine_tune):
            got = f"true, but {other} makes another model for the end"
            yield ConfigError(f"{client.key}.merge.serve_parent", got, "set one of the two")


def mixture_of_two_models(plan: Plan) -> Iterable[ConfigError]:
    """A mixture needs a personal model that takes nothing from the parent's."""
    for _, client in plan.distinct_clients:
        merge, key = client.settings.merge, f"{client.key}.merge.mixture"
        if merge.mixture is not None and merge.client != "apart":
            yield ConfigError(key, f"got {merge.mixture:g}, but merge.client is {merge.client}", "set that to apart")


def head_needs_a_body(plan: Plan) -> Iterable[ConfigError]:
    """Head and body are trained in turn: both must be there, and have steps."""
    for _, client in plan.distinct_clients:
        training, layout, key = client.settings.training, plan.layout, f"{client.key}.training.head_first"
        if not training.head_steps:
            continue
        if not layout.key_size or not layout.backbone_size:
            got = f"got {training.head_first:g}, but the model has no {'backbone' if layout.key_size else 'key layers'}"
            yield ConfigError(key, got, "set it to 0, or choose some layers by model.key_layers")
        elif training.head_steps >= training.local_steps:
            got = f"{training.head_first:g} of {training.local_steps} steps leaves none for the backbone"
            yield ConfigError(key, got, "lower it, or raise training.local_steps")


def head_first_on_one_device(plan: Plan) -> Iterable[ConfigError]:
    """DP-SGD clips gradients of the whole model, and DeepSpeed's optimizer steps through all of it."""
    for _, client in plan.distinct_clients:
        settings = client.settings
        if settings.training.head_first and (settings.privacy.unit == "record" or deepspeed_config.is_zero(settings)):
            private = settings.privacy.unit == "record"
            what = "promises privacy of records" if private else "has DeepSpeed's workers"
            got = f"got {settings.training.head_first:g}, but the client {what}: a step trains its whole model"
            yield ConfigError(f"{client.key}.training.head_first", got, "set it to 0 at this client")


RULES: tuple[Callable[[Plan], Iterable[ConfigError]], ...] = (
    served_without_choice,
    mixture_of_two_models,
    head_needs_a_body,
    head_first_on_one_device,
)
"""Every rule, in the order in which they are checked."""
