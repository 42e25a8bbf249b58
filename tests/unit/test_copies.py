"""Many alike nodes, written once."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.worlds import client

from worldlm_ray.errors import ConfigError
from worldlm_ray.plan import membership
from worldlm_ray.plan.plan import Plan
from worldlm_ray.reports.describe import crossing_table, crossings, describe, tables
from worldlm_ray.reports.tables import folded

Tiny = Callable[..., Plan]


def shards(plan: Plan) -> dict[str, str | None]:
    return {spec.path: spec.settings.data.shard for spec in plan.root.clients}


def test_each_copy_of_a_client_has_a_part_of_the_text_of_its_own(tiny: Tiny, tmp_path: Path) -> None:
    plan = tiny([client("phone", tmp_path, 1) | {"copies": 10}, client("other", tmp_path, 2)])
    assert shards(plan) == {f"world/phone-{n:02}": f"{n}/10" for n in range(1, 11)} | {"world/other": None}
    assert {spec.key for spec in plan.root.clients[:10]} == {"world.children[0]"}


def test_a_shard_that_is_set_is_that_of_every_copy(tiny: Tiny, tmp_path: Path) -> None:
    one = client("phone", tmp_path, 1)
    one["data"]["shard"] = "2/3"
    plan = tiny([one | {"copies": 2}])
    assert shards(plan) == {"world/phone-1": "2/3", "world/phone-2": "2/3"}


def test_copies_of_a_federation_share_its_text_out_among_all_clients(tiny: Tiny, tmp_path: Path) -> None:
    inside = [client("phone", tmp_path, 1) | {"copies": 2}, client("tablet", tmp_path, 2)]
    plan = tiny([{"federation": "region", "copies": 3, "min_clients": 1, "children": inside}])
    assert shards(plan) == {
        "world/region-1/phone-1": "1/6",
        "world/region-1/phone-2": "2/6",
        "world/region-1/tablet": "1/3",
        "world/region-2/phone-1": "3/6",
        "world/region-2/phone-2": "4/6",
        "world/region-2/tablet": "2/3",
        "world/region-3/phone-1": "5/6",
        "world/region-3/phone-2": "6/6",
        "world/region-3/tablet": "3/3",
    }
    assert [spec.min_clients for spec in plan.root.children] == [1, 1, 1]
    assert list(plan.kinds)[:3] == ["world", "world/region-1", "world/region-1/phone-1"]


@pytest.mark.parametrize("copies", [0, -1, True, "many", 1.5])
def test_copies_are_a_number_above_zero(tiny: Tiny, tmp_path: Path, copies: Any) -> None:
    with pytest.raises(ConfigError, match=r"world\.children\[0\]\.copies: got .*; (give|expected) a .*number"):
        tiny([client("phone", tmp_path, 1) | {"copies": copies}])


def test_a_copy_must_not_have_the_name_of_a_sibling(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"children\[1\]\.client: the name 'a-2' is taken by world\.children\[0\]"):
        tiny([client("a", tmp_path, 1) | {"copies": 3}, client("a-2", tmp_path, 2)])


def test_the_world_has_no_copies(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"world\.copies: got 2; there is one world"):
        tiny(world={"copies": 2, "children": [client("a", tmp_path, 1)]})


def test_a_hundred_thousand_clients_are_checked_in_seconds(tiny: Tiny, tmp_path: Path) -> None:
    inside = [client("phone", tmp_path, 1) | {"copies": 1000}]
    few = [{"federation": "region", "copies": 1, "children": inside}]
    began = time.process_time()
    tiny(few)
    few_s = time.process_time() - began
    began = time.process_time()
    plan = tiny([few[0] | {"copies": 100}])
    many_s = time.process_time() - began
    assert len(plan.root.clients) == 100_000
    assert plan.node("world/region-042/phone-0007").settings.data.shard == "41007/100000"
    assert many_s < 100 * max(few_s, 0.1)  # it took 1.1 s; far from a second for each thousand


def test_show_says_how_many_are_alike(tiny: Tiny, tmp_path: Path) -> None:
    inside = [client("phone", tmp_path, 1) | {"copies": 50}]
    plan = tiny([{"federation": "region", "copies": 4, "placement": {"labels": {"at": "sea"}}, "children": inside}])
    facts = describe(plan)
    assert list(facts["nodes"]) == ["world", "world/region-1", "world/region-1/phone-01"]
    assert facts["nodes"]["world/region-1/phone-01"]["copies"] == 50
    console = Console(width=150)
    with console.capture() as shown:
        for table in tables(facts):
            console.print(table)
        console.print(crossing_table(facts, per_gb=1.0))
    assert "region-1 and 3 alike" in shown.get()
    assert "phone-01 and 49 alike" in shown.get()
    [edge] = crossings(plan)
    alone = crossings(tiny([{"federation": "r", "placement": {"labels": {"at": "sea"}}, "children": inside}]))
    assert edge["bytes_up"] == 4 * alone[0]["bytes_up"] > 0


def test_one_copy_may_leave_and_the_others_keep_their_texts(tiny: Tiny, tmp_path: Path) -> None:
    plan = tiny([client("phone", tmp_path, 1) | {"copies": 3}, client("other", tmp_path, 2)])
    assert shards(membership.without(plan, "world/phone-2")) == {
        "world/phone-1": "1/3",
        "world/phone-3": "3/3",
        "world/other": None,
    }
    assert len(membership.without(plan, "world/other").root.clients) == 3


def test_what_is_below_a_copy_of_a_federation_changes_in_the_configuration(tiny: Tiny, tmp_path: Path) -> None:
    plan = tiny([{"federation": "r", "copies": 2, "children": [client("a", tmp_path, 1), client("b", tmp_path, 2)]}])
    with pytest.raises(ConfigError, match="NODE: world/r-1 is, or is below, one of several copies"):
        membership.without(plan, "world/r-1/a")
    with pytest.raises(ConfigError, match="NODE: world/r-2 is one of several copies"):
        membership.without(plan, "world/r-2")
    with pytest.raises(ConfigError, match="--under: world/r-2 is, or is below, one of several copies"):
        membership.with_client(plan, "world/r-2", "c", files=[], overrides=["data.corpus=licenses"])


# ---- tables of many nodes ------------------------------------------------------------------------------------


def line(kind: str, **values: Any) -> dict[str, Any]:
    empty = {"version": 0, "tokens": 0, "tau": None, "loss": None, "perplexity": None, "perplexity_start": None}
    return {"kind": kind, **empty, "busy_fraction": 0.5, "accepted": 0, "refused": {}, "state": "training"} | values


def test_many_siblings_are_one_line() -> None:
    nodes = {"world": line("world"), "world/near": line("federation"), "world/near/a": line("client")}
    nodes |= {
        f"world/far-{n:02}": line("federation", version=n, accepted=1, state="finished" if n < 10 else "training")
        for n in range(40)
    }
    nodes |= {f"world/far-{n:02}/c": line("client", tokens=10, loss=float(n), refused={"stale": 1}) for n in range(40)}
    del nodes["world/near"], nodes["world/near/a"]
    nodes |= {"world/own": line("client")}
    rows = dict(folded(nodes))
    assert list(rows) == [
        "world",
        "world/40 federations",
        "world/40 federations/40 clients",
        "world/own",
    ]
    together = rows["world/40 federations/40 clients"]
    assert (together["tokens"], together["loss"], together["refused"]) == (400, 19.5, {"stale": 40})
    assert rows["world/40 federations"]["state"] == "30 training, 10 finished"
    assert rows["world/40 federations"]["accepted"] == 40


def test_few_siblings_have_a_line_each() -> None:
    nodes = {"world": line("world")} | {f"world/{n}": line("client") for n in range(32)}
    assert folded(nodes) == list(nodes.items())


def test_the_plan_of_a_thousand_clients_travels_with_the_call_that_makes_an_actor(tiny: Tiny, tmp_path: Path) -> None:
    one = client("phone", tmp_path, 1) | {"copies": 1_000, "data": {"corpus": "licenses"}}
    plan = tiny([one])
    pickled = pickle.dumps(plan)
    assert len(pickled) < 50_000  # half of what Ray sends along; the fields alone take 236 kB
    assert pickle.loads(pickled) == plan
