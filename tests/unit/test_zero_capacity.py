"""What other clients take of the machines, as it is told to who gives Ray Train's workers their number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.worlds import client

from actors.zero.capacity import taken
from worldlm_ray.plan.plan import Plan


def test_every_process_of_plain_clients_is_counted_once(tiny: Callable[..., Plan], tmp_path: Path) -> None:
    names = iter(range(99))

    def one(**settings: Any) -> dict[str, Any]:
        number = next(names)
        return client(f"c{number}", tmp_path, number, **settings)

    there = {"labels": {"region": "eu"}}
    shared = {"federation": "shared", "resources": {"clients_per_process": 2}, "children": [one() for _ in range(3)]}
    places = {"federation": "places", "max_clients": 2, "children": [one() for _ in range(4)]}
    patient = {"federation": "patient", "min_clients": 1, "max_clients": 3, "children": [one() for _ in range(4)]}
    plan = tiny(
        [
            one(resources={"cpus": 2}, placement=there),
            one(resources={"gpus": 0.5}),
            one(resources={"workers": [1, 2]}, training={"zero_stage": 1}),
            shared,
            places,
            patient,
        ]
    )
    core: tuple[dict[str, float], dict[str, str]] = ({"CPU": 1.0}, {})
    assert taken(plan.root) == [
        ({"CPU": 2.0}, {"region": "eu"}),
        ({"CPU": 1.0, "GPU": 0.5}, {}),
        *[core] * 2,  # three clients in two processes
        *[core] * 2,
        core,
    ]
