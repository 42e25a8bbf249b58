"""Gaussian noise from a generator that cannot be guessed."""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import Tensor

_BLOCK = 1 << 20


class Noise:
    """One stream for every process and every start, seeded by the operating system and never saved.

    Noise that a restart draws again, on other records, would cancel out. On the CPU the stream is NumPy's PCG64 with a
    seed of 128 bits: torch's generator there keeps 32 bits of its seed, few enough to be tried one by one.

    Args:
        device: where the tensors lie.
    """

    def __init__(self, device: torch.device) -> None:
        self._host = np.random.Generator(np.random.PCG64(int.from_bytes(os.urandom(16), "little")))
        self._cuda: torch.Generator | None = None
        if device.type != "cpu":
            self._cuda = torch.Generator(device=device)
            self._cuda.manual_seed(int.from_bytes(os.urandom(8), "little") >> 1)  # Philox uses all of it

    def add(self, values: Tensor, scale: float) -> None:
        """Add noise with this standard deviation, in place."""
        if self._cuda is not None:
            noise = torch.empty(values.shape, device=values.device).normal_(generator=self._cuda)
            values.add_(noise.to(values.dtype), alpha=scale)
            return
        flat = values.view(-1)
        for start in range(0, flat.numel(), _BLOCK):
            part = flat[start : start + _BLOCK]
            drawn = torch.from_numpy(self._host.standard_normal(part.numel(), np.float32))
            part.add_(drawn.to(part.dtype), alpha=scale)
