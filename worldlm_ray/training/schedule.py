"""The learning rate as a pure function of the fraction of the budget that is spent."""

from __future__ import annotations

import math

from worldlm_ray.config.schema import TrainingConfig


def learning_rate(training: TrainingConfig, progress: float) -> float:
    """Linear warm-up, then cosine decay to `min_lr_ratio`.

    Args:
        training: gives lr, warmup_fraction and min_lr_ratio.
        progress: fraction of the budget that is spent, 0 to 1. More counts as 1.

    Source: Loshchilov and Hutter, arXiv 1608.03983, equation 5, without restarts.
    """
    progress = min(max(progress, 0.0), 1.0)
    if progress < training.warmup_fraction:
        return training.lr * progress / training.warmup_fraction
    span = 1.0 - training.warmup_fraction
    done = (progress - training.warmup_fraction) / span if span else 1.0
    floor = training.lr * training.min_lr_ratio
    return floor + (training.lr - floor) * 0.5 * (1.0 + math.cos(math.pi * done))
