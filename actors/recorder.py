"""The single writer of a run folder, as an actor: everybody sends records here."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from actors.plans import StoredPlan, received
from actors.shared import RECORDER, begin, end_process, once_storage_answers, was_restarted
from worldlm_ray.errors import RunError, SupersededError
from worldlm_ray.plan import rundir
from worldlm_ray.plan.plan import Plan
from worldlm_ray.records import Measure, Record
from worldlm_ray.reports.outcome import Sample, finish
from worldlm_ray.run_clock import Anchor, RunClock
from worldlm_ray.storage import checkpoint, filesystem
from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.tracking.tracker import STATUS_EVERY_S, STATUS_SHARE, Tracker, open_tracker

KEPT_RECORDS = 10_000
"""Records that wait for the process that watches the run: it takes them twice a second."""


class RecorderActor:
    """Owns the run's tracker. Like every node it has an incarnation, and what is left of an older one ends itself.

    Args:
        sent: the run's plan, or where it is stored.
        clock: the run's; None for one that begins now.
        namespace: of the run.
    """

    def __init__(self, sent: Plan | StoredPlan, clock: RunClock | None = None, namespace: str = "") -> None:
        self.plan = once_storage_answers(partial(received, sent), "the recorder")
        self.clock = clock or RunClock.starting()
        begin(self.plan, RECORDER, self.clock, namespace)
        self._place = checkpoint.folder(self.plan.run_dir, RECORDER)
        self._incarnation = 0
        self._opened: Tracker | None = None
        self._untaken: deque[Record] | None = None
        """Records since the last `take_records`; None until it is first called."""
        self._look_at = 0.0
        """When to see again whether there is a newer recorder."""
        if was_restarted():
            once_storage_answers(self.ready, "the recorder")

    def ready(self) -> bool:
        """Begin, unless it has: a recorder that was restarted has, once the storage let it.

        Raises:
            CheckpointError, RunError: the storage refuses.
        """
        _ = self.tracker
        return True

    @property
    def tracker(self) -> Tracker:
        """The run's tracker, opened when it is first wanted."""
        if self._opened is None:
            self._opened = self._open()
        return self._opened

    def _open(self) -> Tracker:
        self._incarnation = self._incarnation or checkpoint.claim(self._place)
        try:
            with filesystem.refusals(self._place):
                if was_restarted():  # nodes may have joined or left since it was made
                    self.plan = rundir.renewed(self.plan)
                return open_tracker(self.plan)
        except OSError as error:
            raise RunError(f"cannot write to {self.plan.run_dir}: {error}; free the storage") from error

    def process(self) -> int:
        """Id of this process."""
        return os.getpid()

    def run_time_s(self) -> float:
        """Run time now, for a process on another machine."""
        return self.clock.now_s()

    def anchor(self) -> Anchor:
        """The same for a process that has no clock yet."""
        return self.clock.anchor()

    def record(self, records: list[Record]) -> None:
        """Take in what happened."""
        tracker = self.tracker
        if time.monotonic() >= self._look_at:
            self._end_if_superseded()
        tracker.record(*records)
        if self._untaken is not None:
            self._untaken.extend(records)

    def take_records(self) -> list[Record]:
        """What has been recorded since the last call: at most the newest `KEPT_RECORDS`, and nothing at the first."""
        taken, self._untaken = self._untaken or (), deque(maxlen=KEPT_RECORDS)
        return list(taken)

    def _end_if_superseded(self) -> None:
        """Of two processes that both take themselves for the recorder, the older one must not write any more."""
        began = time.monotonic()
        try:
            with suppress(OSError), filesystem.refusals(self._place):
                checkpoint.check_newest(self._place, self._incarnation)
        except SupersededError as error:
            end_process(str(error))
        ended = time.monotonic()
        self._look_at = ended + max(STATUS_EVERY_S, (ended - began) / STATUS_SHARE)

    def replan(self, sent: Plan | StoredPlan) -> None:
        """Take over a changed tree: nodes have joined or left."""
        self.plan = received(sent)
        for path, kind in self.plan.kinds.items():
            self.tracker.add(path, kind)

    def warn(self, trouble: str) -> None:
        """Show what troubles the run in its files, until it is over (an empty text)."""
        self.tracker.warn(trouble)

    def snapshot(self) -> dict[str, Any]:
        """What is known now, ready for JSON."""
        return self.tracker.snapshot()

    def conclude(
        self,
        world: Flat,
        *,
        measures: Mapping[str, Measure],
        samples: Mapping[str, Sample],
        wall_s: float,
        status: str,
    ) -> dict[str, Any]:
        """Write summary.json, close every file, and return the summary."""
        tracker = self.tracker
        self._end_if_superseded()
        outcome = finish(
            self.plan,
            tracker,
            world=world,
            measures=measures,
            samples=samples,
            wall_s=wall_s,
            status=status,
            backend="ray",
        )
        tracker.close()
        return outcome.summary
