"""A client's model as a mixture of a personal model and its parent's (APFL), trained side by side.

    m = alpha v + (1 - alpha) w      v personal, never pushed; w the parent's model, trained and pushed as in FedAvg

    at a step:  w takes a step down the loss of w, and v one down the loss of m, both from where they were before
    at a pull:  w becomes the parent's model, v stays

m is what is kept, measured and served. v follows from it: m moves by alpha times v's step and by (1 - alpha) times w's.

Source: Deng, Kamani and Mahdavi, arXiv 2003.13461, algorithm 1, with a fixed alpha. The paper's steps are those of SGD
with the gradient alpha grad f(m); here both are AdamW's, which do not depend on the gradient's scale. The weight decay
of v's step is that of m. In a client's first round v and w are one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import numpy as np

from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.training.common import CommonTrainer
from worldlm_ray.training.trainer import Batch, Proximal, RoundResult, Trainer


class MixedTrainer(CommonTrainer):
    """The trainer of the mixture (`own`), and of the parent's model in it (`common`).

    Args:
        own: holds the mixture.
        make_common: as for `CommonTrainer`.
        alpha: share of the personal model, between 0 and 1.
    """

    def __init__(self, own: Trainer, make_common: Callable[[], Trainer], *, alpha: float) -> None:
        super().__init__(own, make_common)
        self.alpha = alpha

    def train_beside(self, values: Flat, *, own: Flat) -> bool:
        """Take the parent's model into the mixture; the personal one stays."""
        before = self.common.read() if self.is_apart else self.own.read()
        super().train_beside(values, own=own)
        self._move(before)
        return True

    def run(
        self,
        batches: Iterable[Batch],
        rate: Callable[[int], float],
        *,
        first: int = 0,
        should_stop: Callable[[], bool] = lambda: False,
        proximal: Proximal | None = None,
    ) -> RoundResult:
        """Take one step of each model per batch."""
        if not self.is_apart:
            return super().run(batches, rate, first=first, should_stop=should_stop, proximal=proximal)
        total = RoundResult(steps=0, tokens=0, loss_sum=0.0, train_s=0.0, learning_rate=0.0)
        for batch in batches:
            if should_stop():
                break
            place, learning_rate = first + total.steps, rate(total.steps)
            before = self.common.read()
            mixed = self.own.run([batch], partial(_same, self.alpha * learning_rate), first=place, proximal=proximal)
            common = self.common.run([batch], partial(_same, learning_rate), first=place)
            self._move(before)
            total = replace(
                mixed,
                steps=total.steps + mixed.steps,
                tokens=total.tokens + mixed.tokens,
                loss_sum=total.loss_sum + mixed.loss_sum,
                train_s=total.train_s + mixed.train_s + common.train_s,
                learning_rate=learning_rate,
            )
        return total

    def _move(self, before: Flat) -> None:
        """Move the mixture by its share of what the common model has moved since it was `before`."""
        mixed = self.own.read()
        mixed += np.float32(1.0 - self.alpha) * (self.common.read() - before)
        self.own.write(mixed)


def _same(rate: float, step: int) -> float:
    return rate
