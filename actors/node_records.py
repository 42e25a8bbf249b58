"""What an inner node tells: records for the recorder, verdicts for the audit trail."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from worldlm_ray.aggregation.node import Node
from worldlm_ray.records import AggregationRecord, LifeRecord, Record, VerdictRecord
from worldlm_ray.run_clock import RunClock
from worldlm_ray.tracking import log_lines
from worldlm_ray.tracking.audit import AuditLog


class NodeRecords:
    """The records of one inner node.

    Args:
        path: of the node.
        node: whose version they name.
        clock: of the run.
        recorder: handle of the run's recorder.
        run_dir: holds the audit trail.
    """

    def __init__(self, path: str, node: Node, clock: RunClock, recorder: Any, run_dir: Path) -> None:
        self._path, self._node, self._clock, self._recorder = path, node, clock, recorder
        self.audit = AuditLog(run_dir, path, warn=self.warn)
        """Takes verdicts."""
        self._began_s = clock.now_s()
        self._busy_s = 0.0

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Count the time of an event's handling."""
        began = time.perf_counter()
        yield
        self._busy_s += time.perf_counter() - began

    def noted(self, record: Record) -> Record:
        """What the state machine notes, as it is to be sent; a verdict stands in the audit trail from now on."""
        if isinstance(record, VerdictRecord):
            self.audit.verdict(record)
        return self._with_busy(record)

    def send(self, records: Sequence[Record]) -> None:
        """Send records, if there are any."""
        for record in records:
            log_lines.note(record)
        if records:
            self._recorder.record.remote(list(records))

    def tell(self, event: str, detail: str = "") -> None:
        """Send an event of the node's life."""
        version, now_s = self._node.version, self._clock.now_s()
        record = LifeRecord(node=self._path, now_s=now_s, event=event, version=version, detail=detail)
        self.send([record])

    def warn(self, text: str) -> None:
        """Send a warning."""
        self.tell("warning", text)

    def _with_busy(self, record: Record) -> Record:
        if isinstance(record, AggregationRecord):
            alive_s = max(self._clock.now_s() - self._began_s, 1e-9)
            return replace(record, busy_fraction=min(self._busy_s / alive_s, 1.0))
        return record
