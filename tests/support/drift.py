"""A trainer without a model, for tests of what is around it: steps move the parameters by small, fixed amounts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from worldlm_ray.client.client import Client
from worldlm_ray.plan import rundir
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.tree import NodeSpec
from worldlm_ray.simulation.simulator import Simulation
from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.tracking.tracker import Tracker
from worldlm_ray.training.trainer import Batch, Proximal, RoundResult, Trainer


class Drift(Trainer):
    """Every step adds its learning rate to the parameters, with a sign for each client."""

    def __init__(self, size: int, sign: float) -> None:
        self.theta, self.sign, self.steps = np.zeros(size, np.float32), sign, 0

    def read(self, out: Flat | None = None) -> Flat:
        if out is None:
            return self.theta.copy()
        np.copyto(out, self.theta)
        return out

    def write(self, values: Flat) -> None:
        self.theta = np.array(values, np.float32)

    def run(
        self,
        batches: Iterable[Batch],
        rate: Callable[[int], float],
        *,
        first: int = 0,
        should_stop: Callable[[], bool] = lambda: False,
        proximal: Proximal | None = None,
    ) -> RoundResult:
        steps = 0
        for _ in batches:
            if should_stop():
                break
            self.theta += np.float32(self.sign * rate(steps))
            steps += 1
        self.steps += steps
        return RoundResult(steps=steps, tokens=steps, loss_sum=float(steps), train_s=1e-3, learning_rate=rate(0))

    def evaluate(self, batches: Iterable[Batch], *, parameters: Flat | None = None) -> tuple[float, int]:
        theta = self.theta if parameters is None else parameters
        return 1.0 + abs(float(theta.mean())), 1

    def sample(self, prompt: Any, *, tokens: int, temperature: float, seed: int) -> list[int]:
        return []

    def optimizer_state(self) -> dict[str, Flat]:
        return {"step": np.array([self.steps], np.float32)}

    def load_optimizer_state(self, saved: dict[str, Flat]) -> None:
        if saved:
            self.steps = int(saved["step"][0])

    def forget(self) -> None:
        self.steps = 0


def drifting(plan: Plan, spec: NodeSpec, **settings: Any) -> Client:
    """A client that drifts."""
    sign = 1.0 + plan.root.clients.index(spec)
    return Client(plan, spec, make_trainer=lambda _: Drift(plan.layout.size, sign), **settings)


def whole_run(plan: Plan, folder: Path, *, make_client: Any = drifting, **changes: Any) -> tuple[Simulation, list[Any]]:
    """A simulated run to its end in its own folder, with changes of its configuration; and its records."""
    plan = rundir.create(replace(plan, config=replace(plan.config, run_dir=str(folder), **changes)))
    tracker = Tracker(plan.run_dir, kinds=plan.kinds, hparams={}, budget=plan.config.budget)
    records: list[Any] = []
    simulation = Simulation(plan, tracker, on_record=records.append, make_client=make_client)
    try:
        assert simulation.run() == "finished"
        simulation.conclude("finished")
    finally:
        tracker.close()
    return simulation, records
