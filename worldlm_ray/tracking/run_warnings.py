"""The warnings of a run for its operator: each once, in order, up to a limit."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from worldlm_ray.exchange.replies import ACCEPTED
from worldlm_ray.records import VerdictRecord

NOT_FINITE = "not_finite"
ORDINARY = frozenset({"duplicate", "stale", "future_version", "out_of_turn", "too_soon", "privacy_exhausted"})
"""Refusals that occur in a healthy run. The first refusal of any other kind is a warning."""
WARNINGS = 100
"""Warnings that are kept. Further ones are counted."""


class Warnings:
    """The warnings of one run."""

    def __init__(self) -> None:
        self.kept: list[dict[str, Any]] = []
        """At most WARNINGS, in order, each with `node`, `now_s` and `text`."""
        self.left_out = 0

    def add(self, path: str, text: str, *, now_s: float) -> None:
        """Keep a warning, unless it is known."""
        if any((known["node"], known["text"]) == (path, text) for known in self.kept):
            return
        if len(self.kept) < WARNINGS:
            self.kept.append({"node": path, "now_s": now_s, "text": text})
        else:
            self.left_out += 1

    def refusal(self, record: VerdictRecord, *, sender: str, known: Container[str]) -> None:
        """Keep the first refusal of a kind that a healthy run does not have.

        Args:
            record: a verdict.
            sender: path of the node that sent the update.
            known: kinds of refusals that this sender has had before.
        """
        kind = record.verdict
        if kind == ACCEPTED or kind in ORDINARY or kind in known:
            return
        text = f"an update is refused: {kind} ({record.detail})"
        if kind == NOT_FINITE:
            text = f"its model has diverged: its updates are refused, {kind} ({record.detail}); lower training.lr"
        self.add(sender, text, now_s=record.now_s)
