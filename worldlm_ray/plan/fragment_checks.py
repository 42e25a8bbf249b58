"""Rules of an exchange that carries one fragment of the backbone at a time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from worldlm_ray.errors import ConfigError

if TYPE_CHECKING:
    from worldlm_ray.plan.plan import Plan
    from worldlm_ray.plan.tree import NodeSpec


def _in_parts(plan: Plan) -> list[NodeSpec]:
    return [node for node in plan.distinct if node.kind != "world" and node.settings.exchange.fragments > 1]


def enough_parameters(plan: Plan) -> Iterable[ConfigError]:
    """A fragment holds whole parameters: there cannot be more of them than of those."""
    for node in _in_parts(plan):
        try:
            plan.layout.fragments(node.settings.exchange.fragments)
        except ValueError as error:
            got = f"got {node.settings.exchange.fragments}, but {error}"
            yield ConfigError(f"{node.key}.exchange.fragments", got, "give a smaller number")


def fragments_of_a_model(plan: Plan) -> Iterable[ConfigError]:
    """The cost model has no backbone to cut."""
    for node in _in_parts(plan):
        if not node.settings.simulation.train:
            got = "more than one, but simulation.train is false, whose clients count whole models"
            yield ConfigError(f"{node.key}.exchange.fragments", got, "set it to 1")


def adaptive_on_the_whole(plan: Plan) -> Iterable[ConfigError]:
    """The cosine that an adaptive merge judges by is one of whole backbones."""
    for node in _in_parts(plan):
        for below in node.one_of_each():
            kind = "client" if below.kind == "client" else "federation"
            if getattr(below.settings.merge, kind) == "adaptive":
                got = f"adaptive judges by the whole backbone, of which {node.path} exchanges a fragment at a time"
                cure = f"give a number, or set exchange.fragments of {node.path} to 1"
                yield ConfigError(f"{below.key}.merge.{kind}", got, cure)


def one_number_per_parent(plan: Plan) -> Iterable[ConfigError]:
    """A node sends and adds up the same slice of the backbone for all of its children."""
    for parent in plan.distinct_inner:
        numbers = {child.settings.exchange.fragments: child for child in parent.children}
        if len(numbers) > 1:
            first, second = list(numbers.items())[:2]
            got = f"{second[0]} differs from the {first[0]} of {first[1].path}"
            yield ConfigError(f"{second[1].key}.exchange.fragments", got, "give all children of a node the same")


def noise_for_whole_updates(plan: Plan) -> Iterable[ConfigError]:
    """Client-level noise is scaled to the norm of a whole update."""
    for parent in plan.distinct_inner:
        for child in parent.children[:1]:
            number = child.settings.exchange.fragments
            if number > 1 and parent.settings.privacy.unit == "client":
                got = f"{number} fragments, but client-level noise of {parent.path} is made for whole updates"
                yield ConfigError(f"{child.key}.exchange.fragments", got, "set it to 1")


def robust_on_all_children(plan: Plan) -> Iterable[ConfigError]:
    """A median of a slice needs most children in it; in turn, few send the same slice at one time."""
    for parent in plan.distinct_inner:
        rule = parent.settings.aggregation.robust.rule
        for child in parent.children[:1]:
            if child.settings.exchange.fragments > 1 and rule != "none":
                got = f"{child.settings.exchange.fragments} fragments, of which {rule} would find the agreement of "
                got += "those few that came"
                cure = f"set it to 1, or aggregation.robust.rule of {parent.path} to none"
                yield ConfigError(f"{child.key}.exchange.fragments", got, cure)


RULES = (
    enough_parameters,
    fragments_of_a_model,
    adaptive_on_the_whole,
    one_number_per_parent,
    noise_for_whole_updates,
    robust_on_all_children,
)
