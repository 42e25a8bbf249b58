"""Many small clients of one process: one after the other, against all stacked into one batch by vmap."""

from __future__ import annotations

from benchmarks import batched_clients
from benchmarks.gpu.card import device
from benchmarks.gpu.rows import Rows


def measure(rows: Rows, toy: bool) -> None:
    """The ratio of times for each size."""
    for row in batched_clients.run(devices=[device(toy)], presets=["nano"] if toy else ["nano", "micro"])["rows"]:
        what = f"{row['preset']}: {batched_clients.CLIENTS} clients stacked, times as fast as one by one"
        rows.add(what, row["ratio"])
