"""A budget in tokens, spent to the round, however late the world would hear of it.

Here all tokens are known at once. On Ray the world counts them, from what its children tell in their exchanges, and
overshoots by what is begun meanwhile: asynchronous methods that exchange seldom would train most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from worldlm_ray.exchange.messages import Model


class Budget:
    """The tokens of all rounds that clients have begun.

    Args:
        tokens: the budget; None if it is not one in tokens.
        clients: by path.
        incarnations: of every node, by path; 0 while it is dead.
    """

    def __init__(self, tokens: int | None, clients: Mapping[str, Any], incarnations: Mapping[str, int]) -> None:
        self._tokens, self._clients, self._incarnations = tokens, clients, incarnations
        counted = () if tokens is None else clients
        self._begun_by, self._under_way_by = dict.fromkeys(counted, 0), dict.fromkeys(counted, 0)
        self._begun = self._under_way = 0
        """Tokens of all rounds that clients have begun, and of those that are being trained."""

    def count(self, path: str) -> None:
        """A client's rounds may have changed."""
        if self._tokens is None:
            return
        client = self._clients[path]
        trains = client.began and not client.is_whole and self._incarnations[path]
        begun, under_way = client.begun * client.round_tokens, client.round_tokens if trains else 0
        self._begun += begun - self._begun_by[path]
        self._under_way += under_way - self._under_way_by[path]
        self._begun_by[path], self._under_way_by[path] = begun, under_way

    @property
    def is_spent(self) -> bool:
        """Whether the budget holds no more rounds, as far as that is settled here."""
        return self._tokens is not None and self._begun >= self._tokens

    def apply(self, model: Model) -> Model:
        """A model as its receiver reads it."""
        if self._tokens is None:
            return model
        progress = max(model.progress, min((self._begun - self._under_way) / self._tokens, 1.0))
        return replace(model, progress=progress, finished=model.finished or self.is_spent)
