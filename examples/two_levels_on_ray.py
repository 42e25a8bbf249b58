"""The same world with an actor per node on a local Ray.

Usage: python examples/two_levels_on_ray.py [RUN_DIR]
"""

from __future__ import annotations

import sys

from rich.console import Console
from small_world import plan

from worldlm_ray.launch import train
from worldlm_ray.reports.tables import final_table


def main() -> None:
    """Train, then print the table."""
    run = plan("example-on-ray", sys.argv[1] if len(sys.argv) > 1 else None)
    outcome = train(run, on_phase=print)
    Console().print(final_table(outcome.summary, outcome.samples))
    print(f"look at it with:  tensorboard --logdir {run.run_dir / 'tensorboard'}")


if __name__ == "__main__":
    main()
