"""Worlds that span clusters: members in a world's tree, and runs that are members of another world."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.worlds import client

from worldlm_ray.aggregation.children import Status
from worldlm_ray.config.loading import from_mapping
from worldlm_ray.errors import ConfigError
from worldlm_ray.exchange.limits import LARGEST_COUNT
from worldlm_ray.experiments import compare
from worldlm_ray.gateway import terms
from worldlm_ray.plan import build
from worldlm_ray.plan.membership import with_client
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.quotas import quotas
from worldlm_ray.reports.describe import describe, tables
from worldlm_ray.simulation.simulator import simulate
from worldlm_ray.tracking.run_state import RunState

Tiny = Callable[..., Plan]
GATEWAY = {"gateway": {"listen": "127.0.0.1:8443"}}


def a_world(tiny: Tiny, folder: Path, **changes: Any) -> Plan:
    """A world with a client of its own and a member."""
    return tiny([client("a", folder, 1), {"member": "europe"}], **(GATEWAY | changes))


def a_member(tiny: Tiny, folder: Path, *, path: str = "world/europe", **changes: Any) -> Plan:
    """A federation of one client that is a member."""
    tree = {"federation": path, "children": [client("b", folder, 2)]}
    return tiny(**({"world": tree, "joins": "profile"} | changes))


def test_a_member_is_a_child_without_children_that_no_actor_is_made_of(tiny: Tiny, tmp_path: Path) -> None:
    plan = a_world(tiny, tmp_path)
    europe = plan.node("world/europe")
    assert europe.remote
    assert [spec.path for spec in plan.root.members] == ["world/europe"]
    assert [spec.path for spec in plan.root.inner] == ["world"]
    assert [spec.path for spec in plan.root.clients] == ["world/a"]
    assert plan.kinds == {"world": "world", "world/a": "client", "world/europe": "remote"}


def test_a_world_begins_without_its_members(tiny: Tiny, tmp_path: Path) -> None:
    plan = a_world(tiny, tmp_path)
    node = build.inner_node(plan, plan.root, np.zeros(plan.layout.size, np.float32))
    assert node.children["europe"].status is Status.EXPECTED
    assert node.children["a"].status is Status.ACTIVE


def test_a_world_waits_for_a_member_that_is_required(tiny: Tiny) -> None:
    plan = tiny([{"member": "europe", "required": True}], **GATEWAY)
    node = build.inner_node(plan, plan.root, np.zeros(plan.layout.size, np.float32))
    assert node.children["europe"].status is Status.ACTIVE


def test_a_world_needs_no_client_of_its_own(tiny: Tiny) -> None:
    plan = tiny([{"member": "europe"}, {"member": "asia"}], **GATEWAY)
    assert plan.tokenizer == "bytes"
    assert plan.top.path == "world"
    assert not plan.root.clients


@pytest.mark.parametrize(
    ("budget", "given", "claim"),
    [
        ({"tokens": 5_000}, None, 5_000),
        ({"tokens": 5_000}, 700, 700),
        ({"rounds": 2}, None, LARGEST_COUNT),
        ({"rounds": 2}, 700, 700),
    ],
)
def test_what_a_member_may_claim(
    tiny: Tiny, tmp_path: Path, budget: dict[str, int], given: int | None, claim: int
) -> None:
    entry = {"member": "europe"} | ({} if given is None else {"update_tokens": given})
    plan = tiny([client("a", tmp_path, 1), {"federation": "eu", "children": [entry]}], budget=budget, **GATEWAY)
    found = quotas(plan.node("world/eu"), plan.round_tokens, plan.config.budget)
    assert found.children["europe"].update_tokens == found.children["europe"].started_tokens == claim
    assert found.own is not None
    assert found.own.update_tokens >= claim


def test_a_member_s_run_has_the_nodes_above_it_as_remote_ones(tiny: Tiny, tmp_path: Path) -> None:
    plan = a_member(tiny, tmp_path, path="world/europe/france")
    assert plan.kinds == {
        "world": "remote",
        "world/europe": "remote",
        "world/europe/france": "federation",
        "world/europe/france/b": "client",
    }
    assert plan.top.path == "world/europe/france"
    assert [spec.path for spec in plan.root.inner] == ["world/europe/france"]
    node = build.inner_node(plan, plan.top, np.zeros(plan.layout.size, np.float32))
    assert node.parent is not None
    assert RunState(plan.kinds, budget=plan.config.budget).nodes["world"].kind == "remote"


def test_a_member_may_be_one_client(tiny: Tiny, tmp_path: Path) -> None:
    alone = client("solo", tmp_path, 3) | {"client": "world/solo"}
    plan = tiny(world=alone, joins="profile")
    assert plan.top.path == "world/solo"
    assert [spec.path for spec in plan.root.clients] == ["world/solo"]
    assert not plan.root.inner


def test_a_client_joins_a_member_s_run(tiny: Tiny, tmp_path: Path) -> None:
    plan = a_member(tiny, tmp_path)
    file = tmp_path / "b.txt"
    new = with_client(plan, under="world/europe", name="c", files=[str(file)], overrides=[])
    assert "world/europe/c" in new.specs
    with pytest.raises(ConfigError, match="is in another cluster"):
        with_client(plan, under="world", name="c", files=[str(file)], overrides=[])


@pytest.mark.parametrize(
    ("changes", "key", "problem"),
    [
        ({"joins": None}, "world.federation", "joins is not given"),
        ({"world": {"children": [{"client": "b"}]}}, "world", "does not say which member"),
        ({"path": "europe"}, "world.federation", "got 'europe'"),
        ({"path": "world/-"}, "world.federation", "is no name"),
        ({"faults": ["1s kill world"]}, "faults[0]", "is in another cluster"),
        ({"simulation": {"train": False}}, "simulation.train", "world is in another cluster"),
    ],
)
def test_what_a_member_s_run_cannot_be(
    tiny: Tiny, tmp_path: Path, changes: dict[str, Any], key: str, problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        a_member(tiny, tmp_path, **changes)
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("entry", "key", "problem"),
    [
        ({"children": [{"client": "x"}]}, "world.children[1].children", "configured in its own cluster"),
        ({"training": {"lr": 1.0}}, "world.children[1].training", "configured in its own cluster"),
        ({"colour": 1}, "world.children[1].colour", "unknown key"),
        ({"required": 3}, "world.children[1].required", "got 3"),
        ({"update_tokens": 0}, "world.children[1].update_tokens", "got 0"),
        ({"client": "europe"}, "world.children[1]", "neither a federation nor a client"),
    ],
)
def test_what_a_member_s_entry_cannot_have(
    tiny: Tiny, tmp_path: Path, entry: dict[str, Any], key: str, problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        tiny([client("a", tmp_path, 1), {"member": "europe"} | entry], **GATEWAY)
    assert caught.value.key == key


@pytest.mark.parametrize("listen", ["8443", "host:", "host:port", "host:70000"])
def test_an_address_is_a_host_and_a_port(tiny: Tiny, tmp_path: Path, listen: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        a_world(tiny, tmp_path, gateway={"listen": listen})


def test_all_of_a_run_is_needed_to_simulate_or_compare_it(tiny: Tiny, tmp_path: Path) -> None:
    for plan in (a_world(tiny, tmp_path), a_member(tiny, tmp_path)):
        with pytest.raises(ConfigError, match="is in another cluster"):
            simulate(plan)
        with pytest.raises(ConfigError, match="is in another cluster"):
            compare.check(plan.config, ["worldlm"])


def test_both_sides_show_the_other_one(tiny: Tiny, tmp_path: Path) -> None:
    for plan, other in ((a_world(tiny, tmp_path), "world/europe"), (a_member(tiny, tmp_path), "world")):
        facts = describe(plan)
        assert facts["nodes"][other]["kind"] == "remote"
        assert list(tables(facts))


def test_both_sides_find_the_same_alike(tiny: Tiny, tmp_path: Path) -> None:
    world, member = a_world(tiny, tmp_path), a_member(tiny, tmp_path)
    ours, theirs = terms.alike(world, world.root), terms.alike(member, member.root)
    assert ours == theirs
    other = replace(world, config=replace(world.config, seed=1))
    assert terms.alike(other, other.root)["model.initial"] != ours["model.initial"]
    assert ours["budget.rounds"] == "2"
    assert ours["model.parameters"] == str(world.layout.size)


def test_a_run_knows_its_border_again(tiny: Tiny, tmp_path: Path) -> None:
    plan = a_world(tiny, tmp_path)
    assert from_mapping(plan.to_mapping(), resolved=True) == plan.config
