"""The tracker `csv`: RUN_DIR/metrics.csv, for spreadsheets."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping

from worldlm_ray.storage import filesystem
from worldlm_ray.tracking.sinks import RunFacts, Sink, sink

FILE = "metrics.csv"
COLUMNS = ("now_s", "tokens", "node", "name", "value")
EVERY_S = 10.0
"""Seconds between two additions."""


@sink("csv", by_default=False)
class CsvFile(Sink):
    """RUN_DIR/metrics.csv, the columns of metrics.jsonl. Source: RFC 4180."""

    def __init__(self, run: RunFacts) -> None:
        path = run.run_dir / FILE
        with filesystem.refusals(path):
            is_new = not any(run.run_dir.glob("metrics*.csv"))
        self._file = filesystem.Growing(path, closing=b"\r\n")
        self._clock, self._next = run.clock, run.clock() + EVERY_S
        self._waiting = io.StringIO(newline="")
        self._writer = csv.writer(self._waiting)
        if is_new:
            self._writer.writerow(COLUMNS)

    def scalars(self, node: str, kind: str, values: Mapping[str, float | None], *, now_s: float, tokens: int) -> None:
        """Add a row per value; one that is not finite is empty."""
        for name, value in values.items():
            if value is not None:
                self._writer.writerow((round(now_s, 3), tokens, node, name, value if math.isfinite(value) else ""))

    def flush_if_due(self) -> None:
        """Write the waiting rows, if the last write was long enough ago."""
        if self._clock() >= self._next:
            self.flush()

    def flush(self) -> None:
        """Write the waiting rows; while the storage refuses, they wait."""
        self._next = self._clock() + EVERY_S
        if text := self._waiting.getvalue():
            try:
                self._file.add(text.encode())
            except OSError as error:
                self.trouble = f"cannot write {FILE}: {error}; rows wait in memory"
                return
            self._waiting.seek(0)
            self._waiting.truncate()
        self.trouble = ""
