"""Can an observer tell what was in the training text? A private and a plain client read a short text very often."""

from __future__ import annotations

import math
import tempfile
from typing import Any

import numpy as np
import numpy.typing as npt

from worldlm_ray.config.schema import DataConfig, PrivacyConfig, TrainingConfig
from worldlm_ray.data import prepare
from worldlm_ray.model.initial import initial_parameters
from worldlm_ray.model.shape import PRESETS
from worldlm_ray.privacy.accounting import Spend, epsilon
from worldlm_ray.training.local import LocalTrainer
from worldlm_ray.training.private import PrivateTrainer

Ids = npt.NDArray[np.int64]
STEPS, BATCH, MEMBERS, CANARIES, REFERENCES = 2_000, 16, 400, 16, 1_024
DELTA, RATE = 1e-5, 3e-3


def run() -> dict[str, Any]:
    """Attack by loss (Yeom et al., arXiv 1709.01604), and exposure of canaries (Carlini et al., arXiv 1802.08232)."""
    shape = PRESETS["nano"]
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        tokens = np.asarray(prepare(DataConfig(corpus="docstrings", cache_dir=folder), context=64, key="data").train)
    windows = tokens[: len(tokens) // 65 * 65].reshape(-1, 65).astype(np.int64)
    chosen = generator.choice(len(windows), 2 * MEMBERS, replace=False)
    members, others = windows[chosen[:MEMBERS]], windows[chosen[MEMBERS:]]
    canaries = generator.integers(97, 123, (CANARIES, 65))  # random letters
    references = generator.integers(97, 123, (REFERENCES, 65))
    text = np.concatenate([members, canaries])
    rate = BATCH / len(text)
    layout = shape.layout([])
    training = TrainingConfig(batch_size=BATCH)
    rows = list[dict[str, Any]]()
    for noise in (None, 3.0):
        trainer: LocalTrainer
        if noise is None:
            trainer, spent = LocalTrainer(shape, layout, training, threads=1, device="cpu"), math.inf
        else:
            privacy = PrivacyConfig(unit="record", noise_multiplier=noise, max_grad_norm=1.0)
            trainer = PrivateTrainer(shape, layout, training, privacy, noise=noise, threads=1, device="cpu")
            spent = epsilon([Spend(noise, rate, STEPS)], delta=DELTA, accountant="prv")
        trainer.write(initial_parameters(shape, layout, seed=0))
        batches = (text[generator.random(len(text)) < rate] for _ in range(STEPS))
        trainer.run(
            ((b[:, :-1].copy(), b[:, 1:].copy()) for b in batches if noise is not None or len(b)), lambda _: RATE
        )
        advantage = _advantage(_losses(trainer, members), _losses(trainer, others))
        exposure = float(np.mean(_exposure(_losses(trainer, canaries), _losses(trainer, references))))
        bound = 1.0 if math.isinf(spent) else (math.expm1(spent) + 2 * DELTA) / (math.exp(spent) + 1.0)
        rows.append({"noise": noise, "epsilon": spent, "advantage": advantage, "bound": bound, "exposure": exposure})
        name = "plain client  " if noise is None else "private client"
        print(
            f"  {name} epsilon {spent:5.2f}: advantage {advantage:.3f} (at most {bound:.3f}), canaries' mean exposure "
            f"{exposure:.2f} bits of {math.log2(REFERENCES):.0f} (guessing: 1.44)"
        )
    return {"rows": [row | {"epsilon": None if math.isinf(row["epsilon"]) else row["epsilon"]} for row in rows]}


def _losses(trainer: LocalTrainer, records: Ids) -> npt.NDArray[np.float64]:
    """Every record's summed loss."""
    return np.array([trainer.evaluate([(r[None, :-1].copy(), r[None, 1:].copy())])[0] for r in records])


def _advantage(members: npt.NDArray[np.float64], others: npt.NDArray[np.float64]) -> float:
    """Largest difference of true and false positives over all thresholds: 0 is guessing, 1 is certainty."""
    thresholds = np.concatenate([members, others])
    return float(max((members <= t).mean() - (others <= t).mean() for t in thresholds))


def _exposure(canaries: npt.NDArray[np.float64], references: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """log2 of the number of references, less log2 of the canary's rank among them."""
    ranks = 1 + np.array([(references < canary).sum() for canary in canaries])
    return np.asarray(np.log2(len(references)) - np.log2(ranks))
