"""What the settings of a run mean together: every check that needs more than one value is a rule of one list.

A rule is a function from a plan to the errors that it finds. Its docstring says the reason. `check` runs all of them
and raises the first error. Bounds of single values stand in `config/checks.py`, the form of the tree in `plan/tree.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from worldlm_ray.aggregation.rules import rule_name, rule_of
from worldlm_ray.data import check_sources
from worldlm_ray.errors import ConfigError
from worldlm_ray.plan import backend_checks, border_checks, client_checks, expert_checks, initial_model, privacy_checks
from worldlm_ray.plan.faults import Faults
from worldlm_ray.training import deepspeed_config

if TYPE_CHECKING:
    from worldlm_ray.plan.plan import Plan
    from worldlm_ray.plan.tree import NodeSpec

Rule = Callable[["Plan"], Iterable[ConfigError]]


def check(plan: Plan, rules: Iterable[Rule]) -> None:
    """Run rules on a plan.

    Raises:
        ConfigError: the first error that a rule finds.
    """
    for rule in rules:
        for error in rule(plan):
            raise error


def _raised_by(check: Callable[..., object], *arguments: Any, **named: Any) -> Iterable[ConfigError]:
    """The error that a check raises, as a rule gives it."""
    try:
        check(*arguments, **named)
    except ConfigError as error:
        return error.each
    return ()


# ---- the parent's model beside the client's own ------------------------------------------------------------------


def validated_has_text(plan: Plan) -> Iterable[ConfigError]:
    """Validation text decides what the client's own model is. Of a client that promises privacy none is read."""
    for _, client in plan.distinct_clients:
        settings = client.settings
        chooses = settings.merge.client == "validated" and settings.privacy.unit != "record"
        if chooses and settings.data.validation_fraction == 0.0:
            got = "got 0, but merge.client is validated: there is no text to decide on"
            yield ConfigError(
                f"{client.key}.data.validation_fraction", got, "raise it, or set merge.client to a number"
            )


def apart_holds_two_models(plan: Plan) -> Iterable[ConfigError]:
    """Where a client can hold one model only, an own model that takes nothing from its parent's has no place."""
    for _, client in plan.distinct_clients:
        settings = client.settings
        if settings.merge.client == "apart" and (
            settings.privacy.unit == "record" or deepspeed_config.is_zero(settings)
        ):
            what = "promises privacy of records" if settings.privacy.unit == "record" else "has DeepSpeed's workers"
            cure = "set it to a number or to validated at this client"
            yield ConfigError(f"{client.key}.merge.client", f"apart, but the client {what}: it has one model", cure)


def proximal_in_one_process(plan: Plan) -> Iterable[ConfigError]:
    """DeepSpeed's workers hold parts of one model, and none of another one to be drawn to."""
    for _, client in plan.distinct_clients:
        if client.settings.merge.proximal and deepspeed_config.is_zero(client.settings):
            got = f"got {client.settings.merge.proximal:g}, but the client has DeepSpeed's workers"
            yield ConfigError(f"{client.key}.merge.proximal", got, "set it to 0 at this client")


# ---- robust rules, caps, key layers ------------------------------------------------------------------------------


def robust_needs_three(plan: Plan) -> Iterable[ConfigError]:
    """The median of one or two values is their mean."""
    for at, settings in plan.settings_in_force:
        rules = settings.aggregation
        if rules.robust.rule != "none" and rules.trigger == "goal_achieved" and rules.buffer_size < 3:
            got = f"{rules.robust.rule} of {rules.buffer_size} updates trusts them all"
            cure = "set aggregation.buffer_size to 3 or more, or trigger: synchronous"
            yield ConfigError(f"{at}aggregation.robust.rule", got, cure)


def robust_without_residuals(plan: Plan) -> Iterable[ConfigError]:
    """A residual is a key layer with a low score; coordinate-wise rules give no scores."""
    for at, settings in plan.settings_in_force:
        rules = settings.aggregation
        if rules.robust.rule != "none" and rules.residuals.per_round:
            got = f"{rules.robust.rule} does not score key layers, by which residuals are found"
            yield ConfigError(f"{at}aggregation.robust.rule", got, "set aggregation.residuals.per_round to 0")


