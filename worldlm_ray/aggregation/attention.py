"""Attentive blending of key layers: scores, and a softmax that folds its candidates one at a time.

For every key layer, over candidates i (the node itself, its children, its parent, residuals):

    logit_i = score(query, candidate_i) / temperature + log(tokens_i) + log(s(tau_i))        tau of a residual: its age
    weights = softmax(logits),   blend = sum_i weights_i candidate_i

so that likeness, data size and staleness are one softmax. The score of a candidate depends on nothing but the
query and the candidate; hence the softmax can be computed online (running maximum, sum and weighted sum, as in
Milakov and Gimelshein, arXiv 1805.02867), and a node's memory does not grow with its number of children: an
update's key layers are folded on arrival, like its backbone.

    score     formula, per key layer with d elements                          source
    cosine    cos(q - q0, k - q0), q0 the run's initial key layer             ours; 0 where either has not moved
    dot       q . k / sqrt(d)                                                 WorldLM, arXiv 2405.14446; Vaswani et al.
    fedamp    -|q - k|^2 / |q|^2: closer gets more; A'(x) = exp(-x/sigma)     FedAMP, arXiv 2007.03797, eq. 5
    fedatt    +|q - k| / |q|: farther gets more                               FedAtt, arXiv 1812.07108, eq. 4
    uniform   0                                                               the ablation

Distances are divided by the query's norm: raw ones grow with the layer's size, so that exp(-d^2) underflows and
a softmax of d saturates on layers of a language model. The temperature is FedAMP's sigma.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np

from worldlm_ray.config import names
from worldlm_ray.config.federated import AttentionConfig
from worldlm_ray.config.registry import Registry
from worldlm_ray.errors import AggregationError
from worldlm_ray.tensors.buffers import Flat, add_scaled, inner, squared_norm
from worldlm_ray.tensors.layout import KeyLayer

Score = Callable[[Flat, Flat, Flat], float]
"""From a query, a candidate and the run's initial key layer, [d] each, to how well the candidate fits the query."""
SCORES: Registry[Score] = names.SCORES


def score_function(name: str) -> Callable[[Score], Score]:
    """Register a score.

    Args:
        name: what `aggregation.attention.score` calls it.
    """

    def register(function: Score) -> Score:
        SCORES.add(name, function, function)
        return function

    return register


@score_function("cosine")
def cosine(query: Flat, candidate: Flat, origin: Flat) -> float:
    """cos(q - q0, k - q0), q0 the run's initial key layer; 0 where either has not moved. Source: ours."""
    norms = math.sqrt(squared_norm(query, origin) * squared_norm(candidate, origin))
    return inner(query, candidate, origin=origin) / norms if norms > 0.0 else 0.0


@score_function("dot")
def dot(query: Flat, candidate: Flat, origin: Flat) -> float:
    """q . k / sqrt(d). Source: WorldLM, arXiv 2405.14446; Vaswani et al., arXiv 1706.03762."""
    return inner(query, candidate) / math.sqrt(query.size)


@score_function("fedamp")
def fedamp(query: Flat, candidate: Flat, origin: Flat) -> float:
    """-|q - k|^2 / |q|^2: closer gets more. Source: FedAMP, arXiv 2007.03797, eq. 5, A'(x) = exp(-x/sigma)."""
    return -_distance(query, candidate)


@score_function("fedatt")
def fedatt(query: Flat, candidate: Flat, origin: Flat) -> float:
    """+|q - k| / |q|: farther gets more. Source: FedAtt, arXiv 1812.07108, eq. 4."""
    return math.sqrt(_distance(query, candidate))


@score_function("uniform")
def uniform(query: Flat, candidate: Flat, origin: Flat) -> float:
    """0: only data size and staleness count. Source: the ablation."""
    return 0.0


def _distance(query: Flat, candidate: Flat) -> float:
    """Squared, and divided by the query's squared norm."""
    return squared_norm(candidate, query) / (squared_norm(query) or 1.0)


def score(name: str, query: Flat, candidate: Flat, origin: Flat) -> float:
    """How well a candidate key layer fits the query.

    Args:
        name: which score.
        query: the asking node's key layer, [d].
        candidate: the candidate's key layer, [d].
        origin: the run's initial key layer, [d] (used by `cosine` alone).

    Raises:
        ConfigError: there is no score of that name.
    """
    return SCORES.get(name)(query, candidate, origin)


