"""The curves of a run as lines of JSON, for tools that do not read TensorBoard's files.

    metrics.jsonl    {"now_s": 12.5, "tokens": 4096, "node": "world/europe/italy", "name": "loss", "value": 2.31}

One line per value: run time in seconds, tokens trained so far (of an inner node, by the clients below it), path of the
node, name of the quantity as in worldlm_ray/tracking/charts.py, and the value, null where it is not finite. The nodes
`all-clients-mean`, `-best` and `-worst` stand for all clients together. `attention/up/CHILD` and
`attention/down/parent` are mean weights over key layers, of some blends. A resumed run appends. In an object store
the file is a row of objects, `metrics.0000-MARK.jsonl` and so on.

    pandas.read_json("runs/NAME/metrics.jsonl", lines=True).pivot_table(index="now_s", columns="node", values="value")

In a world with very many clients, a sample of them has lines (worldlm_ray/tracking/drawing.py).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from worldlm_ray.storage import filesystem
from worldlm_ray.tracking.sinks import RunFacts, Sink, sink

FILE = "metrics.jsonl"
EVERY_S = 2.0
"""Wall seconds between two additions."""
OBJECTS_EVERY_S = 10.0
"""The same in an object store, where each addition rewrites the newest object."""
TIME_SHARE = 0.05
"""Largest fraction of the time that writing may take. Slow storage is written to less often."""
_LINE = {"now_s": int | float, "tokens": int, "node": str, "name": str, "value": int | float | None}
"""Type of each value of a line."""
KEPT_LINES = 200_000
"""Lines that wait in memory while the storage refuses them, 25 MB or so; newer ones are dropped and counted."""


class Curves(Sink):
    """Appends to the curves of one run.

    Args:
        run_dir: the run folder.
        clock: monotonic seconds; it only paces the file.
    """

    def __init__(self, run_dir: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock = run_dir / FILE, clock
        self._file = filesystem.Growing(self._path, closing=b"\n")
        self._pause_s = OBJECTS_EVERY_S if filesystem.is_remote(run_dir) else EVERY_S
        self._waiting: list[str] = []
        self._dropped = 0
        self._next = self._clock() + self._pause_s
        self.trouble = ""
        """Why lines wait in memory; empty if they do not."""

    def scalars(self, node: str, kind: str, values: Mapping[str, float | None], *, now_s: float, tokens: int) -> None:
        """Add values of a node, to be written soon.

        Args:
            node: its path.
            kind: not written.
            values: by name; None is left out.
            now_s: run time in seconds.
            tokens: trained so far, by the node or by the clients below it.
        """
        for name, value in values.items():
            if value is None:
                continue
            if len(self._waiting) >= KEPT_LINES:
                self._dropped += 1
                continue
            line = {
                "now_s": round(now_s, 3),
                "tokens": tokens,
                "node": node,
                "name": name,
                "value": value if math.isfinite(value) else None,
            }
            self._waiting.append(json.dumps(line, allow_nan=False))

    def flush_if_due(self) -> None:
        """Write the waiting lines, if the last write was long enough ago."""
        if self._waiting and self._clock() >= self._next:
            self.flush()

    def flush(self) -> None:
        """Write the waiting lines. If the storage refuses, they stay in memory, and `trouble` says why."""
        began = self._clock()
        if self._waiting:
            try:
                self._file.add(("\n".join(self._waiting) + "\n").encode())
                self._waiting.clear()
                self.trouble = f"{self._dropped:,} lines of {self._path} were dropped" if self._dropped else ""
            except OSError as error:
                self.trouble = f"cannot write {self._path}: {error}; curves wait in memory"
        ended = self._clock()
        self._next = ended + max(self._pause_s, (ended - began) / TIME_SHARE)


def read(run_dir: Path) -> Iterator[dict[str, Any]]:
    """Every whole line of a run's curves, in the order in which they were written. Damaged ones are left out."""
    name = Path(FILE)
    for path in sorted(run_dir.glob(f"{name.stem}*{name.suffix}")):
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                continue  # cut short by a kill
            if isinstance(line, dict) and all(isinstance(line.get(name), kind) for name, kind in _LINE.items()):
                yield line


@sink("jsonl")
def open_curves(run: RunFacts) -> Curves:
    """RUN_DIR/metrics.jsonl, a line for each value. Source: JSON Lines, jsonlines.org."""
    return Curves(run.run_dir, clock=run.clock)
