"""What a child may claim of its own work: the tokens of one update, and of the rounds that it has begun.

A node cannot see how much a child has trained. It knows what the plan lets a round have, and what has arrived.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Quota:
    """What one child may claim."""

    update_tokens: int
    """Tokens of one update, at most."""
    started_tokens: int
    """Tokens of rounds begun of which no update has arrived yet, at most."""
    residuals: int = 0
    """Residuals that one of its updates may pass on."""

    def counted(self, claimed: int, *, settled: int) -> int:
        """How much of what a child says that it has begun is believed.

        Args:
            claimed: tokens of all local rounds begun below the child, by its own word.
            settled: tokens of its updates that have arrived.
        """
        return min(claimed, settled + self.started_tokens)

    def is_plausible(self, claimed: int, *, settled: int) -> bool:
        """Whether a correct child may claim so much: what waits for an exchange may be one update more."""
        return claimed <= settled + self.started_tokens + self.update_tokens


@dataclass(frozen=True, kw_only=True)
class Quotas:
    """What a node and its children may claim."""

    own: Quota | None = None
    """The node's, at its parent; None of the world."""
    children: Mapping[str, Quota] = field(default_factory=dict)
    """By name; without any, claims are not limited."""
