"""The single writer of a run folder, as an actor: everybody sends records here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from actors.shared import was_restarted
from worldlm_ray import rundir
from worldlm_ray.outcome import finish
from worldlm_ray.params import Flat
from worldlm_ray.plan import plan_from_mapping
from worldlm_ray.records import Measure, Record
from worldlm_ray.tracking import Tracker


class RecorderActor:
    """Owns the run's tracker.

    Args:
        mapping: the configuration as plain containers.
    """

    def __init__(self, mapping: dict[str, Any]) -> None:
        self.plan = plan_from_mapping(mapping)
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
        self.tracker.record(*records)

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
