"""A client's own model, beside the base that it trains for its parent (`merge: {client: validated}`).

    base    the parent's model: pulled, trained with the client's text and pushed in every round, as in FedAvg
    own     the client's own model: trained with the same text, never pushed

So a client that goes its own way costs the others nothing. Whenever the parent's model comes, the own model becomes the
one with the lowest loss on the client's validation text:

    own     as it is: the client goes its own way
    base    the base after its round: a model that has just been trained at home, from what all know
    parent  the parent's new model

At the end the client serves the best blend of its best own model and the parent's last model, w + a (theta - w), with a
from `SERVED` by validation text (WiSE-FT, Wortsman et al., arXiv 2109.01903, section 3). To keep a personal and a
common model is Ditto's idea (Li et al., arXiv 2012.04221). There a penalty ties the two; here validation text does.

No choice is final: an own model that falls behind is given up for the base or for the parent's model at any later pull.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from worldlm_ray.tensors.buffers import Flat, lerp

SERVED = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of the own model in what is served."""
OWN, BASE, PARENT = "own", "base", "parent"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The model with the lowest loss."""

    name: str
    """One of `own`, `base` and `parent`."""
    values: Flat
    """[layout.size]"""
    loss: float
    """On validation text, nats per byte."""


class OwnModel:
    """The choices of one client.

    Args:
        validate: gives the loss of a model [layout.size] on the client's validation text, in nats per byte.
        screen: the same on less of that text, for the choices of every round; `validate` unless given.
    """

    def __init__(self, validate: Callable[[Flat], float], *, screen: Callable[[Flat], float] | None = None) -> None:
        self._validate, self._screen = validate, screen or validate
        self.best: Flat | None = None
        """The best own model so far; None before the first choice."""
        self.best_loss = math.inf
        """As `screen` gives it."""
        self.served: float | None = None
        """Share of the own model in what is served; None while the client trains."""

    def choose(self, *, own: Flat, base: Flat | None, parent: Flat) -> Choice:
        """The model to go on from. Of equals the parent's is taken, then the base.

        The best model is kept without a copy: none of the buffers may change afterwards.

        Args:
            own: the own model [layout.size].
            base: the base after its round; None where the own model is the base.
            parent: the parent's new model.
        """
        found = {PARENT: parent} | ({} if base is None else {BASE: base}) | {OWN: own}
        losses = {name: _finite(self._screen(values)) for name, values in found.items()}
        name = min(losses, key=losses.__getitem__)
        choice = Choice(name=name, values=found[name], loss=losses[name])
        if choice.loss < self.best_loss:
            self.best, self.best_loss = choice.values, choice.loss
        return choice

    def serve(self, *, own: Flat, base: Flat | None, parent: Flat) -> Flat:
        """The blend of the best own model and the parent's last model with the lowest loss. Arguments as of `choose`.

        The best own model of the rounds was chosen on less text: it is measured again.

        The parent's last model has nothing of its own to blend in: it is one end of the line.
        """
        candidates = [values for values in (self.best, base, own) if values is not None]
        by_candidate = [_finite(self._validate(values)) for values in candidates]
        end = candidates[by_candidate.index(min(by_candidate))]
        losses = {share: _finite(self._validate(_blend(parent, end, share))) for share in SERVED if share < 1.0}
        losses[1.0] = min(by_candidate)
        self.served = min(losses, key=losses.__getitem__)
        return _blend(parent, end, self.served)

    def state(self) -> tuple[dict[str, Any], dict[str, Flat]]:
        """What a restart needs: plain values, and buffers."""
        meta = {"best_loss": None if self.best is None else self.best_loss, "served": self.served}
        return meta, {} if self.best is None else {"best": self.best}

    def restore(self, meta: dict[str, Any], arrays: dict[str, Flat]) -> None:
        """Become what `state` described."""
        self.best, self.served = arrays.get("best"), meta["served"]
        self.best_loss = math.inf if self.best is None else meta["best_loss"]


def _blend(parent: Flat, best: Flat, share: float) -> Flat:
    blended = parent.copy()
    lerp(parent, best, share, out=blended)
    return blended


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
