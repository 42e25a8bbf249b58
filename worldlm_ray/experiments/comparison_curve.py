"""The curves of one run of a comparison."""

from __future__ import annotations

from worldlm_ray.aggregation.fold import OWN
from worldlm_ray.aggregation.merge import PARENT
from worldlm_ray.aggregation.residuals import RESIDUAL
from worldlm_ray.plan.plan import Plan
from worldlm_ray.records import AggregationRecord, AttentionRecord, MergeRecord, Record, RoundRecord
from worldlm_ray.simulation.simulator import Simulation

WORLD_POINTS = 24
"""Measurements of the world's model during a run, on a quarter of `evaluation.tokens` of each client's text."""


class Curve:
    """Held-out losses during a run: the mean of the clients' own models, and the world's model on all texts.

    Args:
        plan: the run.
        tokens: that were trained before, in an earlier stage.
        virtual_s: that have passed before.
        world: whether the world's model is measured.
    """

    def __init__(self, plan: Plan, *, tokens: int = 0, virtual_s: float = 0.0, world: bool = True) -> None:
        self.points: list[dict[str, float]] = []
        self.world: list[dict[str, float]] = []
        self._before = {"tokens": tokens, "virtual_s": virtual_s}
        self._measures_world = world
        budget = plan.config.budget
        self._total = budget.tokens or (budget.rounds or 0) * sum(map(plan.round_tokens, plan.root.clients))
        self._tokens = plan.config.evaluation.tokens // 4
        self._version = 0
        self._changed = False
        self._weights: dict[str, dict[str, list[float]]] = {}

    def add_record(self, record: Record) -> None:
        """Take in how nodes blend: attention over key layers, and the weight of the parent's backbone."""
        parent = record.node.rpartition("/")[0]
        if isinstance(record, AttentionRecord):
            names = {OWN: record.node, PARENT: parent}
            for index, candidate in enumerate(record.candidates):
                weight = sum(row[index] for row in record.weights) / len(record.weights)
                source = names.get(candidate) or (
                    candidate if candidate.startswith(RESIDUAL) else f"{record.node}/{candidate}"
                )
                self._add(record.node, source, weight)
        elif isinstance(record, MergeRecord):
            self._add(record.node, f"backbone of {parent}", record.m)
        elif isinstance(record, RoundRecord | AggregationRecord):
            self._changed = True

    def _add(self, node: str, source: str, weight: float) -> None:
        self._weights.setdefault(node, {}).setdefault(source, []).append(weight)

    @property
    def taken(self) -> dict[str, dict[str, float]]:
        """Mean weight of each source in a node's blends."""
        return {
            node: {source: sum(found) / len(found) for source, found in sources.items()}
            for node, sources in self._weights.items()
        }

    def add_points(self, simulation: Simulation) -> None:
        """Add a point if the clients' loss has changed, and occasionally one of the world's model."""
        if not self._changed:
            return
        self._changed = False
        snapshot = simulation.tracker.snapshot()
        loss, at = (
            snapshot["nodes"]["world"]["clients_loss"],
            {
                "tokens": self._before["tokens"] + snapshot["tokens"],
                "virtual_s": self._before["virtual_s"] + snapshot["now_s"],
            },
        )
        if loss is not None and (not self.points or loss != self.points[-1]["loss"]):
            self.points.append(at | {"loss": loss})
        if not self._measures_world:
            return
        node = simulation.nodes["world"]
        if node.version > self._version and node.published.tokens >= len(self.world) * self._total / WORLD_POINTS:
            self._version = node.version
            losses = [
                client.measure(self._tokens * client.dataset.parts, parameters=node.theta).loss
                for client in simulation.clients.values()
            ]
            self.world.append(at | {"loss": sum(losses) / len(losses)})
