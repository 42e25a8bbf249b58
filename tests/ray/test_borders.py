"""Two Ray clusters joined over a border: the same bits as in one, and nothing lost whatever is cut or killed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from support.gateway import make_world
from support.two_clusters import Run, TwoClusters, free_port, whole_trail
from support.worlds import client, two_levels

from worldlm_ray.plan.plan import Plan
from worldlm_ray.reports import receipts
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


@pytest.mark.long
def test_a_member_has_a_member_in_turn(cluster: None, clusters: Callable[..., TwoClusters], tmp_path: Path) -> None:
    """All three runs live in one Ray cluster, which starts once, and find each other over two borders alone."""
    all_ = clusters(aggregation={"trigger": "synchronous"})
    port = free_port()
    keys = make_world(tmp_path / "europe-gateway", port=port)
    gateway = {"listen": f"127.0.0.1:{port}", "dir": str(tmp_path / "europe-gateway"), "staging_dir": str(tmp_path)}
    tree = {"children": [client("rome", tmp_path, 1), {"member": "france", "required": True}]}
    europe = all_.member("world/europe", tree, gateway=gateway)
    solo = client("solo", tmp_path, 2) | {"client": "world/europe/france"}
    france = all_.member("world/europe/france", solo, kind="client", keys=keys)
    for member in (europe, france):
        member.address = ray.get_runtime_context().gcs_address
        member.start()
    summary = Run(all_.world({"children": [{"member": "europe", "required": True}]})).end()
    theirs = [member.wait() for member in (europe, france)]
    assert [each["status"] for each in (summary, *theirs)] == ["finished"] * 3
    assert summary["nodes"]["world/europe"]["accepted"] == 2
    assert theirs[0]["nodes"]["world/europe/france"]["accepted"] == 2
    assert theirs[1]["nodes"]["world/europe/france"]["steps"] == 2 * 4
    for run_dir in (tmp_path / "world", europe.run_dir):
        whole_trail(run_dir)
    crossed = [
        (tmp_path / "world", [europe.run_dir / "receipts/sent/world/europe.jsonl"]),
        (europe.run_dir, [tmp_path / "world/receipts/received/world/europe.jsonl"]),
        (europe.run_dir, [france.run_dir / "receipts/sent/world/europe/france.jsonl"]),
        (france.run_dir, [europe.run_dir / "receipts/received/world/europe/france.jsonl"]),
    ]
    for run_dir, files in crossed:
        border = receipts.look(run_dir, files)
        assert border.holds, border.lines()
        assert [proof.accepted for proof in border.proofs] == [2]