def scores(
    config: AttentionConfig, layers: Sequence[KeyLayer], query: Flat, candidate: Flat, origin: Flat
) -> list[float]:
    """`score / temperature` for every key layer; the buffers are whole key parts."""
    parts = (slice(layer.start, layer.stop) for layer in layers)
    return [score(config.score, query[p], candidate[p], origin[p]) / config.temperature for p in parts]


class OnlineAttention:
    """The softmax blend of candidates that come one at a time.

    Memory: one buffer of the key part's size, whatever the number of candidates.

    Args:
        layers: the key layers and where they lie.
        out: zeroed buffer of the key part's size in which the blend is built.
    """

    def __init__(self, layers: Sequence[KeyLayer], out: Flat) -> None:
        self.layers = tuple(layers)
        self.blend = out
        """Sum of exp(logit - maximum) * candidate so far."""
        self.maximum = [-math.inf] * len(self.layers)
        self.total = [0.0] * len(self.layers)
        self.names: list[str] = []
        self.logits: list[list[float]] = []

    def fold(self, name: str, values: Flat | None, logits: Sequence[float]) -> None:
        """Add a candidate.

        Args:
            name: who it is, for the record of weights.
            values: its key part; None is zero everywhere.
            logits: one per key layer; -inf leaves the candidate out.
        """
        self.names.append(name)
        self.logits.append(list(logits))
        for index, (layer, logit) in enumerate(zip(self.layers, logits, strict=True)):
            if logit == -math.inf:
                continue
            part = self.blend[layer.start : layer.stop]
            if logit > self.maximum[index]:
                shrink = math.exp(self.maximum[index] - logit)
                part *= np.float32(shrink)
                self.total[index] *= shrink
                self.maximum[index] = logit
            weight = math.exp(logit - self.maximum[index])
            if values is not None:
                add_scaled(part, values[layer.start : layer.stop], weight)
            self.total[index] += weight

    def result(self) -> Flat:
        """The blend, normalised. The object must not be folded into afterwards.

        Raises:
            AggregationError: no candidate had any weight.
        """
        self._require_weight()
        for layer, total in zip(self.layers, self.total, strict=True):
            self.blend[layer.start : layer.stop] *= np.float32(1.0 / total)
        return self.blend

    def weights(self) -> list[list[float]]:
        """The attention weights so far, [key layers, candidates].

        Raises:
            AggregationError: no candidate had any weight.
        """
        self._require_weight()
        return [
            [math.exp(row[index] - self.maximum[index]) / self.total[index] for row in self.logits]
            for index in range(len(self.layers))
        ]

    def _require_weight(self) -> None:
        for layer, total in zip(self.layers, self.total, strict=True):
            if total <= 0.0:
                raise AggregationError(f"key layer {layer.name}: no candidate to attend to")


def attend(
    config: AttentionConfig,
    layers: Sequence[KeyLayer],
    query: Flat,
    candidates: Sequence[tuple[str, Flat, float]],
    origin: Flat,
    *,
    out: Flat,
) -> OnlineAttention:
    """Blend candidates that are all at hand: what a node does when its parent's model arrives.

    Args:
        config: score and temperature.
        layers: the key layers.
        query: the node's own key part.
        candidates: (name, key part, prior) with prior = tokens * s(tau); not negative.
        origin: the run's initial key part.
        out: zeroed buffer of the key part's size; `result` returns it.
    """
    online = OnlineAttention(layers, out)
    for name, values, prior in candidates:
        fit = scores(config, layers, query, values, origin)
        online.fold(name, values, with_prior(fit, prior))
    return online


def with_prior(fit: Sequence[float], prior: float) -> list[float]:
    """Logits from scores and a prior weight; a prior of zero leaves the candidate out."""
    return [value + math.log(prior) if prior > 0.0 else -math.inf for value in fit]


def log_sum(logits: Sequence[Sequence[float]]) -> list[float]:
    """Logits of a candidate that stands for several: log sum exp over [candidates, key layers]; -inf of none.

    In one piece: a node may have thousands of children.
    """
    rows = np.fromiter(chain.from_iterable(logits), np.float64).reshape(len(logits), -1)
    largest = rows.max(axis=0)
    with np.errstate(divide="ignore"):
        found = np.log(np.exp(rows - np.where(np.isfinite(largest), largest, 0.0)).sum(axis=0)) + largest
    return [float(value) for value in found]
