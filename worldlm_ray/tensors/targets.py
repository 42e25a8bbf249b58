"""Which target tokens count in a loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

IGNORED = -100
"""A target that has no loss: a token of a prompt, or padding. PyTorch's cross-entropy leaves this value out, too."""


def counted(targets: npt.NDArray[np.signedinteger[Any]]) -> int:
    """Number of targets that have a loss."""
    return int(np.count_nonzero(targets != IGNORED))
