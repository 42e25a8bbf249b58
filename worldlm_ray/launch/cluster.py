"""The Ray cluster that a run lives in: connect to one or start one, and see whether it can hold the world."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from worldlm_ray.errors import RunError, WorldLMError
from worldlm_ray.launch import reach
from worldlm_ray.launch.private import session
from worldlm_ray.plan import tree
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.tree import NodeSpec

OBJECT_STORE_FLOOR_BYTES = 512 * 1024**2
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
SPARE_CPUS = 256
"""Cores, by name only, that a local cluster has for clients that join later."""
HEAD = "node:__internal_head__"
"""A resource that Ray gives to the head alone."""
CURE = "Ray's logs say more; mend the cause and try again"
"""For what Ray says of a process that failed."""


@contextmanager
def connected(plan: Plan, address: str | None, should_stop: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Connect to Ray, or start a local one and stop it afterwards.

    A process that is connected already keeps its connection, whatever `address` says.

    Raises:
        RunError: no cluster answers at the address, or it cannot hold the world.
        Interrupted: `should_stop` said so while connecting.
    """
    if ray.is_initialized():
        check_fits(plan)
        yield
        return
    with warnings.catch_warnings():
        # Ray announces changes of its defaults at every start; they do not concern a user of this package.
        warnings.simplefilter("ignore", FutureWarning)
        try:
            if address is None:
                # Clients may outnumber the cores: they share them, as threads of one process would. More may join.
                firsts = [together[0] for together in tree.processes(plan.root)]
                cpus = SPARE_CPUS + sum(workers(spec) * each(spec)["CPU"] for spec in firsts)
                nodes = len(plan.specs) + sum(workers(spec) for spec in plan.root.clients)
                processes = len(plan.root.inner) + sum(1 + workers(spec) for spec in firsts)
                store = max(OBJECT_STORE_FLOOR_BYTES, 3 * nodes * plan.layout.nbytes)
                # Ray prints a warning when it starts more processes than the machine has cores. Here they are wanted.
                tuned = {"worker_maximum_startup_concurrency": max(os.cpu_count() or 1, processes)}
                with session.starting():
                    ray.init(
                        "local",
                        num_cpus=cpus,
                        object_store_memory=store,
                        include_dashboard=False,
                        _system_config=tuned,
                        **QUIET,
                    )
            else:
                attach(address, should_stop)
        except WorldLMError:
            raise
        except Exception as error:
            raise RunError(
                f"cannot start Ray on this machine: {first_line(error)}; mend that, or give the --address of a cluster"
            ) from error
    try:
        check_fits(plan)
        with session.silent():
            yield
    finally:
        ray.shutdown()


def attach(address: str, should_stop: Callable[[], bool] = lambda: False) -> None:
    """Connect to a cluster that runs.

    Raises:
        Unreachable: there is none.
        Interrupted: `should_stop` said so meanwhile.
    """
    found = reach.reach(address, should_stop)
    try:
        with session.starting():
            ray.init(found, **QUIET)
    except Exception as error:
        raise reach.explain(address, error) from error


def workers(spec: NodeSpec) -> int:
    """Processes that train a client's model, at most."""
    return spec.settings.resources.worker_range[1]


def each(spec: NodeSpec) -> dict[str, float]:
    """What each of them reserves, by Ray's names."""
    resources = spec.settings.resources
    return {"CPU": resources.cpus, "GPU": resources.gpus}


def on_the_head() -> dict[str, Any]:
    """Options of an actor that lives on the head, or anywhere else once that is gone.

    It asks for a byte: those that ask for nothing Ray 2.60 places by chance, whatever node they would rather be on.
    """
    heads = [node["NodeID"] for node in ray.nodes() if node["Alive"] and HEAD in node["Resources"]]
    return {"memory": 1, "scheduling_strategy": NodeAffinitySchedulingStrategy(heads[0], soft=True)} if heads else {}


def _needed(inner: NodeSpec) -> list[NodeSpec]:
    """Clients directly below that the run waits for before it begins."""
    clients = [child for child in inner.children if child.kind == "client"][: inner.max_clients]
    return clients[: inner.min_clients] if inner.elastic else clients


def check_fits(plan: Plan) -> None:
    """A label that no node carries, or more than the cluster has, would make Ray wait for ever without a word.

    Raises:
        RunError: a client does not fit even if it were alone, or all of them do not fit together.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    needed = [spec for node in plan.root.parents for spec in (node, *_needed(node)) if not spec.remote]
    for spec in needed:
        labels = spec.settings.placement.labels
        labelled = [node for node in nodes if labels.items() <= node.get("Labels", {}).items()]
        if not labelled:
            wanted = ", ".join(f"{key}={value}" for key, value in labels.items())
            cure = "start one that does, or change the labels"
            raise RunError(f"{spec.key}.placement.labels: no node of the cluster carries {wanted}; {cure}")
        if spec.kind != "client":
            continue
        least, wants = spec.settings.resources.worker_range[0], {k: v for k, v in each(spec).items() if v}
        room = sum(
            min(int(node["Resources"].get(name, 0.0) / amount) for name, amount in wants.items()) for node in labelled
        )
        if room < least:
            raise RunError(
                f"{spec.key}.resources: wants {least} workers with {_text(wants)} each, the cluster can hold {room}; "
                "add nodes, or lower resources.workers, cpus or gpus"
            )
    for name in ("CPU", "GPU"):
        has = sum(node["Resources"].get(name, 0.0) for node in nodes)
        there = {spec.path for spec in needed}
        clients = [together[0] for together in tree.processes(plan.root) if together[0].path in there]
        wanted_of_all = sum(s.settings.resources.worker_range[0] * each(s)[name] for s in clients)
        if has < wanted_of_all:
            all_of_them = _text({name: wanted_of_all})
            raise RunError(
                f"the clients want {all_of_them} together, the cluster has {has:g}; "
                f"add nodes or lower resources.{name.lower()}s"
            )


def wanted(spec: NodeSpec) -> str:
    """What a client wants, and what is free now, in words."""
    labels = "".join(f", {key}={value}" for key, value in spec.settings.placement.labels.items())
    free = ray.available_resources()
    wants = {name: amount * spec.settings.resources.worker_range[0] for name, amount in each(spec).items() if amount}
    return f"it wants {_text(wants)}{labels}; free now: {_text({name: free.get(name, 0.0) for name in wants})}"


def _text(amounts: dict[str, float]) -> str:
    names = {"CPU": "core", "GPU": "GPU"}
    return " and ".join(f"{amount:g} {names[name]}{'' if amount == 1 else 's'}" for name, amount in amounts.items())


def first_line(error: BaseException) -> str:
    """An error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
