"""worldlm show: what a configuration will move, before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.worlds import TINY_MODEL, client

from worldlm_ray.plan import plan
from worldlm_ray.reports.describe import crossing_table, describe, tables


def test_what_moves_between_places_is_counted_and_priced(tiny: Callable[..., plan.Plan], tmp_path: Path) -> None:
    here, there = {"placement": {"labels": {"region": "here"}}}, {"placement": {"labels": {"region": "there"}}}
    children = [
        {
            "federation": "north",
            "children": [client("a", tmp_path, 1), client("b", tmp_path, 2)],
            "aggregation": {"push_every": 4},
            "exchange": {"codec": "bf16"},
            **here,
        },
        {"federation": "south", "children": [client("c", tmp_path, 3), client("d", tmp_path, 4, **there)]},
    ]
    found = tiny(children, budget={"rounds": 10})
    size = found.layout.nbytes
    edges = {edge["node"]: edge for edge in describe(found)["crossings"]}
    assert set(edges) == {"world/north", "world/south/d"}
    # 20 updates of two clients, one by one, and every fourth aggregation goes on.
    assert edges["world/north"]["exchanges"] == 5
    assert edges["world/north"]["bytes_up"] == 5 * size // 2
    assert edges["world/north"]["bytes_down"] == 5 * size
    assert edges["world/south/d"]["exchanges"] == 10
    unknown = describe(tiny(children, budget={"seconds": 5.0}))["crossings"]
    assert all(edge["bytes_up"] is None for edge in unknown)
    table = crossing_table(describe(found), per_gb=1e6)
    total = (5 * size // 2 + 5 * size + 20 * size) / 1e9 * 1e6
    assert f"{total:,.2f} in all" in str(table.caption)


@pytest.mark.parametrize(("rule", "extra"), [("none", 0), ("median", 3), ("trimmed_mean", 3)])
def test_a_rule_that_keeps_every_update_shows_its_memory(
    tiny: Callable[..., plan.Plan], tmp_path: Path, rule: str, extra: int
) -> None:
    children = [client(name, tmp_path, number) for number, name in enumerate("abc", 1)]
    found = tiny(children, aggregation={"robust": {"rule": rule}, "trigger": "synchronous"})
    world = describe(found)["nodes"]["world"]
    assert world["memory_bytes"] == (2 + extra) * found.layout.nbytes  # the model, the fold, and three children's


def test_a_federation_holds_five_models_in_an_exchange(tiny: Callable[..., plan.Plan], tmp_path: Path) -> None:
    found = tiny([{"federation": "f", "children": [client("a", tmp_path, 1), client("b", tmp_path, 2)]}])
    assert describe(found)["nodes"]["world/f"]["memory_bytes"] == 5 * found.layout.nbytes


@pytest.mark.parametrize("changes", [{}, {"key_layers": []}])
def test_attention_is_named_where_there_are_key_layers(
    tiny: Callable[..., plan.Plan], tmp_path: Path, changes: dict[str, Any]
) -> None:
    found = describe(tiny([client("a", tmp_path, 1)], model=TINY_MODEL | changes))
    has_keys = not changes
    assert found["nodes"]["world"]["score"] == ("cosine" if has_keys else None)
    _, tree = tables(found)
    assert ("; cosine attention;" in str(tree.rows[0][0][-1])) == has_keys
