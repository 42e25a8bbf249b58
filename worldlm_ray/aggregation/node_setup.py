"""What an inner node is given when it is made: its place in the tree, and its rules."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from worldlm_ray.config.federated import AggregationConfig, MergeConfig
from worldlm_ray.config.schema import BudgetConfig, LivenessConfig


@dataclass(frozen=True, kw_only=True)
class NodePlace:
    """Where a node stands in the tree, and who is below it."""

    path: str
    """Such as `world/europe`."""
    children: tuple[str, ...]
    """Names, in the order of the tree."""
    has_parent: bool
    """False for the world."""
    optional: Collection[str] = ()
    """Children for which the node does not wait until they join: clients of an elastic federation, or that come late,
    and federations that have none but such."""
    min_clients: int = 0
    """Of these, so many must have joined before any of them is served."""

    @property
    def name(self) -> str:
        """The node's name among its siblings."""
        return self.path.rsplit("/", 1)[-1]


@dataclass(frozen=True, kw_only=True)
class NodeRules:
    """How a node works."""

    aggregation: AggregationConfig
    """What to accept, when to aggregate and how."""
    merge: MergeConfig
    """How to move to the parent's model."""
    budget: BudgetConfig
    """The run's; used by the world alone."""
    save_every: int = 4
    """A child should keep no more updates than this for the case that the node dies."""
    liveness: LivenessConfig | None = None
    """When a silent child is given up; None for never."""
    codec: str = "fp32"
    """How updates travel to the parent."""
