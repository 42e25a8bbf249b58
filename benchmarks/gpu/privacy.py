"""A step of record-level DP-SGD on the device, by ghost clipping and by hooks, against the same step without."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.gpu.card import device, seconds, shape_of
from benchmarks.gpu.rows import Rows
from benchmarks.zero_group import PRIVATE, RATE, batches, start
from worldlm_ray.config.schema import GradSampleMode, TrainingConfig
from worldlm_ray.training.local import LocalTrainer
from worldlm_ray.training.private import PrivateTrainer

SLOWER = 1.5
"""Target: a private step in multiples of the same step without privacy."""


def measure(rows: Rows, toy: bool) -> None:
    """One size; the same batch in all three ways."""
    where, repeats = device(toy), 2 if toy else 10
    shape = shape_of("75m", toy)
    layout, initial = start(shape)
    [batch] = batches(shape, steps=1, size=4 if toy else 16)
    training = TrainingConfig(batch_size=len(batch[0]), compile="off")
    plain = LocalTrainer(shape, layout, training, threads=2, device=where)
    plain.write(initial)
    without_s = seconds(lambda: plain.run([batch], lambda _: RATE), device=where, repeats=repeats)
    found = [_ratio(rows, mode, toy, without_s) for mode in ("ghost", "hooks")]
    rows.add("75m: the quicker of the two", min(found), most=None if toy else SLOWER)


def _ratio(rows: Rows, mode: GradSampleMode, toy: bool, without_s: float) -> float:
    where, repeats = device(toy), 2 if toy else 10
    shape = shape_of("75m", toy)
    layout, initial = start(shape)
    [batch] = batches(shape, steps=1, size=4 if toy else 16)
    training, privacy = TrainingConfig(batch_size=len(batch[0])), replace(PRIVATE, grad_sample_mode=mode)
    made = PrivateTrainer(shape, layout, training, privacy, noise=1.0, threads=2, device=where)
    made.write(initial)
    ratio = seconds(lambda: made.run([batch], lambda _: RATE), device=where, repeats=repeats) / without_s
    rows.add(f"75m: private step by {mode} over the same step without", ratio)
    return ratio
