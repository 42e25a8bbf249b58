"""NVFlare: FedAvg over NumPy arrays in its simulator, a process per client, exchanging parameters without training.

    python nvflare_exchange.py SIZE CLIENTS ROUNDS FOLDER

Prints one line of JSON: the seconds of every round, as the clients saw them (from one model's arrival to the next's).
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from pathlib import Path

import numpy as np
import nvflare
from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe
from nvflare.recipe.sim_env import SimEnv


def main() -> None:
    """A job of so many rounds."""
    size, clients, rounds, folder = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    initial = folder / "initial.npy"
    np.save(initial, np.zeros(size, np.float32))
    recipe = NumpyFedAvgRecipe(
        name="exchange",
        initial_ckpt=str(initial),
        min_clients=clients,
        num_rounds=rounds,
        train_script=str(Path(__file__).with_name("nvflare_client.py")),
        train_args=str(folder),
    )
    recipe.execute(SimEnv(num_clients=clients, workspace_root=str(folder / "workspace")))
    arrivals = [json.loads(path.read_text()) for path in sorted(folder.glob("arrivals-*.json"))]
    if len(arrivals) != clients:
        sys.exit(f"{len(arrivals)} of {clients} clients have finished")
    spans = [[b - a for a, b in itertools.pairwise(times)] for times in arrivals]
    print(
        json.dumps(
            {"version": nvflare.__version__, "rounds_s": [statistics.mean(row) for row in zip(*spans, strict=True)]}
        )
    )


if __name__ == "__main__":
    main()
