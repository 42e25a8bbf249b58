"""What may still be trained: the run's budget, and what each private client may still contribute."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from worldlm_ray.aggregation.events import Charge, Command, Note
from worldlm_ray.aggregation.private_fold import ClientPrivacy
from worldlm_ray.config.schema import BudgetConfig
from worldlm_ray.errors import PrivacyError
from worldlm_ray.records import PrivacyRecord


class Budget:
    """How much of the run's budget is spent. The world counts; a federation hears it from its parent.

    Args:
        config: the run's budget.
    """

    def __init__(self, config: BudgetConfig) -> None:
        self.config = config
        self.progress = 0.0
        """Share of the budget that is spent."""
        self.finished = False
        """Whether no new local round should begin."""
        self.began_s: float | None = None
        """When the first child began: a budget of seconds counts from here."""

    def begin(self, now_s: float) -> None:
        """A child begins."""
        self.began_s = now_s if self.began_s is None else self.began_s

    def spend(self, *, tokens: int, started_tokens: int, now_s: float) -> None:
        """How much is spent at the world.

        Args:
            tokens: of all updates that were aggregated.
            started_tokens: of all local rounds begun.
            now_s: run time.
        """
        if self.config.tokens is not None:
            self.progress = min(tokens / self.config.tokens, 1.0)
            self.finished = started_tokens >= self.config.tokens
        elif self.config.seconds is not None:
            trained_s = now_s - (now_s if self.began_s is None else self.began_s)
            self.progress = min(trained_s / self.config.seconds, 1.0)
            self.finished = trained_s >= self.config.seconds

    def state(self) -> dict[str, Any]:
        """What a restart needs. The budget may be larger then: whether it is spent is found anew."""
        return {"progress": self.progress, "began_s": self.began_s}

    def restore(self, saved: dict[str, Any]) -> None:
        """Become what `state` described."""
        self.progress, self.began_s, self.finished = saved["progress"], saved["began_s"], False


class PrivacyBudget:
    """What the private clients directly below a node have contributed, and may still contribute.

    Args:
        path: the node's path.
        privacy: what they are promised; None for nothing.
        contributions: how often each of them has contributed, by its ledger.
    """

    def __init__(self, path: str, privacy: ClientPrivacy | None, contributions: Mapping[str, int] | None) -> None:
        self.path, self.privacy = path, privacy
        self.contributions = dict(contributions or {})
        """Updates of clients that their ledgers have paid for."""

    def charge(self, sender: str, now_s: float) -> list[Command]:
        """Have a private client's contribution written down, before anything that it has touched is published."""
        if self.privacy is None or sender in self.privacy.federations:
            return []
        count = self.contributions[sender] = self.contributions.get(sender, 0) + 1
        epsilon = self.privacy.epsilon(sender, count)
        record = PrivacyRecord(node=f"{self.path}/{sender}", now_s=now_s, epsilon=epsilon)
        return [Charge(child=sender), Note(record=record)]

    def is_exhausted(self, sender: str) -> bool:
        """Whether a private client may contribute no more."""
        if self.privacy is None or sender not in self.privacy.limits:
            return False
        return self.contributions.get(sender, 0) >= self.privacy.limits[sender]

    def state(self) -> dict[str, int]:
        """What a restart compares the ledgers with."""
        return dict(self.contributions)

    def check(self, saved: Mapping[str, int]) -> None:
        """Check that no ledger has lost what a checkpoint knows.

        Raises:
            PrivacyError: one holds fewer contributions.
        """
        for name, count in saved.items():
            if self.privacy is not None and self.contributions.get(name, count) < count:
                raise PrivacyError(
                    f"{self.path}/{name}: its ledger holds {self.contributions[name]} of {count} contributions; "
                    "restore the file from a copy"
                )
