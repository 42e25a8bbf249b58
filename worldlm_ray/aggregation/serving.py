"""Who waits for the published model, who may have it, and with what."""

from __future__ import annotations

from typing import Any

from worldlm_ray.aggregation.budget import Budget, PrivacyBudget
from worldlm_ray.aggregation.children import Child, Children
from worldlm_ray.aggregation.events import Command, Note, Pull, Serve
from worldlm_ray.aggregation.intake import Intake
from worldlm_ray.aggregation.published import Published
from worldlm_ray.aggregation.residuals import Pool
from worldlm_ray.errors import MessageError
from worldlm_ray.exchange.messages import Model


class Serving:
    """The pulls of one node's children.

    Args:
        min_clients: so many children must have joined before any of them is served for the first time.
        published: the node's model.
        intake: the updates of the aggregation that is being made.
        children: who pulls.
        residuals: what may fit them.
        budget: the run's.
        privacy: what private clients may still contribute.
    """

    def __init__(
        self,
        min_clients: int,
        *,
        published: Published,
        intake: Intake,
        children: Children,
        residuals: Pool,
        budget: Budget,
        privacy: PrivacyBudget,
    ) -> None:
        self.min_clients, self.published, self.intake, self.children = min_clients, published, intake, children
        self.residuals, self.budget, self.privacy = residuals, budget, privacy
        self._waiting: dict[str, int] = {}
        """Children that wait for the model: their started tokens."""

    def pull(self, event: Pull) -> None:
        """Note that a child waits.

        Raises:
            MessageError: unknown_sender.
        """
        if event.child not in self.children:
            raise MessageError("unknown_sender", f"{self.children.path} has no child {event.child!r}")
        self.budget.begin(event.now_s)
        self._waiting[event.child] = event.started_tokens

    def forget(self, name: str) -> None:
        """A child waits no more."""
        self._waiting.pop(name, None)

    def clear(self) -> None:
        """No child waits."""
        self._waiting = {}

    def ready(self, *, exchanging: bool, wants_refresh: bool) -> list[str]:
        """Children that wait and may go on.

        Synchronous children wait until their last update is in a version and that version is exchanged.

        Args:
            exchanging: whether an exchange with the parent is under way.
            wants_refresh: whether no child may go on before the node has heard its parent.
        """
        if not self._waiting or wants_refresh:
            return []
        if self.min_clients and not self.intake.accepted and self.children.joined < self.min_clients:
            return []
        if not self.intake.synchronous:
            return list(self._waiting)
        return [] if exchanging else [name for name in self._waiting if not self.intake.holds(name)]

    def serve(self, name: str, *, incarnation: int, now_s: float) -> list[Command]:
        """Give the model to a child; `incarnation` is the node's."""
        doubt, started = None, self._waiting.pop(name)
        if not self.budget.finished:
            doubt = self.children.count_started(name, started, now_s)
        model = self.model(name, incarnation=incarnation)
        self.published.lend()
        return [*([] if doubt is None else [Note(record=doubt)]), Serve(child=name, model=model)]

    def model(self, child: str, *, incarnation: int) -> Model:
        """The published model, as this child would get it."""
        known, sums = self.children.get(child, Child()), self.published.sums
        of_sums: dict[str, Any] = {}
        if sums is not None:
            of_sums = {"weight": sums.weight, "rest": sums.rest, "rest_weight": sums.rest_weight}
        return Model(
            version=self.published.version,
            progress=self.budget.progress,
            finished=self.budget.finished or self.privacy.is_exhausted(child),
            tokens=self.published.mean_tokens,
            last_seq=known.last_seq,
            incarnation=incarnation,
            durable_seq=known.durable_seq,
            residuals=self.residuals.offer(child),
            values=self.published.theta,
            **of_sums,
        )
