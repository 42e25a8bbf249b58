"""Variants of methods: each changes a single setting, wherever it stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from worldlm_ray.config.schema import USUAL_KEY_LAYERS


@dataclass(frozen=True)
class Scaled:
    """In place of a setting's value: the configured one times a factor."""

    factor: float


FINE_TUNED = "ft"
"""The variant that fine-tunes at the end."""
VARIANTS: dict[str, dict[str, Any]] = {
    "synchronous": {"aggregation.trigger": "synchronous", "exchange.overlap": False},
    "asynchronous": {"aggregation.trigger": "goal_achieved", "aggregation.buffer_size": 1},
    "buffered": {"aggregation.trigger": "goal_achieved", "aggregation.buffer_size": 4},
    "often": {"aggregation.push_every": 4},
    "discounted": {"aggregation.staleness.fn": "polynomial"},
    "undiscounted": {"aggregation.staleness.fn": "constant"},
    "merge_all": {"merge.client": 1.0},
    "merge_quarter": {"merge.client": 0.25},
    "merge_none": {"merge.client": 0.0},
    "half_of_world": {"merge.federation": 0.5},
    "validated": {"merge.client": "validated"},
    FINE_TUNED: {"merge.fine_tune": 0.2, "evaluation.keep_best": True, "evaluation.every_rounds": 1},
    "keys": {"model.key_layers": list(USUAL_KEY_LAYERS)},
    "uniform": {"aggregation.attention.score": "uniform"},
    "dot": {"aggregation.attention.score": "dot"},
    "residuals": {"aggregation.residuals.per_round": 2},
    "bf16": {"exchange.codec": "bf16"},
    "int8": {"exchange.codec": "int8"},
    "int4": {"exchange.codec": "int4"},
    "overlap": {"exchange.overlap": True},
    "personal": {"aggregation.attention.personal": True},
    "best": {"evaluation.keep_best": True},
    "lr_third": {"training.lr": Scaled(1 / 3)},
    "lr_triple": {"training.lr": Scaled(3.0)},
    "decay_tenfold": {"training.weight_decay": Scaled(10.0)},
}
"""The change of each variant, by name."""
