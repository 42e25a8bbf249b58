"""Whether a child takes its parent's model: it is checked like an update, since a parent may be broken, or lie, too."""

from __future__ import annotations

import math

import numpy as np

from worldlm_ray.errors import MessageError
from worldlm_ray.exchange.limits import MOST_SKIPPED, checked_norm
from worldlm_ray.exchange.messages import Model, Pulled
from worldlm_ray.records import LifeRecord
from worldlm_ray.tensors.buffers import Flat, squared_norm
from worldlm_ray.tensors.layout import Layout


def check_seqs(model: Model, *, seq: int) -> None:
    """Refuse a word by which a child would skip updates without bound; `seq` as for `check_model`.

    Raises:
        MessageError: implausible_seq.
    """
    if model.last_seq > seq + MOST_SKIPPED:
        raise MessageError("implausible_seq", f"it knows seq {model.last_seq}, and {seq} is the last one made")
    if model.durable_seq > model.last_seq:
        got = f"its checkpoints cover seq {model.durable_seq}, and {model.last_seq} is the last one that it knows"
        raise MessageError("implausible_seq", got)


def check_model(model: Model, layout: Layout, *, seq: int, own: Flat | None, max_step: float | None) -> None:
    """Refuse a model that would spoil the child's own, or make it skip updates without bound.

    Args:
        model: the parent's.
        layout: the model's layout.
        seq: of the last update that the child knows it has made.
        own: the child's whole model; None of one that has nothing of its own to compare with.
        max_step: largest L2 distance of the parent's model from the child's own, in multiples of the own one's L2 norm.

    Raises:
        MessageError: not_finite, step_exceeded or implausible_seq.
    """
    check_seqs(model, seq=seq)
    checked_norm(model.values)
    if max_step is None or own is None:
        return
    split = layout.backbone_size
    backbone, keys = model.values[:split], model.values[split:]
    mine, own_keys = own[:split], own[split:]
    steps = [math.sqrt(squared_norm(backbone, mine) + squared_norm(keys, own_keys))]
    layers = {layer.name: own_keys[layer.start : layer.stop] for layer in layout.key_layers}
    steps += [math.sqrt(squared_norm(residual.values, layers[residual.layer])) for residual in model.residuals]
    whole = max(math.sqrt(squared_norm(mine) + squared_norm(own_keys)), float(np.finfo(np.float32).tiny))
    if max(steps) > max_step * whole:
        got = f"it lies {max(steps) / whole:.4g} times the norm of the own model away"
        raise MessageError("step_exceeded", f"{got}, above merge.max_model_step {max_step:g}")


class Gate:
    """Which of its parent's models a child takes, and what it says when it begins to refuse them.

    Args:
        path: of the child.
        layout: the model's layout.
        max_step: see `check_model`; None for any.
    """

    def __init__(self, path: str, layout: Layout, *, max_step: float | None) -> None:
        self.path, self.layout, self.max_step = path, layout, max_step
        self.shut = False
        """Whether the last model was refused."""
        self.last_seq = 0
        """What the last model said of the child's updates, refused or not; 0 where that is not believed."""
        self._has_said = False
        """Whether it has told of the refusal, since it last took a model."""

    def refusal(self, model: Pulled, *, seq: int, own: Flat | None, now_s: float) -> LifeRecord | None:
        """Look at a model; afterwards `shut` says whether it is refused.

        Args:
            model: what a pull has brought.
            seq: as for `check_model`.
            own: as for `check_model`.
            now_s: run time, for the record.

        Returns:
            A warning that names the parent, for the first of several refused models; else None.
        """
        self.shut, self.last_seq = True, 0
        try:
            if isinstance(model, MessageError):
                raise model
            check_seqs(model, seq=seq)
            self.last_seq = model.last_seq
            check_model(model, self.layout, seq=seq, own=own, max_step=self.max_step)
        except MessageError as error:
            said = f"refuses the model of its parent {self.path.rpartition('/')[0]} ({error}) and goes on with its own"
            before, self._has_said = self._has_said, True
            return None if before else LifeRecord(node=self.path, now_s=now_s, event="warning", detail=said)
        self.shut = self._has_said = False
        return None
