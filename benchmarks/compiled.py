"""Training speed of a plain client with `training.compile: on`, against the same client without, on the CPU."""

from __future__ import annotations

import statistics
import time
from typing import Any

from benchmarks.zero_group import RATE, batches, start
from worldlm_ray.config.schema import TrainingConfig
from worldlm_ray.model.shape import PRESETS
from worldlm_ray.training.local import LocalTrainer

PAIRS, STEPS = 5, 20


def run() -> dict[str, Any]:
    """Both on the same batches in turn; CPU seconds, since that is what a busy machine leaves comparable."""
    rows = []
    for preset in ("nano", "micro"):
        shape = PRESETS[preset]
        layout, initial = start(shape)
        drawn = batches(shape, steps=STEPS)
        off = LocalTrainer(shape, layout, TrainingConfig(compile="off"), threads=1, device="cpu")
        on = LocalTrainer(shape, layout, TrainingConfig(compile="on"), threads=1, device="cpu")
        first_s = {}
        for name, made in (("off", off), ("on", on)):
            made.write(initial)
            began = time.perf_counter()
            made.run(drawn[:1], lambda _: RATE)
            first_s[name] = time.perf_counter() - began
        ratios = [_cpu_s(off, drawn) / _cpu_s(on, drawn) for _ in range(PAIRS)]
        rows.append({"preset": preset, "first_step_s": first_s["on"], "ratios": ratios})
        print(
            f"  {preset:6} {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f}); "
            f"the first step takes {first_s['on']:.0f} s"
        )
    return {"rows": rows}


def _cpu_s(made: LocalTrainer, drawn: Any) -> float:
    began = time.process_time()
    made.run(drawn, lambda _: RATE)
    return time.process_time() - began
