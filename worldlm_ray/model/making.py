"""The module of a shape: the decoder of this package, or a model of transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Union

import torch

from worldlm_ray.model.decoder import Decoder
from worldlm_ray.model.pretrained_shape import Architecture, PretrainedShape

if TYPE_CHECKING:
    from worldlm_ray.model.pretrained import Pretrained

LanguageModel = Union[Decoder, "Pretrained"]


def make_model(shape: Architecture, *, recompute: bool = False, device: str = "cpu") -> LanguageModel:
    """A module whose trainable parameters have no memory yet: `bind` makes them views of a flat buffer.

    It gives logits [B, T, V] from token ids [B, T]; its `loss` is a cross-entropy in nats. The names of the parameters
    of its `root` are those of the layout.

    Args:
        shape: of the model.
        recompute: compute the blocks' activations again in the backward pass instead of keeping them.
        device: where the frozen weights lie; the clients of a process share them there.

    Raises:
        DataError: frozen weights cannot be read.
    """
    if isinstance(shape, PretrainedShape):
        from worldlm_ray.model.pretrained import make  # transformers takes seconds to import

        return make(shape, recompute=recompute, device=device)
    with torch.device("meta"):  # no memory and no default initialisation: the flat buffer is the model
        return Decoder(shape, recompute=recompute)
