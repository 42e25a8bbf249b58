"""The trainer of a client whose adapters have a smaller rank than the world's (worldlm_ray/model/smaller_rank.py).

Parameters come and go in the world's layout. What is trained, with its gradient and its moments, has the client's rank.
A model of others, such as the world's, is measured as it is: by a second module of the world's rank, which is made when
the first such model comes. It shares the frozen weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cached_property

import numpy.typing as npt
from numpy import int64

from worldlm_ray.model.smaller_rank import SmallerRank
from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.training.local import LocalTrainer
from worldlm_ray.training.trainer import Batch, Proximal, RoundResult, Trainer


class SmallerRankTrainer(Trainer):
    """A trainer of the client's rank that speaks the world's layout.

    Args:
        own: trains the client's adapters.
        rank: where these lie in the world's.
        make_other: makes what measures models that the client's rank does not hold.
    """

    def __init__(self, own: LocalTrainer, rank: SmallerRank, make_other: Callable[[], LocalTrainer]) -> None:
        self.own, self.rank, self._make_other = own, rank, make_other

    @cached_property
    def other(self) -> LocalTrainer:
        """What measures models of the world's rank."""
        return self._make_other()

    @property
    def noise(self) -> float:
        """Noise multiplier of the steps, where they are private."""
        return self.own.noise

    @noise.setter
    def noise(self, noise: float) -> None:
        self.own.noise = noise

    def read(self, out: Flat | None = None) -> Flat:
        """The parameters with zeros beyond the client's rank: a copy, into `out` if given."""
        return self.rank.padded(self.own.read(), out)

    def write(self, values: Flat) -> None:
        """Set the parameters. What is beyond the client's rank is left out."""
        self.own.write(self.rank.cut(values))

    def run(
        self,
        batches: Iterable[Batch],
        rate: Callable[[int], float],
        *,
        first: int = 0,
        should_stop: Callable[[], bool] = lambda: False,
        proximal: Proximal | None = None,
    ) -> RoundResult:
        """Take one optimizer step per batch; see Trainer."""
        if proximal is not None:
            proximal = replace(proximal, center=self.rank.cut(proximal.center))
        return self.own.run(batches, rate, first=first, should_stop=should_stop, proximal=proximal)

    def evaluate(self, batches: Iterable[Batch], *, parameters: Flat | None = None) -> tuple[float, int]:
        """Summed loss in nats and number of counted targets, of the client's model or of any in the world's layout."""
        if parameters is None:
            return self.own.evaluate(batches)
        if self.rank.holds(parameters):
            return self.own.evaluate(batches, parameters=self.rank.cut(parameters))
        return self.other.evaluate(batches, parameters=parameters)

    def sample(self, prompt: npt.NDArray[int64], *, tokens: int, temperature: float, seed: int) -> list[int]:
        """Token ids that continue a prompt, by the client's model."""
        return self.own.sample(prompt, tokens=tokens, temperature=temperature, seed=seed)

    def optimizer_state(self) -> dict[str, Flat]:
        """The moments, of the client's rank, and the step count."""
        return self.own.optimizer_state()

    def load_optimizer_state(self, saved: dict[str, Flat]) -> None:
        """Restore what `optimizer_state` gave."""
        self.own.load_optimizer_state(saved)

    def forget(self) -> None:
        """Drop the moments and the step count."""
        self.own.forget()