def capped_weights(plan: Plan) -> Iterable[ConfigError]:
    """A cap on the share of one child's weight needs children with weights."""
    for node in plan.distinct_inner:
        rules, unit = node.settings.aggregation, node.settings.privacy.unit
        if rules.max_share < 1.0 and (unit == "client" or rules.robust.rule != "none"):
            what = "client-level privacy" if unit == "client" else f"aggregation.robust.rule {rules.robust.rule}"
            got = f"got {rules.max_share:g}, but {what} gives all children one weight"
            yield ConfigError(f"{node.key}.aggregation.max_share", got, "set it to 1 here")


def one_aggregation_rule(plan: Plan) -> Iterable[ConfigError]:
    """A setting that chooses a rule would replace the named one in silence."""
    for node in plan.distinct_inner:
        rules, named = node.settings.aggregation, node.settings.aggregation.rule
        chosen, key, cure = rule_name(rules), f"{node.key}.aggregation.rule", "set one of the two"
        if named != "mean" and node.settings.privacy.unit == "client":
            yield ConfigError(key, f"{named}, but privacy.unit client has another rule", "set it to mean here")
        elif named not in ("mean", chosen):
            setting = "max_share" if chosen == "capped" else "robust.rule"
            yield ConfigError(key, f"{named}, but aggregation.{setting} chooses {chosen}", cure)
        elif wrong := rule_of(rules).incompatible_with(rules):
            yield ConfigError(key, f"{chosen} does not go with it: {wrong}", "change either")


def caps_that_add_up(plan: Plan) -> Iterable[ConfigError]:
    """Shares of n children, each at most s, add up to 1 only if n * s is 1 or more."""
    for node in plan.distinct_inner:
        rules, children = node.settings.aggregation, len(node.children)
        fewest = {"goal_achieved": rules.buffer_size, "time_up": rules.quorum}.get(rules.trigger, children)
        fewest = min(fewest, children)
        if fewest * rules.max_share < 1.0:
            may = f"{fewest} children" if fewest > 1 else "one child"
            got = f"got {rules.max_share:g}, but an aggregation of {node.path} may have {may}"
            raising = {"goal_achieved": "raise buffer_size, or ", "time_up": "raise quorum, or "}
            cure = f"{raising.get(rules.trigger, '')}set it to {math.ceil(1000 / fewest) / 1000:g} or more here"
            yield ConfigError(f"{node.key}.aggregation.max_share", f"{got}, with {1 / fewest:.3g} each", cure)


# ---- clients that share a process --------------------------------------------------------------------------------


def shared_without_workers(plan: Plan) -> Iterable[ConfigError]:
    """A client that DeepSpeed trains fills several processes."""
    for _, client in plan.distinct_clients:
        number = client.settings.resources.clients_per_process
        if number > 1 and deepspeed_config.is_zero(client.settings):
            key = f"{client.key}.resources.clients_per_process"
            got = f"{number}, but a client that DeepSpeed trains has its own workers"
            yield ConfigError(key, got, "set it to 1 there")


# ---- clients that train while they exchange ----------------------------------------------------------------------


def _overlapping(plan: Plan) -> Iterable[tuple[NodeSpec, NodeSpec, str]]:
    """Parent and client of each kind of client that overlaps, with the key of the setting."""
    for parent, client in plan.distinct_clients:
        if client.settings.exchange.overlap:
            yield parent, client, f"{client.key}.exchange.overlap"


def overlap_without_waiting(plan: Plan) -> Iterable[ConfigError]:
    """A synchronous round ends when the last update is there: nothing is left to overlap."""
    for parent, _, key in _overlapping(plan):
        if parent.settings.aggregation.trigger == "synchronous":
            got = f"true, but {parent.path} is synchronous: its clients wait for each other's updates"
            yield ConfigError(key, got, "set it to false there, or another trigger")


def overlap_of_whole_models(plan: Plan) -> Iterable[ConfigError]:
    """DeepSpeed's workers hold a layer at a time, and take a new model between two rounds only."""
    for _, client, key in _overlapping(plan):
        if deepspeed_config.is_zero(client.settings):
            got = "true, but a client that DeepSpeed trains gets its model a layer at a time, between two rounds"
            yield ConfigError(key, got, "set it to false at this client")


