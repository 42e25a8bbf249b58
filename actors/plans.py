"""A run's plan on its way to the actors: the launcher makes and checks it once, and every actor takes it as it is.

A plan of usual size travels with each call that makes an actor. Ray keeps the arguments of such a call with the
cluster, so that it can start the actor again after the launcher has ended. A plan of a very large world travels by
reference, once for all actors: its buffer belongs to the launcher, and the run's folder takes its place later.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from worldlm_ray.plan import rundir
from worldlm_ray.plan.plan import Plan

INLINE_BYTES = 65_536
"""Largest pickled plan that travels with a call: Ray keeps arguments of less than 100 KiB with the cluster."""


@dataclass(frozen=True)
class StoredPlan:
    """A plan in the object store."""

    refs: list[Any]
    """Its reference, in a list: Ray would fetch it before the call otherwise, and wait for one that is lost."""
    run_dir: str

    def read(self) -> Plan:
        """The plan, or that of the run's folder where the launcher has ended and its objects with it."""
        try:
            plan: Plan = ray.get(self.refs[0])
        except RayError:
            return rundir.reopen(self.run_dir, check_data=False)
        return plan


def to_send(plan: Plan) -> Plan | StoredPlan:
    """What the actors of a run are given: the plan, or where it is stored."""
    if len(pickle.dumps(plan)) <= INLINE_BYTES:
        return plan
    return StoredPlan([ray.put(plan)], str(plan.run_dir))


def received(sent: Plan | StoredPlan) -> Plan:
    """The plan that an actor was given."""
    return sent.read() if isinstance(sent, StoredPlan) else sent
