"""Reserves the CPUs and GPUs of the run's other clients, so that an elastic client's workers do not claim them.

Ray Train sizes a group of workers by what the machines have in all. It knows what other runs of Ray Train have asked
its coordinator for, and nothing of actors. Without this it would wait for ever for cores that the world's plain clients
hold. So these are reserved at the coordinator, too, before Ray Train asks for its workers.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray

from worldlm_ray.errors import WorldLMError
from worldlm_ray.launch.private.coordinator import Coordinator
from worldlm_ray.plan import rundir
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.tree import NodeSpec, parent_path, processes
from worldlm_ray.training.deepspeed_config import is_zero

RENEW_S = 30.0
FORGOTTEN_S = 180.0
"""What is not asked for again is given away after this time."""


def taken(root: NodeSpec) -> list[tuple[dict[str, float], dict[str, str]]]:
    """Resources and labels of every process that holds clients, but for those that Ray Train starts itself.

    Of a federation that begins before all of its clients are there, as many count as it waits for.
    """
    limits = {
        spec.path: spec.max_clients if spec.min_clients is None else spec.min_clients
        for spec in root.inner
        if spec.elastic
    }
    found, there = [], Counter[str]()
    for group in processes(root):
        first, parent = group[0], parent_path(group[0].path) or ""
        limit = limits.get(parent)
        if is_zero(first.settings) or (limit is not None and there[parent] >= limit):
            continue
        there[parent] += len(group)
        resources = first.settings.resources
        wanted = {"CPU": float(resources.cpus), "GPU": float(resources.gpus)}
        found.append(
            ({name: number for name, number in wanted.items() if number}, dict(first.settings.placement.labels))
        )
    return found


@contextmanager
def room_for_others(plan: Plan, namespace: str) -> Iterator[None]:
    """Keep what the world's other clients take out of Ray Train's count, while a run of it goes on.

    Args:
        plan: the run; who has joined or left since is read again from its folder.
        namespace: of the run, which all its clients with workers share.
    """
    coordinator, ended = Coordinator(), threading.Event()

    def reserve(root: NodeSpec) -> Any:
        return coordinator.reserve(f"{namespace}-others", taken(root), expire_after_s=FORGOTTEN_S)

    def renew() -> None:
        root = plan.root
        while not ended.wait(RENEW_S):
            with suppress(WorldLMError, OSError):  # the storage may be away
                root = rundir.renewed(plan).root
            reserve(root)

    ray.get(reserve(plan.root))
    threading.Thread(target=renew, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
