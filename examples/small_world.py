"""The world that the next two examples train: two federations, a client under the world, one slow machine."""

from __future__ import annotations

from typing import Any

from worldlm_ray.config.loading import from_mapping
from worldlm_ray.plan import rundir
from worldlm_ray.plan.plan import Plan, make_plan


def plan(name: str, run_dir: str | None = None) -> Plan:
    """A checked plan with its run folder: any program can build one from plain dictionaries."""
    world: dict[str, Any] = {
        "children": [
            {
                "federation": "code",
                "aggregation": {"buffer_size": 2},
                "children": [
                    {"client": "python", "data": {"corpus": "python_stdlib"}},
                    {
                        "client": "cpp",
                        "data": {"corpus": "cpp_headers"},
                        "simulation": {"tokens_per_s": 5_000},
                    },
                ],
            },
            {"client": "reference", "data": {"corpus": "python_reference"}},
        ]
    }
    settings = {
        "name": name,
        "run_dir": run_dir,
        "model": {"preset": "nano"},
        "budget": {"tokens": 300_000},
        "training": {"local_steps": 20},
        "evaluation": {"tokens": 2048, "final_tokens": 8192},
        "world": world,
    }
    return rundir.create(make_plan(from_mapping(settings)))
