"""Faults on purpose in real processes: any node is killed, nothing is lost and nothing applied twice."""

from __future__ import annotations

import random
import signal
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.killing import Killer, check
from support.worlds import client, crowd, two_levels

from worldlm_ray import launch
from worldlm_ray.plan import rundir
from worldlm_ray.plan.plan import Plan
from worldlm_ray.storage import checkpoint
from worldlm_ray.tracking.audit import proofs

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long]
Tiny = Callable[..., Plan]
ROUNDS = 8


def a_plan(
    tiny: Tiny, folder: Path, faults: list[str], children: list[dict[str, Any]] | None = None, **changes: Any
) -> Plan:
    """Two federations of two clients, unless other children are given; rounds take about a second each."""
    settings: dict[str, Any] = {
        "budget": {"rounds": ROUNDS},
        "training": {"local_steps": 4, "batch_size": 4, "step_delay_s": 0.25},
        "checkpoint": {"every_s": 3.0, "every_updates": 6},
        "liveness": {"heartbeat_s": 0.5},
        "faults": faults,
    }
    plan = tiny(children, **(settings | changes))
    return rundir.create(replace(plan, config=replace(plan.config, run_dir=str(folder))))


def run(tiny: Tiny, folder: Path, faults: list[str], **changes: Any) -> tuple[Plan, dict[str, Any]]:
    """A whole run of such a plan."""
    plan = a_plan(tiny, folder, faults, **changes)
    return plan, launch.train(plan).summary


@pytest.mark.parametrize(
    ("trigger", "overlap"), [("goal_achieved", False), ("goal_achieved", True), ("synchronous", False)]
)
def test_whoever_is_killed_nothing_is_lost(
    cluster: None, tiny: Tiny, tmp_path: Path, trigger: str, overlap: bool
) -> None:
    seldom = {"every_s": 60.0, "every_updates": 6}  # so that there is something to be undone
    rules: dict[str, Any] = {"aggregation": {"trigger": trigger}, "exchange": {"overlap": overlap}}
    plan = a_plan(tiny, tmp_path / "run", [], checkpoint=seldom, **rules)
    names = {10: "world", 14: "world/north", 18: "world/south/c", 24: "world", 28: "world/south"}
    summary = Killer(plan, [(accepted, 0.0, name) for accepted, name in names.items()]).train()
    found = check(plan, summary)
    assert sum(proof.again for proof in found) > 0, "no kill undid anything: the test tests nothing"


def test_links_fail_and_storage_refuses(cluster: None, tiny: Tiny, tmp_path: Path) -> None:
    faults = [
        "1s cut world/north for 4s",
        "2s drop world/south/c for 2s",
        "2s repeat world/south for 3s",
        "3s corrupt world/south/d for 2s",
        "3s delay world/north/a by 0.5s for 3s",
        "1s disk world for 5s",
        "4s disk world/north/b for 3s",
        "6s disk world/south for 4s",
        "8s kill world/south",
    ]
    plan, summary = run(tiny, tmp_path / "run", faults)
    check(plan, summary)


def two_kinds(folder: Path) -> list[dict[str, Any]]:
    """A federation whose clients share a process, and one with a client whose model two workers train."""
    sharded = client("sharded", folder, 5, training={"zero_stage": 2}, resources={"workers": 2})
    phones = [crowd("phone", folder, copies=3)]
    return [
        # They take turns: a round of all three takes as long as one of the others.
        {
            "federation": "north",
            "resources": {"clients_per_process": 3},
            "training": {"step_delay_s": 0.08},
            "children": phones,
        },
        {"federation": "south", "children": [sharded, client("d", folder, 4)]},
    ]


undisturbed: dict[str, list[tuple[float, float]]] = {}
"""Losses of undisturbed runs, by who their children are, once they have been measured."""


