"""Cost of record-level privacy: CPU seconds and memory of a step, against the same step without."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks.zero_group import PRIVATE, RATE, batches, in_group, start, training
from worldlm_ray.model.shape import PRESETS
from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.tensors.layout import Layout
from worldlm_ray.training.local import LocalTrainer

PAIRS = 7


def run() -> dict[str, Any]:
    """The quickstart's shape in one process, with all records of a batch; then two workers."""
    [plain, private] = in_group(_alone, workers=2)
    rows: list[dict[str, Any]] = [{"client": "plain, micro", **_ratios(plain, private)}]
    for stage in (1, 2, 3):
        found = {}
        for is_private in (False, True):
            both = in_group(_sharded, stage, is_private)
            found[is_private] = {name: max(worker[name] for worker in both) for name in both[0]}
        rows.append({"client": f"ZeRO stage {stage}, micro", **_ratios(found[False], found[True])})
    for row in rows:
        print(
            f"  {row['client']:22} CPU {row['cpu']:.2f} times, memory {row['memory']:.2f} times that of a step without"
        )
    return {"rows": rows}


def _ratios(plain: dict[str, float], private: dict[str, float]) -> dict[str, float]:
    return {"cpu": private["cpu_s"] / plain["cpu_s"], "memory": private["memory"] / plain["memory"]}


def _alone() -> dict[str, float]:
    """A plain client in the first process, a private one in the second, at the same time."""
    import torch.distributed as dist

    from worldlm_ray.training.private import PrivateTrainer

    shape = PRESETS["micro"]

    def made(layout: Layout, initial: Flat) -> Callable[[], object]:
        if dist.get_rank() == 0:
            trainer = LocalTrainer(shape, layout, training(0), threads=1, device="cpu")
        else:
            trainer = PrivateTrainer(shape, layout, training(0), PRIVATE, noise=1.0, threads=1, device="cpu")
        trainer.write(initial)
        [batch] = batches(shape, steps=1)
        return lambda: trainer.run([batch], lambda _: RATE)

    return _measured(made, shape)


def _sharded(stage: int, is_private: bool) -> dict[str, float]:
    from worldlm_ray.training.zero import ZeroWorker

    shape = PRESETS["micro"]

    def made(layout: Layout, initial: Flat) -> Callable[[], object]:
        privacy = PRIVATE if is_private else None
        worker = ZeroWorker(shape, layout, training(stage), threads=1, privacy=privacy, noise=1.0)
        worker.write(initial)
        [batch] = batches(shape, steps=1)
        return lambda: worker.run([batch], [RATE])

    return _measured(made, shape)


def _measured(made: Callable[[Layout, Flat], Callable[[], object]], shape: Any) -> dict[str, float]:
    """CPU seconds of a step (median), and by how much the process grew from before the trainer was made."""
    layout, initial = start(shape)
    before = _peak_kb()
    step = made(layout, initial)
    step()
    times = []
    for _ in range(PAIRS):
        began = time.process_time()
        step()
        times.append(time.process_time() - began)
    grown = _peak_kb() - before
    return {"cpu_s": statistics.median(times), "memory": 1024.0 * grown}


def _peak_kb() -> int:
    """Largest resident memory of this process so far. (What `getrusage` says may be that of the process before it.)"""
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
