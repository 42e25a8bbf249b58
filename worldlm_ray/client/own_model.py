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
    """

    def __init__(self, validate: Callable[[Flat], float]) -> None:
        self._validate = validate
        self.best: Flat | None = None
        """The best own model so far; None before the first choice."""
        self.best_loss = math.inf
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
        losses = {name: self._loss(values) for name, values in found.items()}
        name = min(losses, key=losses.__getitem__)
        choice = Choice(name=name, values=found[name], loss=losses[name])
        self._keep_if_best(choice.values, choice.loss)
        return choice

    def serve(self, *, own: Flat, base: Flat | None, parent: Flat) -> Flat:
        """The blend of the best own model and the parent's last model with the lowest loss. Arguments as of `choose`.

        The parent's last model has nothing of its own to blend in: it is one end of the line.
        """
        candidates = [own] if base is None else [base, own]
        if self.best is None:
            self.best = candidates[0]
        for values in candidates:
            self._keep_if_best(values, self._loss(values))
        # The best model's own loss is known.
        losses = {share: self.best_loss if share == 1.0 else self._loss(self._blend(parent, share)) for share in SERVED}
        self.served = min(losses, key=losses.__getitem__)
        return self._blend(parent, self.served)

    def _keep_if_best(self, values: Flat, loss: float) -> None:
        if loss < self.best_loss:
            self.best, self.best_loss = values, loss

    def _blend(self, parent: Flat, share: float) -> Flat:
        assert self.best is not None, "there is a best model"
        blended = parent.copy()
        lerp(parent, self.best, share, out=blended)
        return blended

    def _loss(self, values: Flat) -> float:
        loss = self._validate(values)
        return loss if math.isfinite(loss) else math.inf

    def state(self) -> tuple[dict[str, Any], dict[str, Flat]]:
        """What a restart needs: plain values, and buffers."""
        meta = {"best_loss": None if self.best is None else self.best_loss, "served": self.served}
        return meta, {} if self.best is None else {"best": self.best}

    def restore(self, meta: dict[str, Any], arrays: dict[str, Flat]) -> None:
        """Become what `state` described."""
        self.best, self.served = arrays.get("best"), meta["served"]
        self.best_loss = math.inf if self.best is None else meta["best_loss"]
