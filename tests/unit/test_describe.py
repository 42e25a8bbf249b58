"""worldlm show: what a configuration will move, before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from worlds import client

from worldlm_ray import plan
from worldlm_ray.describe import crossing_table, describe


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
