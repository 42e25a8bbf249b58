"""What a run needs on the machines of its cluster, looked at before anything starts: package, run folder, texts."""

from __future__ import annotations

import secrets
import time
from importlib.metadata import version
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from worldlm_ray.config.schema import DataConfig, ResourcesConfig
from worldlm_ray.data.text import check_sources, find_sources
from worldlm_ray.errors import ConfigError, RunError
from worldlm_ray.launch import cluster
from worldlm_ray.launch.calls import POLL_S, Observer
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.tree import NodeSpec
from worldlm_ray.storage import filesystem
from worldlm_ray.training.local import too_many_cores

ANSWER_S = 60.0
"""Within this time every machine must answer."""
PACKAGE = "worldlm_ray"


def check(plan: Plan, observer: Observer) -> None:
    """Have every machine look whether it has what the nodes that may be placed there need.

    A client needs its text on every machine that carries its labels and has room for it: it may be started again on any
    of them. All nodes need the run folder, the same everywhere.

    Args:
        plan: the run.
        observer: is warned of machines that have fewer cores than a client there asks for, whatever Ray was told.

    Raises:
        RunError: something is missing; a line for each.
        Interrupted: the user wants to leave.
    """
    machines = [machine for machine in ray.nodes() if machine["Alive"]]
    marker = plan.run_dir / f".seen-{secrets.token_hex(4)}"
    marker.write_text("")
    try:
        looks = {_look_on(machine, plan, marker): machine["NodeManagerHostname"] for machine in machines}
        there, absent = _wait(list(looks), observer)
        problems = [f"{looks[ref]}: does not answer; look at `ray status`" for ref in absent]
        for ref in there:
            missing, warning = _answer(ref)
            problems += [f"{looks[ref]}: {problem}" for problem in missing]
            if warning:
                observer.on_warning(f"{looks[ref]}: {warning}")
    finally:
        marker.unlink(missing_ok=True)
    if problems:
        raise RunError("\n".join(sorted(problems)))


def _wait(refs: list[Any], observer: Observer) -> tuple[list[Any], list[Any]]:
    """References whose answers have come within `ANSWER_S`, and the others."""
    deadline = time.monotonic() + ANSWER_S
    while True:
        there, absent = ray.wait(refs, num_returns=len(refs), timeout=POLL_S)
        if not absent or time.monotonic() > deadline:
            return there, absent
        observer.check()


def _look_on(machine: dict[str, Any], plan: Plan, marker: Any) -> Any:
    """Ask one machine; returns the reference of its answer."""
    clients = {c.key: (c.settings.data, c.settings.resources) for c in plan.root.clients if _may_hold(machine, c)}
    only_there = NodeAffinitySchedulingStrategy(machine["NodeID"], soft=False)
    task = ray.remote(_look).options(num_cpus=0, max_retries=0, scheduling_strategy=only_there)
    return task.remote(str(marker), clients, version(PACKAGE))


def _may_hold(machine: dict[str, Any], client: NodeSpec) -> bool:
    labelled = client.settings.placement.labels.items() <= machine.get("Labels", {}).items()
    return labelled and all(machine["Resources"].get(name, 0.0) >= n for name, n in cluster.each(client).items())


def _look(marker: str, clients: dict[str, tuple[DataConfig, ResourcesConfig]], wanted: str) -> tuple[list[str], str]:
    """What is missing on this machine, and a warning if it has too few cores."""
    problems = []
    try:
        place = filesystem.place(marker)
        with filesystem.refusals(place):
            if not place.is_file():
                problems.append(
                    f"does not see the run folder {place.parent}; put it on storage that all machines mount, or in an "
                    "object store (--run-dir)"
                )
    except (RunError, OSError) as error:
        problems.append(f"cannot use the run folder: {error}")
    if (found := version(PACKAGE)) != wanted:
        problems.append(f"has {PACKAGE} {found}, the run was started with {wanted}; install the same everywhere")
    for key, (data, _) in clients.items():
        try:
            find_sources(data, f"{key}.data")
        except ConfigError as error:
            problems.append(f"{error}, or set {key}.placement.labels to where it is")
            continue
        try:
            check_sources(data, f"{key}.data")
        except ConfigError as error:
            problems.append(str(error))
    return problems, too_many_cores({key: resources for key, (_, resources) in clients.items()})


def _answer(ref: Any) -> tuple[list[str], str]:
    try:
        missing, warning = ray.get(ref)
        return list(missing), str(warning)
    except Exception as error:  # noqa: BLE001 - whatever keeps a machine from looking keeps it from training
        missing = isinstance(getattr(error, "cause", error), ModuleNotFoundError) or "ModuleNotFoundError" in str(error)
        if missing:
            return [f"{PACKAGE} is not installed; install it on every machine"], ""
        return [f"cannot look: {cluster.first_line(error)}"], ""
