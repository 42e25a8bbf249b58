"""The model of a client's best round, by the loss on its validation text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from worldlm_ray.tensors.buffers import Flat


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best of the models that a client had at the ends of its rounds."""

    round: int
    """After which it was the client's model; 0 is before the first."""
    loss: float
    """On the validation text, nats per byte."""
    values: Flat
    """[layout.size]; never changed."""


def is_better(loss: float, best: Best | None) -> bool:
    """Whether a model with this loss takes the place of the best one. A loss that is not finite never does."""
    return math.isfinite(loss) and (best is None or loss < best.loss)


def state_of(best: Best | None) -> tuple[dict[str, Any], dict[str, Flat]]:
    """What a checkpoint holds of it: plain values, and the flat buffer `best`."""
    return ({}, {}) if best is None else ({"round": best.round, "loss": best.loss}, {"best": best.values})


def restored(meta: Mapping[str, Any], arrays: Mapping[str, Flat]) -> Best | None:
    """The best model of which `state_of` gave this; None if there was none."""
    return Best(round=meta["round"], loss=meta["loss"], values=arrays["best"]) if meta else None


def own_model(arrays: Mapping[str, Flat]) -> Flat:
    """A node's own model by the buffers of its checkpoint: of a client that keeps its best round, that one."""
    return arrays.get("best", arrays["theta"])
