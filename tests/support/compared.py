"""Runs of a comparison with losses that are made up."""

from __future__ import annotations

from typing import Any


def run(
    method: str,
    own: list[float],
    world: float,
    *,
    seed: int = 0,
    steps: int = 10,
    validation: float | None = None,
) -> dict[str, Any]:
    """One run of a comparison as results.json holds it, with one own loss per client."""
    clients = [
        {"client": f"world/c{number}", "own": loss, "validation": validation, "world": world, "steps": steps}
        for number, loss in enumerate(own)
    ]
    curve = [{"virtual_s": 1.0, "tokens": 1, "loss": world + 0.5}, {"virtual_s": 5.0, "tokens": 2, "loss": world}]
    return {
        "method": method,
        "seed": seed,
        "virtual_s": 5.0,
        "tokens": 100,
        "flops": 6_000,
        "clients": clients,
        "levels": [{"level": 1, "bytes_up": 1000, "bytes_down": 2000}],
        "world_curve": curve,
    }


KNOWN = [run("fedavg", [2.5, 2.5], 3.0), run("local", [2.0, 2.0], 4.0), run("worldlm", [1.9, 2.2], 2.9)]
