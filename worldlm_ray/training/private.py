"""Local training with differential privacy at the level of records: DP-SGD in front of AdamW.

Source: Abadi et al., arXiv 1607.00133, algorithm 1: the sum of clipped per-record gradients, plus noise, over the
*expected* number of records. AdamW then only processes a private result.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from worldlm_ray.config.schema import PrivacyConfig, TrainingConfig
from worldlm_ray.model.pretrained_shape import Architecture
from worldlm_ray.privacy.dp_sgd import Mode, RecordGradients, cheaper, check_architecture
from worldlm_ray.privacy.noise import Noise
from worldlm_ray.tensors.layout import Layout
from worldlm_ray.training.local import LocalTrainer, on_device


class PrivateTrainer(LocalTrainer):
    """A `LocalTrainer` with the steps of DP-SGD.

    Args:
        shape: of the model.
        layout: the flat layout.
        training: optimizer settings; `batch_size` is the expected number of records of a step.
        privacy: clipping and how per-record gradients are computed.
        noise: noise multiplier.
        threads: torch threads.
        device: `cpu`, `cuda` or None for CUDA when there is a device.

    Raises:
        PrivacyError: per-record gradients of this model cannot be computed, or are computed wrongly.
    """

    def __init__(
        self,
        shape: Architecture,
        layout: Layout,
        training: TrainingConfig,
        privacy: PrivacyConfig,
        *,
        noise: float,
        threads: int,
        device: str | None = None,
    ) -> None:
        # Records are clipped one by one: a second clipping of the noisy sum would only distort it.
        # Hooks on modules compute the gradients of single records: a compiled step would have none.
        plain = replace(training, grad_clip=0.0, compile="off")
        super().__init__(shape, layout, plain, threads=threads, device=device)
        self.privacy, self.noise = privacy, noise
        self._noise = Noise(self.device)
        self.mode = self._mode()
        check_architecture(shape, mode=self.mode, model=self.model)
        self._records = self._gradients(self.mode)

    def step(self, inputs: npt.NDArray[np.int64], targets: npt.NDArray[np.int64], learning_rate: float) -> Tensor:
        """One step of DP-SGD on the records of a Poisson batch, which may be empty. Returns their mean loss."""
        self.gradient.zero_()
        total = torch.zeros((), device=self.device)
        most = 2 * self.training.batch_size
        for first in range(0, len(inputs), most):
            rows = slice(first, first + most)
            total += self._add(self._records, inputs[rows], targets[rows]).sum()
        if self.noise > 0.0:
            self._noise.add(self.gradient, self.noise * self.privacy.max_grad_norm)
        self.gradient /= self.training.batch_size
        self._descend(learning_rate)
        return total / max(len(inputs), 1)

    def _add(self, records: RecordGradients, inputs: npt.NDArray[np.int64], targets: npt.NDArray[np.int64]) -> Tensor:
        tokens_BT, targets_BT = on_device(inputs, self.device), on_device(targets, self.device)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            return records.add(tokens_BT, targets_BT)

    def _gradients(self, mode: Mode) -> RecordGradients:
        return RecordGradients(self.model, max_grad_norm=self.privacy.max_grad_norm, mode=mode, bf16=self.bf16)

    def _mode(self) -> Mode:
        """The configured mode; for `auto` the mode that is faster here on random tokens."""
        if self.privacy.grad_sample_mode != "auto":
            return self.privacy.grad_sample_mode
        torch.set_num_threads(self.threads)
        made_up = np.zeros((self.training.batch_size, self.shape.context), np.int64)
        both: dict[Mode, RecordGradients] = {"hooks": self._gradients("hooks"), "ghost": self._gradients("ghost")}
        try:
            return cheaper({mode: partial(self._add, records, made_up, made_up) for mode, records in both.items()})
        finally:
            for records in both.values():
                records.close()
            self.gradient.zero_()
