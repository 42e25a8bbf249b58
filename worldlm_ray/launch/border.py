"""The border of a run: the server for members in other clusters, or what stands for a parent in another one."""

from __future__ import annotations

import time
from importlib.util import find_spec
from typing import Any

import ray
from ray.exceptions import RayTaskError

from actors.plans import StoredPlan
from actors.shared import Address
from worldlm_ray.errors import ConfigError, MessageError, RunError
from worldlm_ray.launch import cluster
from worldlm_ray.launch.calls import POLL_S, Observer, ask, plain
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.tree import parent_path
from worldlm_ray.run_clock import RunClock

GATEWAY = "gateway"
"""Name of the gateway's actor in the run's namespace."""
NEEDED = ("aiohttp", "cryptography")
"""Packages of the extra `gateway`."""


def is_there(plan: Plan) -> bool:
    """Whether a run has a border."""
    return bool(plan.root.members) or plan.root.remote


def name_of(plan: Plan) -> list[str]:
    """Names of the actors of a run's border."""
    above = parent_path(plan.top.path)
    return [*([above] if above is not None else []), *([GATEWAY] if plan.root.members else [])]


def check_packages(plan: Plan) -> None:
    """Refuse a run with a border where a package for it is not installed.

    Raises:
        ConfigError: so it is.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing and is_there(plan):
        key = "joins" if plan.config.joins is not None else "gateway.listen"
        raise ConfigError(key, f"needs {' and '.join(missing)}", "run pip install 'worldlm_ray[gateway]'")


def create(plan: Plan, sent: Plan | StoredPlan, clock: RunClock, namespace: str, lifetime: dict[str, Any]) -> list[Any]:
    """Make the actors of a run's border, which live where the keys lie: on the head.

    Args:
        plan: the run.
        sent: the plan as actors are given it.
        clock: the run's.
        namespace: of the run.
        lifetime: Ray's option of all actors of the run.
    """
    check_packages(plan)
    if not is_there(plan):
        return []
    from actors.gateway import GatewayActor
    from actors.parent_proxy import ParentProxy

    options: dict[str, Any] = {"num_cpus": 0, "max_concurrency": 10_000, "max_restarts": -1, "namespace": namespace}
    options |= cluster.on_the_head() | lifetime
    found, top = [], plan.top.path
    above = parent_path(top)
    if above is not None:
        named = ray.remote(ParentProxy).options(name=above, **options)
        found.append(named.remote(Address(sent, top, clock, namespace)))
    if plan.root.members:
        named = ray.remote(GatewayActor).options(name=GATEWAY, **options)
        node = parent_path(plan.root.members[0].path)
        assert node is not None, "a member has a parent"
        found.append(named.remote(Address(sent, node, clock, namespace)))
    return found


def begin(plan: Plan, border: list[Any], observer: Observer) -> None:
    """Let members in, and see whether the parent in another cluster lets this run in.

    Args:
        plan: the run.
        border: its actors, as `create` gives them.
        observer: told where members are listened to, or why the parent cannot be reached.

    Raises:
        RunError: the parent refuses this run.
        GatewayError: the keys cannot be used, or the port is taken.
    """
    actors = dict(zip(name_of(plan), border, strict=True))
    for name, actor in actors.items():
        try:
            if name == GATEWAY:
                observer.ask(actor, "start")
                observer.on_phase(f"listening to members at {plan.config.gateway.listen}")
                continue
            away = observer.ask(actor, "greet")
        except RayTaskError as error:
            told = plain(error)
            if isinstance(told, MessageError):
                raise RunError(f"{name} does not let {plan.top.path} in: {told.detail}") from error
            raise told from error
        if away:
            observer.on_warning(f"the link to {name} is not open yet ({away}); the run begins without it")


def give_up_absent(plan: Plan, world: Any) -> None:
    """At the end a world need not wait for members that have never come.

    Args:
        plan: the run.
        world: handles of its inner nodes, by path.
    """
    for member in plan.root.members:
        parent = parent_path(member.path)
        ask(world[parent], "give_up_absent", member.name)


def linger(plan: Plan, border: list[Any], inner: dict[str, Any], observer: Observer) -> None:
    """Wait at the end for members that are away, so that they hear of it and get the last model; then listen no more.

    Args:
        plan: the run.
        border: its actors.
        inner: handles of its inner nodes, by path.
        observer: told who is waited for; may want to wait no more.
    """
    if not plan.root.members:
        return
    gateway, said = border[-1], ""
    until = time.monotonic() + 3_600.0 * plan.config.gateway.linger_h
    while time.monotonic() < until and not observer.should_stop():
        allowed = set(ask(gateway, "active"))
        away = [
            member.path
            for member in plan.root.members
            if member.path in allowed and ask(inner[parent_path(member.path) or ""], "has_yet_to_end", member.name)
        ]
        if not away:
            break
        if (text := ", ".join(away)) != said:
            said = text
            observer.on_phase(f"the run has ended; waiting for {text} to hear of it (Ctrl-C waits no more)")
        time.sleep(POLL_S)
    ask(gateway, "stop")
