"""Two Ray clusters joined over a border: the same bits as in one, and nothing lost whatever is cut or killed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.two_clusters import Run, TwoClusters, whole_trail
from support.worlds import client, two_levels

from worldlm_ray.plan.plan import Plan
from worldlm_ray.reports.progress import TRAINING

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]
Tiny = Callable[..., Plan]


@pytest.fixture
def clusters(tmp_path: Path) -> Iterator[Callable[..., TwoClusters]]:
    made: list[TwoClusters] = []

    def make(**settings: Any) -> TwoClusters:
        made.append(TwoClusters(tmp_path, settings))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_a_synchronous_world_has_the_bits_that_it_has_in_one_cluster(
    cluster: None, clusters: Callable[..., TwoClusters], tmp_path: Path
) -> None:
    both = clusters(aggregation={"trigger": "synchronous"}, budget={"rounds": 3})
    north, south = two_levels(tmp_path)
    member = both.member("world/south", {"children": south["children"]})
    member.start()
    summary = Run(both.world({"children": [north, {"member": "south", "required": True}]})).end()
    theirs = member.wait()
    alone = Run(both.world({"children": [north, south]}, name="one", run_dir=str(tmp_path / "one"), gateway={})).end()
    assert summary["params_sha256"] == alone["params_sha256"]
    assert summary["nodes"]["world/south"]["accepted"] == 3
    assert theirs["nodes"]["world/south/c"]["steps"] == 3 * 4
    assert theirs["status"] == summary["status"] == "finished"
    whole_trail(tmp_path / "world")
    whole_trail(member.run_dir)


BUSY: dict[str, Any] = {
    "budget": {"rounds": 12},
    "training": {"local_steps": 4, "batch_size": 4, "step_delay_s": 0.1},
    "checkpoint": {"every_s": 2.0, "every_updates": 4},
    "aggregation": {"trigger": "synchronous"},
}


@pytest.mark.long
def test_whatever_is_cut_or_killed_nothing_is_lost(
    cluster: None, clusters: Callable[..., TwoClusters], tmp_path: Path
) -> None:
    both = clusters(**(BUSY | {"budget": {"rounds": 5_000}, "aggregation": {"buffer_size": 2}}))
    north, south = two_levels(tmp_path)
    member = both.member("world/south", {"children": south["children"]})
    member.start()
    run = Run(both.world({"children": [north, {"member": "south", "required": True}]}))

    def goes_on() -> None:
        before = run.accepted("world/south")
        run.until(lambda: run.accepted("world/south") >= before + 2)

    goes_on()
    both.line.cut(down=True)
    others = run.accepted("world/north")
    run.until(lambda: run.accepted("world/north") >= others + 2)  # the world goes on without the member
    both.line.cut(down=False)
    goes_on()
    for name in ("gateway", "world"):
        run.kill(name)
        goes_on()
    for name in ("world", "world/south"):  # the first is what stands for the world there
        member.kill_actor(name)
        goes_on()
    member.kill()
    run.stop()
    assert run.end()["status"] == "stopped"
    for folder in (tmp_path / "world", member.run_dir):
        whole_trail(folder)


@pytest.mark.long
def test_a_member_that_was_away_hears_that_the_world_has_ended(
    cluster: None, clusters: Callable[..., TwoClusters], tmp_path: Path
) -> None:
    both = clusters(**(BUSY | {"budget": {"tokens": 6_000}}))
    member = both.member("world/solo", client("solo", tmp_path, 3) | {"client": "world/solo"}, kind="client")
    member.start()
    solo = {"member": "solo", "required": True}
    tree = {"children": [client("a", tmp_path, 1), solo, {"member": "never"}]}
    run = Run(both.world(tree))
    run.until(lambda: run.accepted("world/solo") >= 1)
    both.line.cut(down=True)
    run.until(lambda: any("waiting for world/solo" in phase for phase in run.phases))
    both.line.cut(down=False)
    summary, theirs = run.end(), member.wait()
    assert theirs["status"] == summary["status"] == "finished"
    whole_trail(tmp_path / "world")


def test_a_member_with_another_budget_is_told_the_key(
    cluster: None, clusters: Callable[..., TwoClusters], tmp_path: Path
) -> None:
    both = clusters()
    north, south = two_levels(tmp_path)
    member = both.member("world/south", {"children": south["children"]}, budget={"rounds": 5})
    run = Run(both.world({"children": [north, {"member": "south", "required": True}]}))
    run.until(lambda: any("listening" in phase for phase in run.phases))
    member.start()
    assert member.process is not None
    assert member.process.wait(120.0) == 2
    told = "budget.rounds is '5' at world/south, and '2' in charter 1 of world: have it alike on both sides"
    assert told in " ".join(member.log().split())
    run.until(lambda: TRAINING in run.phases)  # the member may be told before the world's own clients have started
    run.stop()
    run.end()


@pytest.mark.long
def test_a_member_is_revoked_while_the_world_goes_on(
    cluster: None, clusters: Callable[..., TwoClusters], tmp_path: Path
) -> None:
    both = clusters(**BUSY)
    solo = client("solo", tmp_path, 3) | {"client": "world/solo"}
    member = both.member("world/solo", solo, kind="client")
    member.start()
    run = Run(both.world({"children": [client("a", tmp_path, 1), {"member": "solo", "required": True}]}))
    run.until(lambda: run.accepted("world/solo") >= 1)
    both.keys.revoke("world/solo")
    run.until(lambda: "revoked" in str(member.status().get("nodes", {}).get("world", {}).get("state_detail")))
    accepted = run.accepted("world/solo")
    summary = run.end()
    assert summary["status"] == "finished"
    assert summary["nodes"]["world/a"]["steps"] == 12 * 4
    assert summary["nodes"]["world/solo"]["accepted"] == accepted
