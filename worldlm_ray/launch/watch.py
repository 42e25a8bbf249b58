"""Watches a run whose nodes have begun, until it is over."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError

from actors.plans import to_send
from worldlm_ray.launch import border
from worldlm_ray.launch.calls import POLL_S, Observer, ask
from worldlm_ray.launch.create import World, find_newcomer, take_in
from worldlm_ray.launch.pools import Member
from worldlm_ray.plan.faults import Fault
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.tree import NodeSpec
from worldlm_ray.storage.paths import pasted

ABSENT_S = 15.0
"""A node that has not answered within this time when the run is to stop has no machine."""
SILENT_S = 60.0
"""The user is told once the recorder has not answered for so long."""
SNAPSHOT_S = 5.0
"""A recorder that has not answered within this time is asked again at the next look."""


def tell_records(world: World, observer: Observer) -> None:
    """Hand on what the recorder has heard since the last call, if the observer wants it.

    Raises:
        RayError: the recorder does not answer.
    """
    if observer.on_record is not None:
        for record in ray.get(world.recorder.take_records.remote(), timeout=SNAPSHOT_S):
            observer.on_record(record)


class Watch:
    """Waits for the clients of a run and then for its world. Clients may join and leave meanwhile.

    Args:
        plan: the run.
        world: its actors; clients that join are added, those that leave are taken out.
        begun: paths of the nodes that have begun.
        observer: is told of the progress; may want to stop.
    """

    def __init__(self, plan: Plan, world: World, begun: Sequence[str], observer: Observer) -> None:
        self._plan, self._world, self._observer = plan, world, observer
        self._waiting = {actor.outcome.remote(): path for path, actor in world.clients.items()}
        """Clients that have not ended, by the reference of their outcome."""
        self._ends = {actor.ended.remote(): path for path, actor in world.inner.items()}
        """Inner nodes that have not ended, by the reference of their end."""
        self._begun, self._results = set(begun), dict[str, str]()
        # A client that was to come before this process looked is there, or has come and gone.
        self._joined = {fault for fault in plan.faults.all if fault.kind == "join" and fault.at_s <= world.began_s}
        """Joins of the fault script that have been carried out."""
        self._given_up = set[str]()
        """Clients that never came."""
        self._answers, self._asked_at = dict[str, Any](), 0.0
        """Signs that clients that are to stop have a process, and when they were asked for."""
        self._heard_at, self._is_silent = time.monotonic(), False

    def until_over(self) -> str:
        """Watch until the run is over.

        Returns:
            `finished` or `stopped`.

        Raises:
            RayError: an inner node failed.
        """
        while True:
            self._take_results()
            self._look()
            if not self._given_up:
                self._let_latecomers_in()
            self._say_if_silent()
            if self._observer.should_stop() and self._has_stopped():
                return "stopped"
            if (status := self._status()) is not None:
                return status

    def _take_results(self) -> None:
        """Take the ends of clients and inner nodes that have come, waiting a moment for them."""
        every = [*self._waiting, *self._ends]
        ready, _ = ray.wait(every, num_returns=len(every), timeout=POLL_S)
        for ref in ready:
            if ref in self._waiting:
                path = self._waiting.pop(ref)
                self._results[path] = ray.get(ref)
                if self._results[path] == "left":
                    self._replace(path)
                continue
            path = self._ends.pop(ref)
            try:
                ray.get(ref)  # raises what broke an inner node
            except ActorUnavailableError:  # Ray starts it again, and it goes on without being told to
                self._ends[self._world.inner[path].ended.remote()] = path

    def _look(self) -> None:
        """Ask the recorder how far the run is."""
        with suppress(GetTimeoutError, ActorUnavailableError):
            snapshot = ray.get(self._world.recorder.snapshot.remote(), timeout=SNAPSHOT_S)
            self._heard_at, self._is_silent = time.monotonic(), False
            tell_records(self._world, self._observer)
            self._observer.on_progress(snapshot)
            self._begun |= {
                path for path, node in snapshot["nodes"].items() if node["state"] != "waiting" or node["steps"]
            }
            self._find_newcomers(snapshot)

    def _say_if_silent(self) -> None:
        if time.monotonic() - self._heard_at > SILENT_S and not self._is_silent:
            self._is_silent = True
            self._observer.on_phase(f"nothing was heard of the run for {SILENT_S:.0f} s: {self._advice()}")

    def _advice(self) -> str:
        if self._world.local:
            return "still waiting"
        folder = pasted(self._plan.run_dir)
        return f"if its cluster lives, it goes on; leave (Ctrl-C twice), and come back with --resume {folder}"

    # ---- the end -----------------------------------------------------------------------------------------------

    def _has_stopped(self) -> bool:
        """Tell the clients to stop; returns whether none is left that can."""
        if self._plan.root.members and not self._waiting:  # those that train still are in other clusters
            return True
        if not self._answers:
            self._asked_at = time.monotonic()
            self._answers = {path: self._world.clients[path].process.remote() for path in self._waiting.values()}
        # At every look: a client that has been restarted since would not know.
        for path in self._begun & set(self._world.clients):
            self._world.clients[path].stop.remote()
        if time.monotonic() - self._asked_at <= ABSENT_S:
            return False
        # Without a machine, it cannot stop any more than it is: its checkpoint is on disk.
        lost = {path for path, answer in self._answers.items() if not ray.wait([answer], timeout=0.0)[0]}
        self._waiting = {ref: path for ref, path in self._waiting.items() if path not in lost}
        return not self._waiting

    def _status(self) -> str | None:
        """How the run has ended; None if it goes on."""
        absent = {ref: path for ref, path in self._waiting.items() if path not in self._begun}
        clients = {spec.path for spec in self._plan.root.clients}
        late = clients - set(self._world.clients) - set(self._results) - self._given_up
        if len(absent) < len(self._waiting) or (not self._results and (absent or late)):
            return None
        # All others have ended. There never was room for these, or it was not their time yet.
        self._waiting = {}
        for path in [*absent.values(), *late]:
            self._give_up(path)
        if "stopped" in self._results.values():
            return "stopped"
        if self._plan.top.path in self._ends.values():
            border.give_up_absent(self._plan, self._world.inner)
            return None
        # A client that was given up as silent may have come back since the inner nodes said that all had ended.
        self._ends = {actor.ended.remote(): path for path, actor in self._world.inner.items()}
        ray.wait(list(self._ends), num_returns=len(self._ends), timeout=ABSENT_S)
        return "finished"

    def _give_up(self, path: str) -> None:
        """A client that has never come: its parent need not wait for it any more."""
        self._given_up.add(path)
        if path in self._world.clients:
            self._world.take_out(path)
            self._world.end_unused()
        parent, _, name = path.rpartition("/")
        ask(self._world.inner[parent], "give_up", name)

    # ---- clients come and go -----------------------------------------------------------------------------------

    def _find_newcomers(self, snapshot: dict[str, Any]) -> None:
        """Wait for clients, too, that have joined since the last look."""
        for path, node in snapshot["nodes"].items():
            known = path in self._world.clients or path in self._results
            if node["kind"] == "client" and not known and node["state"] != "waiting":
                with suppress(ValueError):
                    self._waiting[find_newcomer(path, self._world).outcome.remote()] = path

    def _replace(self, path: str) -> None:
        """A client has left: its actor goes. Where a federation has more clients than places, the next one comes."""
        self._world.take_out(path)
        self._start_next(self._plan.node(path.rsplit("/", 1)[0]))
        self._world.end_unused()

    def _start_next(self, parent: NodeSpec) -> None:
        for spec in parent.children if parent.max_clients is not None else ():
            is_known = spec.path in self._world.clients or spec.path in self._results
            if spec.kind == "client" and not is_known and self._is_member(spec.path):
                self._start(spec)
                return

    def _let_latecomers_in(self) -> None:
        """Start clients that the fault script lets come by now, as far as there are places."""
        now_s = self._world.clock.now_s() if self._plan.faults else 0.0
        for fault in self._plan.faults.all:
            if self._is_due(fault, now_s) and self._has_place(fault.node):
                with suppress(ValueError):  # its last actor still has the name: at the next look, then
                    self._start(self._plan.node(fault.node))
                    joins = self._plan.faults.of(fault.node, kind="join")
                    self._joined.update(join for join in joins if join.at_s <= now_s)
                    self._results.pop(fault.node, None)

    def _is_due(self, fault: Fault, now_s: float) -> bool:
        """Whether a fault lets a client come that is not there. One that has not gone yet goes first, or stays."""
        is_due = fault.kind == "join" and fault.at_s <= now_s and fault not in self._joined
        is_absent = fault.node not in self._world.clients
        return is_due and is_absent and self._plan.faults.is_member(fault.node, now_s)

    def _is_member(self, path: str) -> bool:
        return self._plan.faults.is_member(path, self._world.clock.now_s())

    def _has_place(self, path: str) -> bool:
        """Whether the federation of a client has a place for it."""
        parent = self._plan.node(path.rsplit("/", 1)[0])
        there = sum(spec.kind == "client" and spec.path in self._world.clients for spec in parent.children)
        return parent.max_clients is None or there < parent.max_clients

    def _start(self, spec: NodeSpec) -> None:
        """Let a client come while the run goes on, and wait for it, too."""
        client = take_in(to_send(self._plan), spec, self._world, begin=True)
        self._world.note(spec.path)
        ref = client.live.remote(to_send(self._plan)) if isinstance(client, Member) else client.outcome.remote()
        self._waiting[ref] = spec.path
