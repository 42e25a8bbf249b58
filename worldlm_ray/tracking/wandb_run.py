"""The tracker `wandb`: a run of Weights & Biases. It needs `pip install 'worldlm_ray[wandb]'`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from worldlm_ray.errors import RunError
from worldlm_ray.storage import filesystem
from worldlm_ray.tracking.sinks import RunFacts, Sink, sink


@sink("wandb", by_default=False)
class WandbRun(Sink):
    """A curve `NAME/NODE` for each quantity of each node, by run time in seconds. Source: docs.wandb.ai, wandb.init."""

    def __init__(self, run: RunFacts) -> None:
        try:
            import wandb
        except ImportError:
            raise RunError("the package wandb is not installed; pip install 'worldlm_ray[wandb]'") from None
        chosen = run.tracking.wandb
        is_online = chosen.mode == "online"
        if is_online and not wandb.api.api_key:  # wandb.init would ask on the terminal, in the middle of the run
            raise RunError("there is no key; run `wandb login`, or set tracking.wandb.mode=offline")
        self._wandb = wandb
        self._run: Any = wandb.init(
            project=chosen.project,
            entity=chosen.entity,
            mode=chosen.mode,
            name=run.run_dir.name,
            id=run.id,
            resume="allow" if is_online else None,
            dir=None if filesystem.is_remote(run.run_dir) else str(run.run_dir),
            config=dict(run.hparams),
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.define_metric("seconds")
        self._run.define_metric("*", step_metric="seconds")

    def scalars(self, node: str, kind: str, values: Mapping[str, float | None], *, now_s: float, tokens: int) -> None:
        """Add a point to curves of a node; values that are not finite are left out."""
        known = {name: value for name, value in values.items() if value is not None}
        found = {f"{name}/{node}": value for name, value in known.items() if math.isfinite(value)}
        if found:
            self._run.log({**found, f"tokens/{node}": tokens, "seconds": now_s})

    def histogram(self, node: str, name: str, counts: Mapping[int, int], *, step: int, now_s: float) -> None:
        """Show how often each whole number was seen."""
        if counts:
            low, high = min(counts), max(counts)
            seen = [counts.get(value, 0) for value in range(low, high + 1)]
            edges = [value - 0.5 for value in range(low, high + 2)]
            self._run.log({f"{name}/{node}": self._wandb.Histogram(np_histogram=(seen, edges)), "seconds": now_s})

    def close(self) -> None:
        """Mark the run as ended, and send what waits."""
        self._run.finish()
