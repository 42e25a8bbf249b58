"""What all actors share: the run's clock, settled, and messages whose buffers travel by reference."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError

from actors.plans import StoredPlan, received
from worldlm_ray.errors import CheckpointError, WorldLMError
from worldlm_ray.plan import kept, rundir
from worldlm_ray.plan.faults import Faults
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.tree import parent_path
from worldlm_ray.records import LifeRecord
from worldlm_ray.run_clock import RunClock
from worldlm_ray.storage import checkpoint
from worldlm_ray.storage.checkpoint import STORAGE_AGAIN_S
from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.tracking import log_lines

RECORDER = "recorder"
"""Name of the recorder's actor in the run's namespace."""

ARRIVAL_S = 10.0
"""How long a client that is told to stop still tries to have its last update arrive."""
PEER_S = 5.0
"""How long a process of the run may take to say what its run time is, before another one is asked."""
SHUTDOWN_S = 20.0
"""Time to end what is under way and to write a checkpoint after SIGTERM."""

T = TypeVar("T")

Carried = tuple[bytes, list[Any]]
"""A message between actors: its header, and a list with the object reference of its buffer.

The reference is wrapped in a list because Ray would otherwise fetch it before the call and count it as an
argument; inside a list it arrives as a reference, and the receiver maps the buffer when it wants it.
"""


@dataclass(frozen=True)
class Address:
    """How an actor is told which part of the run it plays."""

    sent: Plan | StoredPlan
    """The run's plan, or where it is stored: see `plan`."""
    path: str
    clock: RunClock
    namespace: str
    """Ray namespace of the run, in which every actor is named by its path."""
    begin: bool = False
    """Whether the actor begins by itself as soon as there is room for it: the run goes on already."""

    @property
    def plan(self) -> Plan:
        """The run's plan."""
        return once_storage_answers(partial(received, self.sent), self.path)

    def plan_and_kept_files(self) -> Plan:
        """The plan, for an actor that encodes text: the run's copy of its tokenizer is what it was.

        Raises:
            RunError: the copy is missing or has changed, in an actor that Ray has not started again.
        """
        plan = self.plan
        once_storage_answers(partial(kept.check, plan.config), self.path)
        return plan

    def logged_plan(self, part: str) -> Plan:
        """The plan, for a process beside the node's: its log lines have the path and the name of this part."""
        plan = self.plan
        log_lines.of_node(plan, f"{self.path}/{part}")
        return plan

    @property
    def recorder(self) -> Any:
        """Handle of the run's recorder."""
        return ray.get_actor(RECORDER, namespace=self.namespace)

    @property
    def parent(self) -> Any:
        """Handle of the parent's actor."""
        return self.node(parent_path(self.path))

    def node(self, path: str | None) -> Any:
        """Handle of another node's actor.

        Raises:
            ValueError: there is no such actor.
        """
        return ray.get_actor(path, namespace=self.namespace)

    def tell(self, path: str, event: str, detail: str) -> None:
        """Have the run's files say what has happened to a node."""
        self.recorder.record.remote([LifeRecord(node=path, now_s=self.clock.now_s(), event=event, detail=detail)])

    def warn(self, path: str, text: str) -> None:
        """Have the run's files and its operator's terminal say what a node meets."""
        self.tell(path, "warning", text)


def begin(plan: Plan, path: str, clock: RunClock, namespace: str) -> RunClock:
    """Begin as a process of a run: its log lines have its path, and it tells the same run time as the others."""
    log_lines.of_node(plan, path)
    return settle(clock, namespace, path, plan.run_dir)


def settle(clock: RunClock, namespace: str, path: str, run_dir: Path) -> RunClock:
    """Have a process tell the same run time as the others; exactly, or within half a round trip to another machine.

    Args:
        clock: as it came with the process's address.
        namespace: of the run.
        path: of the actor; the recorder is asked first, then its parent, then the world.
        run_dir: holds the run time that is known if none of them answers.
    """
    peers = [name for name in dict.fromkeys((RECORDER, parent_path(path), "world")) if name and name != path]
    clock.settle(
        [partial(_run_time_of, name, namespace) for name in peers], known_s=partial(rundir.run_time_s, run_dir)
    )
    return clock


def _run_time_of(name: str, namespace: str) -> float | None:
    try:
        told: float = ray.get(ray.get_actor(name, namespace=namespace).run_time_s.remote(), timeout=PEER_S)
    except (RayError, ValueError):  # ValueError: there is no actor of that name (yet)
        return None
    return told


def was_restarted() -> bool:
    """Whether Ray has started this actor again after a death: no call will tell it to begin."""
    return bool(ray.get_runtime_context().was_current_actor_reconstructed)


def once_storage_answers(read: Callable[[], T], name: str) -> T:
    """Do what an actor's constructor needs storage for. After a death, wait for the storage if need be.

    Ray gives an actor up for good if its constructor raises, however often the actor may be started again.

    Args:
        read: is called until it succeeds; what it raises is said once for each text.
        name: of the actor, for the message.

    Raises:
        OSError, WorldLMError: what `read` raised, in an actor that Ray has not started again.
    """
    said = ""
    while True:
        try:
            return read()
        except (OSError, WorldLMError) as error:
            if not was_restarted():
                raise
            if str(error) != said:
                said = str(error)
                print(f"worldlm: {name} cannot go on yet: {said}", file=sys.stderr, flush=True)
        time.sleep(STORAGE_AGAIN_S)


def end_process(why: str) -> None:
    """End a leftover: another process plays this actor by now, and whatever this one does is wrong."""
    print(f"worldlm: {why}", file=sys.stderr, flush=True)
    os._exit(1)


def beside(work: Callable[[], T]) -> Future[T]:
    """Do something in a thread beside. Not one of an executor, which a process that ends would wait for."""
    future: Future[T] = Future()

    def perform() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - a boundary: the caller that asks for the result gets it
            future.set_exception(error)

    threading.Thread(target=perform, daemon=True).start()
    return future


def schedule_kills(faults: Faults, path: str, clock: RunClock) -> None:
    """Let this process die at the times at which a fault script says so."""
    for fault in faults.of(path, kind="kill"):
        left_s = fault.at_s - clock.now_s()
        if left_s > 0:
            timer = threading.Timer(left_s, os.kill, (os.getpid(), signal.SIGKILL))
            timer.daemon = True
            timer.start()


def write_checkpoint(
    plan: Plan,
    path: str,
    meta: dict[str, Any],
    arrays: dict[str, Flat],
    *,
    incarnation: int,
    clock: RunClock,
    **options: Any,
) -> None:
    """Write a checkpoint of a node, with the run time; options are those of `checkpoint.save`.

    Raises:
        CheckpointError: the storage refuses, by itself or because a fault script says so.
        SupersededError: another process plays this node by now.
    """
    place = checkpoint.folder(plan.run_dir, path)
    now_s = clock.now_s()
    if plan.faults.now(path, "disk", now_s):
        raise CheckpointError(f"{place}: the storage refuses on purpose; take that out of the faults")
    meta = meta | {"now_s": now_s}
    checkpoint.save(place, meta, arrays, incarnation=incarnation, keep=plan.config.checkpoint.keep, **options)
