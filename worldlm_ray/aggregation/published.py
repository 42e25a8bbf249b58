"""The model that a node publishes, and the buffers that its models and updates lie in."""

from __future__ import annotations

from typing import Any

import numpy as np

from worldlm_ray.aggregation.sums import Sums
from worldlm_ray.tensors.buffers import Flat, frozen


class Published:
    """The published model of one node. One class owns its buffers, so that none is used twice or dropped early.

    The model never changes in place: children, a push in flight and a checkpoint can share it.

    Args:
        initial: the run's initial parameters; not copied, must not change.
        sums: what the model is the mean of; None under every rule but `sums`.
    """

    def __init__(self, initial: Flat, *, sums: Sums | None = None) -> None:
        self.sums = sums
        self.theta = frozen(initial)
        """The published model."""
        self.version = 0
        self.tokens = 0
        """Tokens of all updates that were aggregated."""
        self.mean_tokens = 0.0
        """Tokens per update of the newest aggregation."""
        self._made: Flat | None = None
        """The buffer that the model lies in, if an aggregation or a merge has made it."""
        self._lent = True
        """Whether that buffer may still be read elsewhere."""
        self._update: Flat | None = None
        """The buffer in which the update in flight was made, as long as it lies there."""
        self._spare: list[Flat] = []
        """Buffers for the next models: the models that lay there lie in shared memory, or were never read."""

    def buffer(self) -> Flat:
        """A buffer as large as the model, whatever it holds."""
        return self._spare.pop() if self._spare else np.empty(self.theta.size, np.float32)

    def update_buffer(self) -> Flat:
        """The same for an update."""
        self._update = self.buffer()
        return self._update

    def publish(self, values: Flat, *, keep_old: bool) -> None:
        """Make a buffer the published model.

        Args:
            values: from `buffer`.
            keep_old: whether the node itself still reads the model before.
        """
        if self._made is not None and not self._lent and not keep_old:
            self._spare.append(self._made)  # several updates came before any child pulled
        self.theta, self._made, self._lent = frozen(values), values, False

    def aggregated(self, tokens: int, updates: int) -> None:
        """Count an aggregation of so many updates: its model is the next version."""
        self.version += 1
        self.tokens += tokens
        self.mean_tokens = tokens / updates

    def lend(self) -> Flat:
        """The model for a child: from now on its buffer may be read elsewhere."""
        self._lent = True
        return self.theta

    def retire_buffer(self) -> None:
        """Use the buffer of the model no more: a checkpoint reads it for a while."""
        self._made = None

    def use_shared_copy(self, own: Flat, shared: Flat) -> None:
        """Let go of a buffer whose values lie in shared memory now.

        Args:
            own: the published model, or an update.
            shared: a read-only view of the same values.
        """
        made, update = self._made, self._update
        if self.theta is own:
            self.theta = shared
            if made is not None and _lies_in(own, made):
                self._spare.append(made)
            self._made = None
        elif update is not None and _lies_in(own, update):
            if not np.shares_memory(own, shared):
                self._spare.append(update)
            self._update = None

    def state(self) -> tuple[dict[str, Any], dict[str, Flat]]:
        """What a restart needs."""
        meta: dict[str, Any] = {"version": self.version, "tokens": self.tokens, "mean_tokens": self.mean_tokens}
        arrays = {"theta": self.theta}
        if self.sums is not None:
            meta["sums"], found = self.sums.state()
            arrays |= found
        return meta, arrays

    def restore(self, saved: dict[str, Any], arrays: dict[str, Flat]) -> None:
        """Become what `state` described."""
        self.version, self.tokens, self.mean_tokens = saved["version"], saved["tokens"], saved["mean_tokens"]
        self.theta = frozen(arrays["theta"])
        if self.sums is not None:
            self.sums.restore(saved["sums"], arrays)


def _lies_in(values: Flat, buffer: Flat) -> bool:
    """Whether values are a view of a buffer."""
    return values.base is buffer
