"""The size of a world: arithmetic by hand, and what grows with what."""

from __future__ import annotations

import dataclasses

import pytest
import size_a_world
from size_a_world import Machine, Wish, most_children, tiers

from worldlm_ray.errors import ConfigError

MACHINE = Machine(copy_bytes_per_s=10e9, link_bytes_per_s=1e9)
WISH = Wish(clients=1_000, parameters=100_000_000, fan_out=32, round_s=100.0)


def test_the_tree_holds_all_clients_and_ends_in_one_world() -> None:
    found = tiers(WISH, MACHINE)
    assert [tier.nodes for tier in found] == [1, 32, 1_000]
    assert [round(tier.children, 2) for tier in found] == [32.0, 31.25, 0.0]


def test_a_small_world_by_hand() -> None:
    world, clients = tiers(dataclasses.replace(WISH, clients=10), MACHINE)
    moved_s = 2 * 0.4e9 / 1e9
    updates = 10 / (100.0 + moved_s)
    assert world.updates_per_s == pytest.approx(updates)
    assert world.busy == pytest.approx(updates * (size_a_world.FIXED_S + size_a_world.COPIES * 0.04))
    assert world.link == pytest.approx(updates * moved_s)
    assert world.memory_bytes == 2 * 400_000_000
    assert clients.link == pytest.approx(moved_s / 100.0)
    assert clients.memory_bytes == 2_000_000_000


def test_one_client_still_has_a_world() -> None:
    assert [tier.nodes for tier in tiers(dataclasses.replace(WISH, clients=1), MACHINE)] == [1, 1]


def test_a_federation_does_not_push_more_often_than_an_exchange_takes() -> None:
    hasty = dataclasses.replace(WISH, round_s=0.01)
    world = tiers(hasty, MACHINE)[0]
    shortest = size_a_world.FIXED_S + size_a_world.EXCHANGE_COPIES * 0.04 + 0.8
    assert world.updates_per_s == pytest.approx(32 / shortest)


def test_what_serves_more_children() -> None:
    few, limit = most_children(WISH, MACHINE)
    assert limit == "its network"
    assert most_children(dataclasses.replace(WISH, codec="int4"), MACHINE)[0] > few
    assert most_children(dataclasses.replace(WISH, round_s=1_000.0), MACHINE)[0] > 8 * few
    fast = dataclasses.replace(MACHINE, link_bytes_per_s=100e9)
    assert most_children(WISH, fast)[1] == "its memory's speed"
    calm = dataclasses.replace(WISH, clients=few, fan_out=few)
    assert max(tiers(calm, MACHINE)[0].link, tiers(calm, MACHINE)[0].busy) <= size_a_world.FULL


def test_memory_of_a_node_does_not_grow_with_clients_nor_depth() -> None:
    small, large = tiers(WISH, MACHINE), tiers(dataclasses.replace(WISH, clients=10**6), MACHINE)
    assert len(large) > len(small)
    assert {tier.memory_bytes for tier in large} == {tier.memory_bytes for tier in small}


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"clients": 0}, "clients"),
        ({"round_s": -1.0}, "round_s"),
        ({"fan_out": 1}, "fan_out"),
        ({"codec": "int5"}, "codec"),
    ],
)
def test_impossible_wishes_are_one_line(change: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        tiers(dataclasses.replace(WISH, **change), MACHINE)  # type: ignore[arg-type]
