"""What a client asks of whatever trains its model: one device in this process, or DeepSpeed's workers in others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from worldlm_ray.tensors.buffers import Flat

Batch = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
"""Token ids and targets, [batch, context] each. A target may be IGNORED (worldlm_ray/tensors/targets.py)."""

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's, by torch's names."""
STEP = "step"
"""Its count of steps, by torch's name."""


@dataclass(frozen=True, kw_only=True)
class Proximal:
    """A term of the loss that draws the model to another one: strength / 2 times the squared distance.

    FedProx (arXiv 1812.06127, equation 2), Ditto (arXiv 2012.04221, equation 1), MR-MTL (arXiv 2206.07902).
    """

    center: Flat
    """[layout.size]"""
    strength: float


@dataclass(frozen=True, kw_only=True)
class RoundResult:
    """What a run of optimizer steps came to."""

    steps: int
    tokens: int
    loss_sum: float
    """Sum over steps of the step's mean loss, nats per counted target."""
    train_s: float
    learning_rate: float
    """Of the last step."""


class Trainer(Protocol):
    """A model with its optimizer. Flat buffers are fp32 in the run's layout, whatever the model computes in.

    A trainer derives from this class: `beside` and `train_beside` are those of a trainer of one model.
    """

    def read(self, out: Flat | None = None) -> Flat:
        """The parameters: a copy, into `out` if given."""
        ...

    def write(self, values: Flat) -> None:
        """Set the parameters; the optimizer's state stays."""
        ...

    def run(
        self,
        batches: Iterable[Batch],
        rate: Callable[[int], float],
        *,
        first: int = 0,
        should_stop: Callable[[], bool] = lambda: False,
        proximal: Proximal | None = None,
    ) -> RoundResult:
        """Take one optimizer step per batch, at the learning rate that `rate` gives for its index.

        `first` is the place of the first batch in its round, by which `training.head_first` says what a step trains.
        `should_stop` is asked between steps; True ends the run early and keeps what was done. With `proximal` the
        client's own model is drawn to another one.
        """
        ...

    def evaluate(self, batches: Iterable[Batch], *, parameters: Flat | None = None) -> tuple[float, int]:
        """Summed loss in nats and number of counted targets, of the model or of other parameters."""
        ...

    def sample(self, prompt: npt.NDArray[np.int64], *, tokens: int, temperature: float, seed: int) -> list[int]:
        """Token ids that continue a prompt."""
        ...

    def optimizer_state(self) -> dict[str, Flat]:
        """What a restart needs beside the parameters; empty before the first step.

        The moments in the layout of what is trained (`exp_avg`, `exp_avg_sq`) and the `step`, of a second model under
        other names.
        """
        ...

    def load_optimizer_state(self, saved: dict[str, Flat]) -> None:
        """Restore what `optimizer_state` gave, of this trainer or of one with another number of workers."""
        ...

    def forget(self) -> None:
        """Drop the moments and the step count."""
        ...

    def beside(self) -> Flat | None:
        """A copy of the parameters that are trained beside the model's; None if none are."""
        return None

    def train_beside(self, values: Flat, *, own: Flat) -> bool:
        """Train the given parameters (the parent's) beside the model until `write`, if there is a way.

        Args:
            values: what is trained beside.
            own: becomes the model.

        Returns:
            Whether there is: of a trainer of one model, False, and nothing changes.
        """
        return False

    def take_experts(self, values: Mapping[str, Flat]) -> bool:
        """Mix these adapters with the own one from now on (model/experts.py).

        Args:
            values: parameters [layout.size] by name of the expert; copied.

        Returns:
            Whether the trainer mixes experts: of one that does not, False, and nothing changes.
        """
        return False
