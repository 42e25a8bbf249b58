"""The common model of a client with two: its parent's, which it trains for its parent, beside its own.

Both are trained on the whole batch. No token more is read, but every step is taken twice. The common model is trained
as in FedAvg, and its change is pushed. If the change of the client's own model were pushed, the parent's model would be
the mean of models that have parted, good for no client.

Keeping a personal and a common model is Ditto's idea (Li et al., arXiv 2012.04221), which ties the two by a penalty:
`merge.proximal`. Which one becomes the client's own is settled in worldlm_ray/client/own_model.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.training.trainer import Batch, Proximal, RoundResult, Trainer

_PREFIX = "common."
_THETA = "theta"


class CommonTrainer(Trainer):
    """The trainer of the client's own model, and beside it one of the common model.

    Args:
        own: trains the client's own model.
        make_common: makes what trains the common one, once there is one.
    """

    def __init__(self, own: Trainer, make_common: Callable[[], Trainer]) -> None:
        self.own, self._make_common = own, make_common
        self.is_apart = False
        """Whether the client keeps its own model, so that the common one is trained beside it."""

    @cached_property
    def common(self) -> Trainer:
        """What trains the common model."""
        return self._make_common()

    def beside(self) -> Flat | None:
        """A copy of the common model; None while there is one model."""
        return self.common.read() if self.is_apart else None

    def train_beside(self, values: Flat, *, own: Flat) -> bool:
        """Train the parent's model in the round that begins; when the two have only just parted, with own moments."""
        if not self.is_apart:
            self.common.forget()
            self.common.load_optimizer_state(self.own.optimizer_state())
        self.is_apart = True
        self.common.write(values)
        self.own.write(own)
        return True

    def read(self, out: Flat | None = None) -> Flat:
        """The client's own parameters: a copy, into `out` if given."""
        return self.own.read(out)

    def write(self, values: Flat) -> None:
        """Set the parameters. The client follows its parent: there is one model again, with the common moments."""
        if self.is_apart:
            self.own.forget()
            self.own.load_optimizer_state(self.common.optimizer_state())
        self.is_apart = False
        self.own.write(values)

    def run(
        self,
        batches: Iterable[Batch],
        rate: Callable[[int], float],
        *,
        first: int = 0,
        should_stop: Callable[[], bool] = lambda: False,
        proximal: Proximal | None = None,
    ) -> RoundResult:
        """Take one optimizer step per batch; of two models each takes it."""
        if not self.is_apart:
            return self.own.run(batches, rate, first=first, should_stop=should_stop, proximal=proximal)
        for_common: list[Batch] = []

        def for_own() -> Iterator[Batch]:
            for x, y in batches:
                for_common.append((x.copy(), y.copy()))
                yield x, y

        result = self.own.run(for_own(), rate, first=first, should_stop=should_stop, proximal=proximal)
        # One batch more may have been drawn.
        train_s = self.common.run(for_common[: result.steps], rate, first=first).train_s
        return replace(result, train_s=result.train_s + train_s)

    def evaluate(self, batches: Iterable[Batch], *, parameters: Flat | None = None) -> tuple[float, int]:
        """Summed loss in nats and number of tokens, of the client's own model or of other parameters."""
        return self.own.evaluate(batches, parameters=parameters)

    def sample(self, prompt: npt.NDArray[np.int64], *, tokens: int, temperature: float, seed: int) -> list[int]:
        """Token ids that continue a prompt, by the client's own model."""
        return self.own.sample(prompt, tokens=tokens, temperature=temperature, seed=seed)

    def optimizer_state(self) -> dict[str, Flat]:
        """That of the client's own optimizer and, while there are two models, the common model and its optimizer's."""
        state = self.own.optimizer_state()
        if self.is_apart:
            common = {_THETA: self.common.read(), **self.common.optimizer_state()}
            state |= {f"{_PREFIX}{name}": values for name, values in common.items()}
        return state

    def load_optimizer_state(self, saved: dict[str, Flat]) -> None:
        """Restore what `optimizer_state` gave."""
        self.own.load_optimizer_state({n: values for n, values in saved.items() if not n.startswith(_PREFIX)})
        common = {n.removeprefix(_PREFIX): values for n, values in saved.items() if n.startswith(_PREFIX)}
        self.is_apart = bool(common)
        if common:
            self.common.write(common.pop(_THETA))
            self.common.load_optimizer_state(common)

    def forget(self) -> None:
        """Drop the moments and the step count, and the common model."""
        self.is_apart = False
        self.own.forget()
