"""ZeRO stages 0 to 3 with two workers against a plain client: agreement, memory, and what a gather takes."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.zero_group import RATE, batches, in_group, memory, start, train, training
from worldlm_ray.model.shape import PRESETS
from worldlm_ray.training.local import LocalTrainer

STEPS = 50


def run() -> dict[str, Any]:
    """Print the table of agreement (preset nano) and that of memory (75m's blocks with a vocabulary of bytes)."""
    shape = PRESETS["nano"]
    layout, initial = start(shape)
    plain = LocalTrainer(shape, layout, training(0), threads=1, device="cpu")
    plain.write(initial)
    losses = [plain.run([batch], lambda _: RATE).loss_sum for batch in batches(shape, steps=STEPS)]
    print(f"  after {STEPS} steps, fp32; plain client: loss {losses[-1]:.7f}")
    print("  stage   loss        largest difference of a step's loss   of a parameter")
    rows = []
    for stage in range(4):
        found = in_group(train, stage, "nano", STEPS, {})[0]
        loss = float(np.max(np.abs(np.subtract(found["losses"], losses))))
        theta = float(np.max(np.abs(found["theta"] - plain.read())))
        rows.append({"stage": stage, "loss": found["losses"][-1], "loss_difference": loss, "difference": theta})
        print(f"  {stage}       {found['losses'][-1]:.7f}   {loss:.1e}                               {theta:.1e}")
    print("  bytes per worker at the height of a step (parameters, gradients, optimizer), in MB; and a gather's on top")
    print("  stage   measured   arithmetic   ratio   gather on rank 0   on rank 1   largest layer   flat buffer")
    for row in rows:
        first, second = (
            {name: value / 1e6 for name, value in found.items()} for found in in_group(memory, row["stage"], "75m")
        )
        row |= {f"{name}_mb": value for name, value in first.items()} | {"second_read_extra_mb": second["read_extra"]}
        ratio = first["measured"] / first["expected"]
        print(
            f"  {row['stage']}       {first['measured']:8.1f}   {first['expected']:10.1f}   {ratio:.3f}   "
            f"{first['read_extra']:16.1f}   {second['read_extra']:9.1f}   {first['layer_bytes']:13.1f}   "
            f"{first['model_bytes']:11.1f}"
        )
    return {"rows": rows}