def overlap_from_own_model(plan: Plan) -> Iterable[ConfigError]:
    """An overlapping round begins from the client's own model, before its parent's is there."""
    for _, client, key in _overlapping(plan):
        if not client.settings.simulation.train:
            got = "true, but the client has simulation.train: false, whose rounds begin from what the parent has sent"
            yield ConfigError(key, got, "set it to false, or do without simulation.train: false")


# ---- the rest ----------------------------------------------------------------------------------------------------


def one_vocabulary(plan: Plan) -> Iterable[ConfigError]:
    """Models are added up element by element: the rows of an embedding must mean the same tokens everywhere."""
    tokenizers = {client.settings.data.tokenizer: client.key for _, client in plan.distinct_clients}
    if len(tokenizers) > 1:
        first, second = list(tokenizers)[:2]
        got = f"{second!r} differs from {first!r} of {tokenizers[first]}"
        cure = "one world has one vocabulary: set data.tokenizer once, at the top"
        yield ConfigError(f"{tokenizers[second]}.data.tokenizer", got, cure)


def batches_for_workers(plan: Plan) -> Iterable[ConfigError]:
    """DeepSpeed shares a batch out equally, and each of its settings needs a ZeRO stage."""
    for _, client in plan.distinct_clients:
        yield from _raised_by(deepspeed_config.check, client.settings, parameters=plan.layout.size, key=client.key)


def all_train_or_none(plan: Plan) -> Iterable[ConfigError]:
    """The cost model stands for the model of the whole world: its buffers do not fit those of a trained one."""
    for node in plan.distinct:
        train, ours = node.settings.simulation.train, plan.root.settings.simulation.train
        if train != ours:
            got = f"{str(train).lower()}, and {str(ours).lower()} at the world"
            cure = "a world trains or does not: set it once, at the top"
            yield ConfigError(f"{node.key}.simulation.train", got, cure)


def known_faults(plan: Plan) -> Iterable[ConfigError]:
    """A fault happens to a node that is there, and a client leaves and joins in turn."""
    return _raised_by(Faults.parse, plan.config.faults, kinds=plan.kinds)


# ---- what lies on this machine -----------------------------------------------------------------------------------


def readable_texts(plan: Plan) -> Iterable[ConfigError]:
    """A client's text must be there before the run begins."""
    for _, client in plan.distinct_clients:
        yield from _raised_by(check_sources, client.settings.data, f"{client.key}.data")


def whole_model_folder(plan: Plan) -> Iterable[ConfigError]:
    """An export needs the files beside the weights: one that is damaged must be found before training, not after."""
    folder = plan.config.model.initial_from
    if folder is not None:
        yield from _raised_by(initial_model.check_side_files, folder)
        yield from _raised_by(initial_model.check_weights, folder, plan.shape, plan.layout)


def best_of_measured_rounds(plan: Plan) -> Iterable[ConfigError]:
    """The best round is one of those that are measured."""
    evaluation = plan.config.evaluation
    if evaluation.keep_best and not evaluation.every_rounds:
        cure = "set evaluation.every_rounds above 0, or this to false"
        yield ConfigError("evaluation.keep_best", "no round is measured (evaluation.every_rounds is 0)", cure)


RULES: tuple[Rule, ...] = (
    validated_has_text,
    apart_holds_two_models,
    proximal_in_one_process,
    *client_checks.RULES,
    *backend_checks.RULES,
    *expert_checks.RULES,
    robust_needs_three,
    robust_without_residuals,
    one_vocabulary,
    *privacy_checks.RULES,
    shared_without_workers,
    overlap_without_waiting,
    overlap_of_whole_models,
    overlap_from_own_model,
    batches_for_workers,
    all_train_or_none,
    best_of_measured_rounds,
    one_aggregation_rule,
    capped_weights,
    caps_that_add_up,
    *border_checks.RULES,
    known_faults,
)
"""Every rule that needs no file of this machine, in the order in which they are checked."""
DATA_RULES: tuple[Rule, ...] = (readable_texts, whole_model_folder)
"""Rules about files that need not be on this machine."""
