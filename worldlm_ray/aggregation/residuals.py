"""Residual routing: key layers that do not fit where they were sent, on their way to where they do.

At an aggregation, a child's key layer whose score against the node's own is below `residuals.threshold` has next to no
weight in the blend: what its owner learned would be lost. Up to `per_round` of them become residuals. The node keeps
them in a bounded pool, offers each pulling child those that its own key layers fit best (and that do not come from it),
and passes on to its parent those that fitted no child in half of their time. At a child they are candidates of
attention beside its own and its parent's, discounted by age.

What the other parts of a node call, and when:

    check_residuals   an update has come: may its sender have these
    Pool.folded       it is in the sum
    Pool.settle       the sum has become a version
    Pool.offer        a child is served
    Pool.rise         the node sends an update to its parent
    fold_residuals    a child blends its key layers with its parent's

Source: WorldLM (arXiv 2405.14446), for the idea; threshold, pool, ages and offers are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from worldlm_ray.aggregation.attention import OnlineAttention, score, scores, with_prior
from worldlm_ray.aggregation.staleness import discount
from worldlm_ray.config.federated import AggregationConfig
from worldlm_ray.errors import MessageError
from worldlm_ray.exchange.messages import Residual, Update
from worldlm_ray.exchange.quota import Quota
from worldlm_ray.tensors.buffers import Flat, frozen
from worldlm_ray.tensors.layout import Layout

RESIDUAL = "residual of "
"""A residual, among the candidates of attention; its origin follows."""


def check_residuals(update: Update, path: str, quota: Quota | None) -> None:
    """Refuse residuals that the sender cannot have: of nodes that are not below it, or of too many tokens.

    Args:
        update: the update that brings them.
        path: of the node that it has come to.
        quota: the sender's.

    Raises:
        MessageError: wrong_origin or too_many_tokens.
    """
    below = f"{path}/{update.sender}/"
    for residual in update.residuals:
        if not f"{residual.origin}/".startswith(below):
            got = f"a residual of {residual.origin}, expected one of {path}/{update.sender} or of a node below it"
            raise MessageError("wrong_origin", got)
        if quota is not None and residual.tokens > quota.update_tokens:
            got = f"a residual of {residual.tokens:g} tokens, expected at most {quota.update_tokens}"
            raise MessageError("too_many_tokens", got)


class Pool:
    """The residuals of one node.

    Args:
        path: the node's path.
        rules: the score of key layers; how many residuals, how long, from which score.
        layout: the model's layout.
        origin: the run's initial key layers.
        private: whether its children are promised privacy. A residual is one client's key layer: no noise covers it.
    """

    def __init__(self, path: str, rules: AggregationConfig, layout: Layout, *, origin: Flat, private: bool) -> None:
        self.path, self.config, self.attention, self.origin = path, rules.residuals, rules.attention, origin
        self.layers = {} if private else {layer.name: layer for layer in layout.key_layers}
        self._split = layout.backbone_size
        self.held: list[Residual] = []
        """The oldest first."""
        self.fits: dict[str, dict[str, float]] = {}
        """Score of each child's own key layer against each residual, by child and residual."""
        self._found: list[tuple[float, Residual]] = []

    @property
    def on(self) -> bool:
        """Whether there is anything to do."""
        return self.config.per_round > 0 and bool(self.layers)

    def folded(self, update: Update, scores: Sequence[float], theta: Flat) -> None:
        """Take in an update that is in the sum.

        Args:
            update: a child's.
            scores: of its key layers, as for `look`.
            theta: the node's model [layout.size].
        """
        if self.on:
            keys = theta[self._split :] + update.values[self._split :]
            self.look(update.sender, keys, scores, tokens=update.tokens, passed=update.residuals)

    def look(
        self, child: str, keys: Flat, scores: Sequence[float], *, tokens: float, passed: Sequence[Residual]
    ) -> None:
        """Take in the key layers of an update: which of them are outliers, and which residuals fit them.

        Args:
            child: its name.
            keys: its key part.
            scores: of its key layers against the node's own, by the temperature, in the order of the layers.
            tokens: the update's.
            passed: residuals that the child passes on.
        """
        if not self.on:
            return
        source = f"{self.path}/{child}"
        for layer, value in zip(self.layers.values(), scores, strict=True):
            value *= self.attention.temperature
            if value < self.config.threshold:
                copied = frozen(keys[layer.start : layer.stop].copy())
                found = Residual(origin=source, layer=layer.name, tokens=tokens, age=0, values=copied)
                self._found.append((value, found))
        self._found.sort(key=lambda pair: pair[0])
        del self._found[self.config.per_round :]
        self._keep(passed)
        mine = self.fits.setdefault(child, {})
        for residual in self.held:
            if not self._is_from(residual, child):
                layer = self.layers[residual.layer]
                part = slice(layer.start, layer.stop)
                mine[residual.name] = score(self.attention.score, keys[part], residual.values, self.origin[part])

    def settle(self) -> None:
        """An aggregation is done: everything is older, and the outliers of this one are new."""
        self._drop({residual.name for residual in self.held if residual.age >= self.config.max_age})
        self.held = [replace(residual, age=residual.age + 1) for residual in self.held]
        self._keep([residual for _, residual in self._found])
        self._found = []

    def offer(self, child: str) -> tuple[Residual, ...]:
        """The residuals that this child's key layers fit best, and well enough; none where children expect none."""
        if not self.on:  # some may be left of a run that had them
            return ()
        fits = self.fits.get(child, {})
        fitting = [r for r in self.held if fits.get(r.name, -math.inf) >= self.config.threshold]
        fitting.sort(key=lambda residual: -fits[residual.name])
        return tuple(fitting[: self.config.offers])

    def rise(self) -> tuple[Residual, ...]:
        """Give up those that fitted no child in half of their time: they go to the parent."""
        never = -math.inf
        best = {r.name: max((fits.get(r.name, never) for fits in self.fits.values()), default=never) for r in self.held}
        late = [r for r in self.held if 2 * r.age >= self.config.max_age and best[r.name] < self.config.threshold]
        rising = late[: self.config.per_round]
        self._drop({residual.name for residual in rising})
        return tuple(rising)

    def _is_from(self, residual: Residual, child: str) -> bool:
        return f"{residual.origin}/".startswith(f"{self.path}/{child}/")

    def _keep(self, residuals: Sequence[Residual]) -> None:
        """A newer residual replaces an older one of the same layer and origin; the oldest make room."""
        newest = {residual.name: residual for residual in residuals if residual.layer in self.layers}
        self._drop(set(newest))
        self.held = [*self.held, *newest.values()]
        self._drop({residual.name for residual in self.held[: -self.config.pool]})

    def _drop(self, names: set[str]) -> None:
        self.held = [residual for residual in self.held if residual.name not in names]
        for fits in self.fits.values():
            for name in names:
                fits.pop(name, None)

    def state(self) -> tuple[dict[str, Any], dict[str, Flat]]:
        """What a restart needs."""
        residuals = [*self.held, *(residual for _, residual in self._found)]
        meta = {
            "held": [{k: v for k, v in vars(residual).items() if k != "values"} for residual in residuals],
            "found": [value for value, _ in self._found],
            "fits": {child: dict(fits) for child, fits in self.fits.items()},
        }
        return meta, {f"residual.{index}": residual.values for index, residual in enumerate(residuals)}

    def restore(self, meta: dict[str, Any], arrays: dict[str, Flat]) -> None:
        """Become what `state` described."""
        residuals = [Residual(**fields, values=arrays[f"residual.{i}"]) for i, fields in enumerate(meta["held"])]
        count = len(residuals) - len(meta["found"])
        self.held, self.fits = residuals[:count], {child: dict(fits) for child, fits in meta["fits"].items()}
        self._found = list(zip(meta["found"], residuals[count:], strict=True))


def fold_residuals(
    residuals: Sequence[Residual],
    blend: OnlineAttention,
    own: Flat,
    *,
    rules: AggregationConfig,
    layout: Layout,
    origin: Flat,
) -> None:
    """Make residuals candidates of attention, each for its key layer, discounted by its age.

    Args:
        residuals: what the parent offers.
        blend: takes them in.
        own: the child's key layers.
        rules: the score and the discount.
        layout: the model's layout.
        origin: the run's initial key layers.
    """
    for residual in residuals:
        fit = [-math.inf] * len(layout.key_layers)
        values = np.zeros_like(own)
        for index, layer in enumerate(layout.key_layers):
            if layer.name == residual.layer:
                values[layer.start : layer.stop] = residual.values
                [found] = scores(rules.attention, [layer], own, values, origin)
                [fit[index]] = with_prior([found], residual.tokens * discount(rules.residuals.discount, residual.age))
        blend.fold(f"{RESIDUAL}{residual.origin}", values, fit)
