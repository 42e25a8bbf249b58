"""The common model of a client that has left for its own: its parent's, which it goes on training beside.

With `merge: {client: adaptive}` a client that no longer agrees with the others keeps its own model. If it then pushed
what it did to that, its parent's model would be the mean of models that never met again, good for nobody. With
`merge.common_fraction` a part of every batch trains the model that was pulled, as in FedAvg, and this is what is
pushed; the rest trains the client's own. No token is trained twice, and none more than without.

Keeping a personal and a common model is Ditto's idea (Li et al., arXiv 2012.04221), which trains each with all of the
text and ties them by a penalty. Here they share the batch, and part only when the movements do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property

from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.training.trainer import Batch, Trainer


class Common:
    """A second model with its optimizer.

    Args:
        make_trainer: makes what holds the model, once there is one.
        rows: sequences of every batch that it is trained on; 0 for no such model.
    """

    def __init__(self, make_trainer: Callable[[], Trainer], *, rows: int) -> None:
        self._make_trainer, self.rows = make_trainer, rows
        self.active = False
        """Whether the client keeps its own model, so that this one is trained beside it."""

    @cached_property
    def trainer(self) -> Trainer:
        """What holds the model."""
        return self._make_trainer()

    def begin(self, pulled: Flat, moments: dict[str, Flat]) -> None:
        """Train the pulled model in the round that begins.

        Args:
            pulled: the parent's model.
            moments: those of the client's own optimizer, of use when the two have only just parted.
        """
        if not self.active:
            self.trainer.forget()
            self.trainer.load_optimizer_state(moments)
        self.active = True
        self.trainer.write(pulled)

    def end(self) -> None:
        """The client follows its parent: there is one model again."""
        self.active = False

    def own(self, batches: Iterable[Batch]) -> Iterable[Batch]:
        """What is left of the batches for the client's own model."""
        return ((x[self.rows :], y[self.rows :]) for x, y in batches) if self.active else batches

    def train(self, batches: Iterable[Batch], rate: Callable[[int], float]) -> float:
        """Take as many steps as there are batches, if it is trained at all; returns the seconds that it took."""
        if not self.active:
            return 0.0
        return self.trainer.run(((x[: self.rows], y[: self.rows]) for x, y in batches), rate).train_s

    def state(self) -> dict[str, Flat]:
        """What a restart needs."""
        if not self.active:
            return {}
        moments = {f"common.optimizer.{name}": values for name, values in self.trainer.optimizer_state().items()}
        return {"common.theta": self.trainer.read(), **moments}

    def restore(self, arrays: dict[str, Flat]) -> None:
        """Become what `state` described."""
        self.active = self.rows > 0 and "common.theta" in arrays
        if self.active:
            prefix = "common.optimizer."
            self.trainer.write(arrays["common.theta"])
            self.trainer.load_optimizer_state(
                {name.removeprefix(prefix): values for name, values in arrays.items() if name.startswith(prefix)}
            )
