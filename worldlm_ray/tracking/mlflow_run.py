"""The tracker `mlflow`: a run of an MLflow experiment. It needs `pip install 'worldlm_ray[mlflow]'`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from worldlm_ray.errors import RunError
from worldlm_ray.tracking.charts import clean
from worldlm_ray.tracking.sinks import RunFacts, Sink, sink

TAG = "worldlm_ray.run"
"""Tag that finds the run again when it is continued."""
BATCH = 1000
"""Values of one request, MLflow's limit."""
EVERY_S = 2.0
"""Seconds between two requests."""


@sink("mlflow", by_default=False)
class MlflowRun(Sink):
    """A metric `NAME/NODE` for each quantity of each node; its step is run time in whole seconds.

    Source: mlflow.org, MlflowClient.log_batch.
    """

    def __init__(self, run: RunFacts) -> None:
        try:
            from mlflow import MlflowClient
            from mlflow.entities import Metric
        except ImportError:
            raise RunError("the package mlflow is not installed; pip install 'worldlm_ray[mlflow]'") from None
        chosen = run.tracking.mlflow
        self._client: Any = MlflowClient(tracking_uri=chosen.uri)
        self._metric: Any = Metric
        self._started_at, self._clock = run.started_at, run.clock
        self._waiting = list[Any]()
        self._next = 0.0
        self._id: str = self._found(chosen.experiment, run)

    def _found(self, experiment: str, run: RunFacts) -> str:
        """Id of the run: the one that an earlier part of it has made, or a new one."""
        there = self._client.get_experiment_by_name(experiment)
        number = self._client.create_experiment(experiment) if there is None else there.experiment_id
        earlier = self._client.search_runs([number], filter_string=f"tags.`{TAG}` = '{run.id}'", max_results=1)
        if earlier:
            self._client.update_run(earlier[0].info.run_id, status="RUNNING")
            return str(earlier[0].info.run_id)
        tags = {TAG: run.id, "mlflow.note.content": run.texts.get("2 tree", "")}
        made = self._client.create_run(
            number, start_time=int(1000 * run.started_at), run_name=run.run_dir.name, tags=tags
        )
        for name, value in run.hparams.items():
            self._client.log_param(made.info.run_id, name, value)
        return str(made.info.run_id)

    def scalars(self, node: str, kind: str, values: Mapping[str, float | None], *, now_s: float, tokens: int) -> None:
        """Add a point to curves of a node; values that are not finite are left out."""
        at_ms = int(1000 * (self._started_at + now_s))
        for name, value in {**values, "tokens": tokens}.items():
            if value is not None and math.isfinite(value):
                self._waiting.append(self._metric(clean(f"{name}/{node}"), float(value), at_ms, int(now_s)))

    def flush_if_due(self) -> None:
        """Send the waiting points, if the last request was long enough ago."""
        if self._clock() >= self._next or len(self._waiting) >= BATCH:
            self.flush()

    def flush(self) -> None:
        """Send the waiting points."""
        while self._waiting:
            self._client.log_batch(self._id, metrics=self._waiting[:BATCH])
            del self._waiting[:BATCH]
        self._next = self._clock() + EVERY_S

    def close(self) -> None:
        """Mark the run as ended."""
        self.flush()
        self._client.set_terminated(self._id)