def spread(known: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Mean and standard deviation of every loss over runs."""
    return [(statistics.mean(values), statistics.stdev(values)) for values in zip(*known, strict=True)]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("name", "children"),
    [
        ("world", two_levels),
        ("world/north", two_levels),
        ("world/south/d", two_levels),
        ("recorder", two_levels),
        ("world/north/phone-2", two_kinds),
        ("world/south/sharded", two_kinds),
    ],
)
def test_at_any_moment(
    cluster: None,
    tiny: Tiny,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    name: str,
    children: Callable[[Path], list[dict[str, Any]]],
) -> None:
    """Every kind of actor killed at random moments: once each; as a soak, twenty times each in one run.

    The soak also asks whether the models are as good as those of undisturbed runs. Three seeds say how much undisturbed
    runs differ: a fourth of the same kind is at most three of their standard deviations worse. Clients that share a
    process or have workers take seconds to come back, while the others spend their budgets: their run is longer.
    """
    rng = random.Random(name)
    soak = request.config.getoption("--soak")
    often, rounds, longest_s = (1, ROUNDS, 2.5)
    if soak:
        often, rounds, longest_s = (20, 100, 2.5) if children is two_levels else (20, 300, 25.0)
    settings: dict[str, Any] = {"budget": {"rounds": rounds}}
    known = undisturbed.setdefault(children.__name__, [])
    for seed in range(len(known), 3 if soak else 0):
        plan = a_plan(tiny, tmp_path / f"undisturbed-{seed}", [], children(tmp_path), seed=seed, **settings)
        known.append(losses(launch.train(plan).summary))
        print(f"\nundisturbed (mean over the clients, world): {known[-1]}")
    plan = a_plan(tiny, tmp_path / "run", [], children(tmp_path), **settings)
    killer = Killer(plan, [(4, rng.uniform(0.1, longest_s), name) for _ in range(often)])
    summary = killer.train()
    check(plan, summary)
    if soak:
        again = sum(proof.again for proof in proofs(plan.run_dir))
        print(f"{name} killed {often} times, away for {sum(killer.away_s):.0f} of {summary['wall_s']:.0f} s:")
        print(f"{losses(summary)}; {again} updates undone and applied again, 0 lost, 0 twice")
        for loss, (mean, deviation) in zip(losses(summary), spread(known), strict=True):
            assert loss - mean <= 3.0 * deviation


@pytest.mark.timeout(300)
def test_who_is_waited_for_costs_time_and_nothing_else(
    cluster: None, tiny: Tiny, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Clients that share a process and a client with workers, killed in turn: once each; as a soak, twenty times.

    Everybody waits for them, so that all train as they would have. Not to the bit: a client that dies after its parent
    has taken its update, and before its own checkpoint is on disk, does not remember that round.
    """
    rng = random.Random(0)
    soak = request.config.getoption("--soak")
    often, rounds, longest_s = (20, 100, 8.0) if soak else (1, ROUNDS, 2.5)
    settings: dict[str, Any] = {
        "budget": {"rounds": rounds},
        "aggregation": {"trigger": "synchronous"},
        "checkpoint": {"every_s": 0.0, "every_updates": 6},
        "liveness": {"heartbeat_s": 0.5, "grace_s": 1e6},
    }
    known: list[tuple[float, float]] = []
    for seed in range(3 if soak else 1):
        plan = a_plan(tiny, tmp_path / f"undisturbed-{seed}", [], two_kinds(tmp_path), seed=seed, **settings)
        known.append(losses(launch.train(plan).summary))
    plan = a_plan(tiny, tmp_path / "run", [], two_kinds(tmp_path), **settings)
    names = ["world/north/phone-2", "world/south/sharded"] * often
    killer = Killer(plan, [(4, rng.uniform(0.1, longest_s), name) for name in names])
    summary = killer.train()
    check(plan, summary)
    print(f"\nundisturbed (mean over the clients, world): {known}; {killer.hit} kills: {losses(summary)}")
    if soak:
        for loss, (mean, deviation) in zip(losses(summary), spread(known), strict=True):
            assert loss - mean <= 3.0 * deviation
    assert losses(summary) == pytest.approx(known[0], rel=0.05)


def losses(summary: dict[str, Any]) -> tuple[float, float]:
    """The mean loss of the clients' own models, and the loss of the world's model."""
    nodes = summary["nodes"]
    return statistics.mean(node["loss"] for node in nodes.values() if node["kind"] == "client"), nodes["world"]["loss"]


def test_storage_that_is_taken_away_comes_back(
    cluster: None, tiny: Tiny, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Really taken away: where checkpoints and the audit trail are written there is a file for some seconds."""
    seconds, rounds = (30.0, ROUNDS + 40) if request.config.getoption("--soak") else (5.0, ROUNDS)
    plan = a_plan(tiny, tmp_path / "run", [], budget={"rounds": rounds})
    folders = [plan.run_dir / name for name in ("checkpoints", "audit")]
    looks: list[dict[str, Any]] = []

    def take_away() -> None:
        while not looks or looks[-1]["accepted"] < 4:
            time.sleep(0.1)
        for folder in folders:
            folder.rename(folder.with_suffix(".away"))
            folder.write_text("in the way", encoding="utf-8")
        time.sleep(seconds)
        for folder in folders:
            folder.unlink()
            folder.with_suffix(".away").rename(folder)

    thread = threading.Thread(target=take_away)
    thread.start()
    summary = launch.train(plan, on_progress=looks.append).summary
    thread.join()
    assert any(node["state"] == "warning" for look in looks for node in look["nodes"].values()), "no node warned"
    found = check(plan, summary)
    assert len(found) == 6
    for path in plan.kinds:
        warnings: list[str] = []
        loaded = checkpoint.load(checkpoint.folder(plan.run_dir, path), warn=warnings.append)
        assert loaded is not None
        assert warnings == [], path


@pytest.mark.parametrize(
    ("names", "children"),
    [
        (["world/north/a", "world"], two_levels),
        (["world/north/phone-2", "world/south/sharded"], two_kinds),
    ],
)
def test_sigterm_leaves_a_checkpoint(
    cluster: None, tiny: Tiny, tmp_path: Path, names: list[str], children: Callable[[Path], list[dict[str, Any]]]
) -> None:
    """As a machine that is reclaimed: every process of the run is told, and has some seconds."""
    seldom = {"every_s": 1e6, "every_updates": 10**6}
    plan = a_plan(tiny, tmp_path / "run", [], children(tmp_path), checkpoint=seldom)
    summary = Killer(plan, [(8, 0.0, name) for name in names], signal.SIGTERM).train()
    found = check(plan, summary)
    assert all(proof.again == 0 for proof in found if proof.node == "world"), "its last checkpoint knew everything"
    assert all(proof.refused == 0 for proof in found), "a client trained anew what it had sent before"


def test_sigterm_does_not_wait_for_siblings(cluster: None, tiny: Tiny, tmp_path: Path) -> None:
    """A client that waits for a slow sibling when its machine is reclaimed is elsewhere before that one is through."""
    slow = client("slow", tmp_path, 5, training={"step_delay_s": 5.0})
    children = [crowd("phone", tmp_path, copies=3), client("quick", tmp_path, 4), slow]
    plan = a_plan(tiny, tmp_path / "run", [], children, budget={"rounds": 2}, aggregation={"trigger": "synchronous"})
    killer = Killer(plan, [(4, 0.0, "world/phone-2"), (4, 0.0, "world/quick")], signal.SIGTERM)
    found = check(plan, killer.train())
    assert max(killer.away_s) < 10.0, "a round takes 20 s"
    assert all(proof.refused == 0 for proof in found)
