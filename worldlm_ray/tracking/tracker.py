"""The single writer of a run folder: records of a backend become files for people and tools.

    status.json     the newest snapshot, replaced about once a second
    tensorboard/    charts, heat maps, texts: see worldlm_ray/tracking/tensorboard.py
    metrics.jsonl   the same curves as lines of JSON, of all nodes: see worldlm_ray/tracking/curves.py
    summary.json    the result of a finished run

Of a very large world, charts and metrics.jsonl hold a sample of the clients: see worldlm_ray/tracking/drawing.py.

While the storage refuses, data wait in memory, and the snapshot says why (`trouble`).

A tracker that opens an existing folder continues the run. It counts verdicts again from the audit trail, which inner
nodes write themselves (worldlm_ray/tracking/audit.py). The rest comes from status.json and may be a second old.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from worldlm_ray.config.schema import BudgetConfig
from worldlm_ray.config.tracking import TrackingConfig
from worldlm_ray.errors import RunError
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.rundir import STATUS
from worldlm_ray.records import NodeSummary, Record
from worldlm_ray.run_clock import Stamp, seconds
from worldlm_ray.storage import filesystem
from worldlm_ray.tracking import audit
from worldlm_ray.tracking.charts import Lines
from worldlm_ray.tracking.drawing import Drawing
from worldlm_ray.tracking.run_state import RunState
from worldlm_ray.tracking.run_texts import introduction
from worldlm_ray.tracking.sinks import OpenSink, RunFacts, Scalar, chosen_sinks
from worldlm_ray.tracking.status import read_status, replace_json

STATUS_EVERY_S = 1.0
"""Wall seconds between two writes of status.json."""
STATUS_SHARE = 0.05
"""Largest fraction of the time that writing status.json may take. In a very large world it is written less often."""


class Tracker:
    """Keeps the state of a run and writes its folder. One tracker owns a folder, and one actor the tracker.

    Args:
        run_dir: the run folder; made when missing, continued when it holds an earlier part of the run.
        kinds: `world`, `federation`, `client` or `remote` by the path of every node.
        hparams: settings for the HPARAMS tab, by dotted key.
        budget: what `progress` is measured against.
        texts: Markdown by tag for the TEXT page (`run_texts.introduction`).
        sinks: make the sinks, to which charts are drawn; those of a run that names none, unless given.
        clock: monotonic seconds; it only paces files.
        wall: seconds since 1970.

    Raises:
        RunError: `kinds` is not a tree.
        ConfigError: an installed package that names an entry point cannot be imported.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        kinds: Mapping[str, str],
        hparams: Mapping[str, Scalar],
        budget: BudgetConfig,
        texts: Mapping[str, str] | None = None,
        sinks: Sequence[OpenSink] | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.run_dir = run_dir
        self._clock, self._wall = clock, wall
        self._state = RunState(kinds, budget=budget)
        filesystem.make_folder(run_dir)
        try:
            status = read_status(run_dir)
        except RunError:
            status = {}  # A new run, or one that ended before its first status.
        self._state.restore(status, audit.read(run_dir))
        self._started_at: float = seconds(status.get("started_at")) or wall()
        self._lines = Lines(kinds)
        self._root = next(path for path in kinds if "/" not in path)
        facts = RunFacts(
            run_dir=run_dir,
            root=self._root,
            lines=self._lines,
            hparams=hparams,
            texts=texts or {},
            started_at=self._started_at,
            now_s=self._state.now_s,
            clock=clock,
        )
        chosen = chosen_sinks(TrackingConfig()) if sinks is None else sinks
        self._sinks = [open_sink(facts) for open_sink in chosen]
        self._drawing = Drawing(self._state, self._sinks, lines=self._lines, clock=clock)
        self._status_s = 0.0
        """Seconds that the last write of status.json took."""
        self._last_status = -math.inf
        self._trouble = self._warning = ""
        self.flush()

    def record(self, *records: Record) -> None:
        """Take in what happened.

        Raises:
            RunError: a record names a node that is not in the tree; nothing of the batch is taken in.
        """
        for record in records:
            self._state.check(record)
        for record in records:
            self._state.apply(record)
            self._drawing.show(record)
        self._drawing.draw_image_if_due()
        self._tell_failures()
        now = self._clock()
        if now - self._last_status >= max(STATUS_EVERY_S, self._status_s / STATUS_SHARE):
            self._write_status()
        for sink in self._sinks:
            sink.flush_if_due()

    def _tell_failures(self) -> None:
        """A sink that has failed is a warning of the run, once."""
        for sink in self._sinks:
            if sink.failure:
                self._state.warnings.add(self._root, sink.failure, now_s=self._state.now_s)

    def add(self, path: str, kind: str) -> None:
        """Add a node that has joined the tree during the run. A known node is unchanged."""
        if path not in self._state.nodes:
            self._state.add(path, kind)
            self._lines.add(path)

    def samples(self, texts: Mapping[str, str], *, now_s: float) -> None:
        """Show texts that the clients' models wrote; the step of each is the rounds of its client.

        Args:
            texts: by path of the client.
            now_s: run time in seconds.
        """
        self._drawing.samples(texts, now_s=now_s)

    def warn(self, warning: str) -> None:
        """Set the warning about the run's machines in `trouble` of the snapshot. An empty text removes it."""
        self._warning = warning
        self._write_status()

    def snapshot(self) -> dict[str, Any]:
        """Everything that is known, ready for JSON: totals of the run, `trouble` with its files, `nodes` by path."""
        return {
            "run": self.run_dir.name,
            "trouble": next(filter(None, (self._trouble, *(sink.trouble for sink in self._sinks))), self._warning),
            "started_at": self._started_at,
            "updated_at": self._wall(),
            "updated": asdict(Stamp.now()),
            **self._state.snapshot(),
        }

    @property
    def warnings(self) -> list[dict[str, Any]]:
        """Warnings for the operator: see `Warnings.kept`."""
        self._tell_failures()
        return list(self._state.warnings.kept)

    def summaries(self) -> dict[str, NodeSummary]:
        """One line per node for `write_summary`."""
        return self._state.summaries()

    def staleness(self) -> dict[str, float | None]:
        """Mean staleness of the updates that each node sent; None where it sent none."""
        return {path: node.tau_mean for path, node in self._state.nodes.items()}

    def flush(self) -> None:
        """Write everything that waits."""
        for sink in self._sinks:
            sink.flush()
        self._write_status()

    def close(self) -> None:
        """Draw what still waits, mark the run as ended in each sink, and close every file."""
        self._drawing.finish()
        for sink in self._sinks:
            sink.finish(now_s=self._state.now_s)
        self.flush()
        for sink in self._sinks:
            sink.close()

    def _write_status(self) -> None:
        began = self._clock()
        try:
            replace_json(self.run_dir / STATUS, self.snapshot())
            self._trouble = ""
        except OSError as error:
            self._trouble = f"cannot write {self.run_dir / STATUS}: {error}; it waits"
        self._last_status = self._clock()
        self._status_s = self._last_status - began


def open_tracker(plan: Plan) -> Tracker:
    """The tracker of a run, with the settings and the texts of its plan.

    Raises:
        OSError: the storage refused.
    """
    return Tracker(
        plan.run_dir,
        kinds=plan.kinds,
        hparams=plan.hparams(),
        budget=plan.config.budget,
        texts=introduction(plan),
        sinks=chosen_sinks(plan.config.tracking),
    )
