"""What a border between clusters needs: rules of `plan/checks.py` about members, and about a run that is one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from worldlm_ray.config.gateway import LeastPrivacy
from worldlm_ray.errors import ConfigError
from worldlm_ray.plan.privacy_checks import weaker

if TYPE_CHECKING:
    from worldlm_ray.plan.plan import Plan
    from worldlm_ray.plan.tree import NodeSpec


def members_need_a_gateway(plan: Plan) -> Iterable[ConfigError]:
    """A member comes over a border, at which the world must listen."""
    members, listen = plan.root.members, plan.config.gateway.listen
    if members and listen is None:
        got = f"is not given, but {members[0].path} is a member"
        yield ConfigError("gateway.listen", got, "give HOST:PORT, such as 0.0.0.0:8443")
    if listen is not None and not members:
        got = f"got {listen!r}, but the tree has no member"
        yield ConfigError("gateway.listen", got, "add an entry `member: NAME` to the tree, or remove this")


def members_have_one_parent(plan: Plan) -> Iterable[ConfigError]:
    """A gateway speaks for one node."""
    members = plan.root.members
    for member in members[1:]:
        if member.path.rpartition("/")[0] != members[0].path.rpartition("/")[0]:
            got = f"{member.path} and {members[0].path} are members of different nodes"
            yield ConfigError(f"{member.key}.member", got, "let all members of this configuration have one parent")


def borders_train(plan: Plan) -> Iterable[ConfigError]:
    """The cost model of a simulation knows one cluster."""
    if (plan.root.members or plan.root.remote) and not plan.root.settings.simulation.train:
        where = plan.root.members[0].path if plan.root.members else plan.root.path
        cure = "set it to true, or do without members"
        yield ConfigError("simulation.train", f"got false, but {where} is in another cluster", cure)


RULES: tuple[Callable[[Plan], Iterable[ConfigError]], ...] = (
    members_need_a_gateway,
    members_have_one_parent,
    borders_train,
)
"""In the order in which they are checked."""


def check_one_cluster(root: NodeSpec, command: str) -> None:
    """Refuse a run with nodes in other clusters where all nodes must be here.

    Args:
        root: of the run's tree.
        command: what cannot be done.

    Raises:
        ConfigError: a node is in another cluster.
    """
    for member in root.members:
        raise ConfigError(f"{member.key}.member", f"{member.path} is in another cluster", f"{command} needs all nodes")
    if root.remote:
        raise ConfigError("joins", "the world is in another cluster", f"{command} needs all nodes: begin at `world`")


# ---- what a charter or a policy asks of a member's configuration -------------------------------------------------


def least_privacy(plan: Plan, least: LeastPrivacy) -> Iterable[ConfigError]:
    """Clients whose privacy is weaker than a charter or a policy asks for."""
    if least.unit == "none":
        return
    for node in plan.distinct:
        own = node.settings.privacy
        if node.kind == "client" and (names := weaker(own, replace(own, **vars(least)))):
            got, asked = getattr(own, names[0]), getattr(least, names[0])
            problem = f"is {'not given' if got is None else got} at {node.path}, and {asked} is asked for"
            yield ConfigError(f"{node.key}.privacy.{names[0]}", problem, "make it stricter, or ask for less")


def summed_clients(spec: NodeSpec) -> int:
    """Different clients whose work is in each update of a node, at least: what its rules hold to in any case.

    An aggregation of a node with `privacy.unit: client` takes one update of each client, and as many as its trigger
    asks for. Every other one may be made of the updates of one child, while the others are away. That
    of a member is the work of one client at least: its tree is not known here.
    """
    if spec.kind == "client":
        return 1
    rules = spec.settings.aggregation
    least = min(map(summed_clients, spec.children), default=1)
    if spec.settings.privacy.unit != "client" or any(child.kind != "client" for child in spec.children):
        return least
    return max(least, {"goal_achieved": rules.buffer_size, "time_up": rules.quorum}.get(rules.trigger, 1))
