"""The single writer of a run folder, as an actor: everybody sends records here."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from actors.shared import RECORDER, STORAGE_AGAIN_S, end_process, was_restarted
from worldlm_ray import checkpoint, rundir, storage
from worldlm_ray.errors import SupersededError, WorldLMError
from worldlm_ray.outcome import finish
from worldlm_ray.params import Flat
from worldlm_ray.plan import plan_from_mapping
from worldlm_ray.records import Measure, Record
from worldlm_ray.tracking import STATUS_EVERY_S, Tracker


class RecorderActor:
    """Owns the run's tracker. Like every node it has an incarnation, and what is left of an older one ends itself.

    Args:
        mapping: the configuration as plain containers.

    Raises:
        CheckpointError: the storage refuses to begin. What has died while it refuses waits for it.
    """

    def __init__(self, mapping: dict[str, Any]) -> None:
        self.plan = plan_from_mapping(mapping)
        self._place = checkpoint.folder(self.plan.run_dir, RECORDER)
        self._looked_at = time.monotonic()
        while True:
            try:
                self._set_up()
                break
            except (OSError, WorldLMError) as error:
                if not was_restarted():
                    raise
                # A constructor that fails would be the end of the actor: Ray starts again only what has died.
                print(f"worldlm: the recorder cannot go on yet: {error}", file=sys.stderr, flush=True)
                time.sleep(STORAGE_AGAIN_S)

    def _set_up(self) -> None:
        self._incarnation = checkpoint.claim(self._place)
        if was_restarted():  # nodes may have joined or left since it was made
            self.plan = rundir.reopen(str(self.plan.run_dir), check_data=False)
        self.tracker = Tracker(
            self.plan.run_dir,
            kinds=self.plan.kinds,
            hparams=self.plan.hparams(),
            budget=self.plan.config.budget,
        )

    def ready(self) -> bool:
        """Whether the actor is up."""
        return True

    def process(self) -> int:
        """Id of this process."""
        return os.getpid()

    def record(self, records: list[Record]) -> None:
        """Take in what happened."""
        self._end_if_superseded()
        self.tracker.record(*records)

    def _end_if_superseded(self) -> None:
        """Of two processes that both take themselves for the recorder, the older one must not write any more."""
        if time.monotonic() - self._looked_at < STATUS_EVERY_S:
            return
        self._looked_at = time.monotonic()
        try:
            with suppress(OSError), storage.refusals(self._place):
                checkpoint.check_newest(self._place, self._incarnation)
        except SupersededError as error:
            end_process(str(error))

    def replan(self, mapping: dict[str, Any]) -> None:
        """Take over a changed tree: nodes have joined or left."""
        self.plan = plan_from_mapping(mapping)
        for path, kind in self.plan.kinds.items():
            self.tracker.add(path, kind)

    def snapshot(self) -> dict[str, Any]:
        """What is known now, ready for JSON."""
        return self.tracker.snapshot()

    def conclude(
        self,
        world: Flat,
        *,
        measures: Mapping[str, Measure],
        samples: Mapping[str, str],
        wall_s: float,
        status: str,
    ) -> dict[str, Any]:
        """Write summary.json, close every file, and return the summary."""
        outcome = finish(
            self.plan,
            self.tracker,
            world=world,
            measures=measures,
            samples=samples,
            wall_s=wall_s,
            status=status,
            shell="ray",
        )
        self.tracker.close()
        return outcome.summary
