"""Processes of a run that are killed while it goes on, and what must hold afterwards."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import ray

from worldlm_ray import launch
from worldlm_ray.plan import living
from worldlm_ray.plan.plan import Plan
from worldlm_ray.storage import checkpoint
from worldlm_ray.tracking.audit import proofs


class Killer(threading.Thread):
    """Sends signals to actors' processes while a run goes on.

    Args:
        plan: the run.
        moments: the number of accepted updates from which on, seconds to wait then, and whose process.
        number: of the signal.
    """

    def __init__(self, plan: Plan, moments: list[tuple[int, float, str]], number: int = signal.SIGKILL) -> None:
        super().__init__(daemon=True)
        self.plan, self.moments, self.number = plan, moments, number
        self.accepted = -1
        self.hit = 0
        self.away_s: list[float] = []
        """How long the node was down, each time."""
        self.looks: list[dict[str, Any]] = []

    def look(self, snapshot: dict[str, Any]) -> None:
        self.looks.append(snapshot)
        self.accepted = snapshot["accepted"]

    def run(self) -> None:
        for accepted, wait_s, name in self.moments:
            while self.accepted < accepted:
                time.sleep(0.05)
            time.sleep(wait_s)
            process = self.process(name)
            if process is None:
                return
            os.kill(process, self.number)
            self.hit += 1
            began = time.monotonic()
            while self.process(name) == process:
                time.sleep(0.05)
            self.away_s.append(time.monotonic() - began)

    def process(self, name: str) -> int | None:
        """Where an actor lives, or a client that shares one; None once the run is over."""
        place = living.recall(self.plan.run_dir)
        if place is None:
            return None
        name = next((host for host, paths in place["pools"].items() if name in paths), name)
        while True:
            try:
                actor = ray.get_actor(name, namespace=place["namespace"])
                return int(ray.get(actor.process.remote()))
            except ray.exceptions.RayActorError:
                time.sleep(0.05)
            except ValueError:
                return None

    def train(self) -> dict[str, Any]:
        """The summary of the run, once everybody was killed."""
        self.start()
        summary = launch.train(self.plan, on_progress=self.look).summary
        self.join(timeout=10.0)
        assert self.hit == len(self.moments), f"the run ended after {self.hit} of {len(self.moments)} kills"
        return summary


def check(plan: Plan, summary: dict[str, Any]) -> list[Any]:
    """Every client has trained its budget, and every update is in its parent's model once, and so in the world's."""
    found = proofs(plan.run_dir)
    for proof in found:
        assert proof.holds, proof
    applied = {f"{proof.node}/{proof.sender}": len(proof.applied) for proof in found}
    for spec in plan.root.clients:
        steps = plan.config.budget.rounds * spec.settings.training.local_steps
        assert summary["nodes"][spec.path]["steps"] == steps, spec.path
        assert applied[spec.path] == plan.config.budget.rounds, spec.path
    assert summary["status"] == "finished"
    loaded = checkpoint.load(checkpoint.folder(plan.run_dir, "world"))
    assert loaded is not None
    assert loaded[0]["published"]["tokens"] == sum(summary["nodes"][spec.path]["tokens"] for spec in plan.root.clients)
    return found
