"""An update whose parameters lie on the device: read, encode and fold, in copies from the device to the host."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.gpu.card import device, seconds, shape_of
from benchmarks.gpu.rows import Rows
from worldlm_ray.aggregation.fold import Fold
from worldlm_ray.config.federated import AggregationConfig
from worldlm_ray.config.schema import TrainingConfig
from worldlm_ray.exchange.compression import encode
from worldlm_ray.exchange.messages import Update
from worldlm_ray.tensors.buffers import difference
from worldlm_ray.training.local import LocalTrainer

COPIES = 3.0
"""Target for an update of 1b: read, difference and fold."""


def measure(rows: Rows, toy: bool) -> None:
    """Each part of an update's way for two sizes."""
    for preset in ("125m",) if toy else ("125m", "1b"):
        _one_size(rows, preset, toy)


def _one_size(rows: Rows, preset: str, toy: bool) -> None:
    where, repeats = device(toy), 1 if toy else 3
    layout = shape_of(preset, toy).layout([])
    made = LocalTrainer(shape_of(preset, toy), layout, TrainingConfig(compile="off"), threads=8, device=where)
    out, base, change = (np.zeros(layout.size, np.float32) for _ in range(3))
    pinned = torch.empty(layout.size, pin_memory=where == "cuda")
    update = Update(sender="a", seq=1, base_version=0, tokens=1, started_tokens=1, values=change)

    def fold() -> None:
        sums = Fold(layout, AggregationConfig(buffer_size=2), origin=np.empty(0, np.float32), first_s=0.0)
        sums.add(update, 0, base)
        sums.add(update, 0, base)

    copy_s = seconds(lambda: pinned.copy_(made.flat.detach()), device=where, repeats=repeats)
    rows.add(f"{preset}: copy from device to host", layout.nbytes / copy_s / 1e9, "GB/s")
    read_s = seconds(lambda: made.read(out), device=where, repeats=repeats)
    change_s = seconds(lambda: difference(out, base, out=change), device=where, repeats=repeats)
    fold_s = seconds(fold, device=where, repeats=repeats) / 2
    for name, value in (("read", read_s), ("difference", change_s), ("fold", fold_s)):
        rows.add(f"{preset}: {name}", value / copy_s, "copies")
    whole = (read_s + change_s + fold_s) / copy_s
    rows.add(f"{preset}: an fp32 update", whole, "copies", most=COPIES if preset == "1b" else None)
    for codec in ("int8", "int4"):
        encode_s = seconds(lambda: encode(codec, out), device=where, repeats=repeats)  # noqa: B023 - called here
        rows.add(f"{preset}: encode {codec}", encode_s / copy_s, "copies")
