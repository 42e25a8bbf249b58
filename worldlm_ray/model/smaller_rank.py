"""The adapters of a client whose rank r is below the world's R (`training.lora_rank`).

    in    the first r rows of every A and the first r columns of every B: the client's model has no others
    out   the same places of a buffer in the world's layout, with zeros elsewhere

The scale of B A is the world's, alpha / R, so that rank r computes what rank R computes with zeros beyond r.

Source: truncation and zero-padding of HetLoRA (Cho et al., arXiv 2401.06432, figure 2). There whole adapters are padded
and averaged. Here changes are: a mean leaves what is beyond r where it was, as far as others do not move it.

Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from worldlm_ray.model.pretrained_shape import LORA_A, Architecture, PretrainedShape
from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.tensors.layout import Layout


@dataclass(frozen=True, kw_only=True)
class SmallerRank:
    """What a client of a smaller rank trains, and where it lies in the world's buffers."""

    shape: PretrainedShape
    """Of rank r, with the world's scale."""
    layout: Layout
    """Of the client's own adapters."""
    world: Layout
    """Of rank R: what travels."""

    @cached_property
    def inside(self) -> npt.NDArray[np.bool_]:
        """Which elements of the world's layout the client has [world.size]. In their order they are its own buffer."""
        found = np.zeros(self.world.size, np.bool_)
        for whole, own in zip(self.world.entries, self.layout.entries, strict=True):
            view = found[whole.offset : whole.offset + whole.size].reshape(whole.shape)
            view[tuple(slice(length) for length in own.shape)] = True
        return found

    def cut(self, values: Flat) -> Flat:
        """The client's part [layout.size] of parameters in the world's layout: a copy."""
        return values[self.inside]

    def padded(self, values: Flat, out: Flat | None = None) -> Flat:
        """The client's parameters in the world's layout, into `out` if given, with zeros beyond its rank."""
        out = np.empty(self.world.size, np.float32) if out is None else out
        out[:] = 0.0
        out[self.inside] = values
        return out

    def within(self, values: Flat, *, start: int = 0) -> Flat:
        """A copy of parameters in the world's layout with zeros beyond the client's rank.

        Args:
            values: all of them, or a slice.
            start: element of the layout that a slice begins with.
        """
        return np.where(self.inside[start : start + values.size], values, np.float32(0.0))

    def holds(self, values: Flat) -> bool:
        """Whether parameters in the world's layout are zero beyond the client's rank."""
        return not values[~self.inside].any()


def smaller_rank(shape: Architecture, layout: Layout, rank: int | None) -> SmallerRank | None:
    """What a client of a rank trains; None if that is what all train.

    Args:
        shape: of the world's model.
        layout: the world's.
        rank: the client's, at most the world's; None for the world's.
    """
    if rank is None or not isinstance(shape, PretrainedShape) or rank == shape.lora.r:
        return None

    def cut(name: str, size: tuple[int, ...]) -> tuple[int, ...]:
        return (rank, size[1]) if name.endswith(LORA_A) else (size[0], rank)

    own = replace(
        shape,
        parameters=tuple((name, cut(name, size)) for name, size in shape.parameters),
        frozen_a=tuple((name, cut(name, size)) for name, size in shape.frozen_a),
        lora=replace(shape.lora, r=rank, alpha=shape.lora.alpha * rank / shape.lora.r),
    )
    return SmallerRank(shape=own, layout=layout.resized(dict(own.parameters)), world=layout)
