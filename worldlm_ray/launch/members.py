"""Clients that join, and nodes that leave, while a run goes on: the other nodes do not wait for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Container
from typing import Any

import ray
from ray.exceptions import RayTaskError

from actors.plans import to_send
from worldlm_ray.config.loading import save
from worldlm_ray.errors import RunError
from worldlm_ray.launch import cluster
from worldlm_ray.launch.calls import answer, ask, plain
from worldlm_ray.launch.create import World, find, take_in
from worldlm_ray.launch.pools import Member, actor_of
from worldlm_ray.launch.private.reservations import give_back, prefix
from worldlm_ray.plan import living, rundir
from worldlm_ray.plan.plan import Plan
from worldlm_ray.tracking.node_state import DIVERGED, FINISHED

STATUS_EVERY_S = 0.2
"""How often a user who waits for a new client looks at the status of the run."""
PLACED_S = 10.0
"""Seconds after which the user who waits for a client to be placed is told what it waits for."""
_NO_ROUND = {
    FINISHED: "has come too late: the budget of the run is spent; resume the run with a larger one",
    DIVERGED: "has diverged in its first round; let it leave, and join with a lower training.lr",
    "paused": "trains no round: the privacy budget of its text is spent; give it a higher privacy.target_epsilon",
}
"""Why a client that has joined pushes nothing, and what to do, by its state."""


def join(old: Plan, new: Plan, path: str, *, on_phase: Callable[[str], None] = lambda _: None) -> float:
    """Let a client join a living run, and wait until its first update is accepted.

    Args:
        old: the run as it is.
        new: the run with the client (see worldlm_ray.plan.membership).
        path: of the client.
        on_phase: told what is being waited for.

    Returns:
        Seconds from the call to the first accepted update.

    Raises:
        RunError: the run does not live, or there is no room for the client.
        WorldLMError: what keeps the client from starting; the run is as it was.
    """
    began = time.monotonic()
    with _living(old) as world:
        on_phase(f"starting {path}")
        sent, there_already = to_send(new), set(world.pools)
        actor = take_in(sent, new.node(path), world, begin=False, detached=True)
        try:
            there = actor.admit.remote(sent) if isinstance(actor, Member) else actor.process.remote()
            if not ray.wait([there], timeout=PLACED_S)[0]:  # an autoscaler may be about to make room
                on_phase(f"waiting for room for {path}: {cluster.wanted(new.node(path))}")
            answer(there)
            answer(actor.ready.remote())
        except BaseException as error:  # noqa: BLE001 - Ctrl-C, too: the run does not know of the client yet
            _dismiss(actor, path, world, there_already)
            raise plain(error) if isinstance(error, RayTaskError) else error from None
        save(new.config, new.run_dir / rundir.CONFIG)
        world.note(path)
        ask(world.recorder, "replan", sent)
        ask(actor, "start")
        on_phase("training its first round")
        while True:
            node = ask(world.recorder, "snapshot")["nodes"][path]
            if node["accepted"]:
                return time.monotonic() - began
            if why := _NO_ROUND.get(node["state"]):
                raise RunError(f"{path} {why}")
            time.sleep(STATUS_EVERY_S)


def _dismiss(actor: Any, path: str, world: World, there_already: Container[str]) -> None:
    """End what was started for a client that does not join after all."""
    if isinstance(actor, Member) and actor.pool.name in there_already:
        actor.dismiss.remote()
        return
    ray.kill(actor_of(actor))
    give_back(prefix(world.namespace, path))


def leave(
    old: Plan, new: Plan, path: str, *, forget: bool = False, on_phase: Callable[[str], None] = lambda _: None
) -> None:
    """Let a node and all that is below it leave a living run. What they have pushed stays unless `forget`.

    Args:
        old: the run as it is.
        new: the run without the node.
        path: of the node.
        forget: take what they have pushed out of the sums above; for runs with experts.
        on_phase: told what is being waited for.

    Raises:
        RunError: the run does not live.
        ConfigError: a client does not know all that it has pushed.
    """
    with _living(old) as world:
        gone = [spec.path for spec in old.node(path).clients if spec.path in world.clients]
        on_phase("waiting for the round that is under way")
        for client in gone:
            ask(world.clients[client], "leave", *([True] if forget else []))
        answer([world.clients[client].outcome.remote() for client in gone])
        living.leave_pools(new.run_dir, gone)
        save(new.config, new.run_dir / rundir.CONFIG)


def _living(plan: Plan) -> _Living:
    return _Living(plan)


class _Living:
    """A connection to the cluster of a living run."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._mine = plan, not ray.is_initialized()

    def __enter__(self) -> World:
        place = living.recall(self._plan.run_dir)
        missing = RunError(f"{self._plan.run_dir} is not running; start it with `worldlm train --resume`")
        if place is None:
            raise missing
        if self._mine:
            try:
                cluster.attach(place["address"])
            except RunError as error:
                raise RunError(f"{missing} ({error})") from error
        world = find(self._plan)
        if world is None:
            self.__exit__()
            raise missing
        return world

    def __exit__(self, *_: object) -> None:
        if self._mine:
            ray.shutdown()
