"""A world of two levels under a virtual clock: `cpp` is four times slower, and the others do not wait for it.

Usage: python examples/two_levels_simulated.py [RUN_DIR]
"""

from __future__ import annotations

import sys

from rich.console import Console
from small_world import plan

from worldlm_ray.reports.tables import final_table
from worldlm_ray.simulation.simulator import simulate


def main() -> None:
    """Simulate, then print the table."""
    outcome = simulate(plan("example-simulated", sys.argv[1] if len(sys.argv) > 1 else None))
    Console().print(final_table(outcome.summary, outcome.samples))
    for path, node in outcome.summary["nodes"].items():
        if node["kind"] == "client":
            print(f"{path}: {node['steps']} steps, busy {node['busy_fraction']:.0%} of the virtual time")


if __name__ == "__main__":
    main()
