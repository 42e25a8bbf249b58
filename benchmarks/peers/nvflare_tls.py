"""NVFlare's server and one client with mutual TLS, as provisioned, exchanging parameters without training.

    python nvflare_tls.py ROUNDS FOLDER SIZE...

Prints one line of JSON: the seconds of every round, by size, from one model's arrival at the client to the next one's.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import nvflare
from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe
from nvflare.recipe import ProdEnv

PROJECT = """
api_version: 3
name: bench
description: an exchange without training
participants:
  - {{name: localhost, type: server, org: bench, fed_learn_port: {port}, admin_port: {port}}}
  - {{name: site-1, type: client, org: bench}}
  - {{name: admin@bench.org, type: admin, org: bench, role: project_admin}}
builders:
  - {{path: nvflare.lighter.impl.workspace.WorkspaceBuilder, args: {{template_file: [master_template.yml]}}}}
  - {{path: nvflare.lighter.impl.static_file.StaticFileBuilder, args: {{config_folder: config}}}}
  - {{path: nvflare.lighter.impl.cert.CertBuilder}}
  - {{path: nvflare.lighter.impl.signature.SignatureBuilder}}
"""
ADMIN = "admin@bench.org"


def main() -> None:
    """One size after the other."""
    rounds, folder, sizes = int(sys.argv[1]), Path(sys.argv[2]), [int(size) for size in sys.argv[3:]]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "project.yml").write_text(PROJECT.format(port=port))
    os.environ["HOME"] = str(folder)
    log = (folder / "log").open("w")
    command = [Path(sys.executable).with_name("nvflare"), "provision", "-p", "project.yml", "-w", "ws", "--force"]
    subprocess.run(command, cwd=folder, stdout=log, stderr=log, check=True)
    sites, processes = folder / "ws" / "bench" / "prod_00", []
    try:
        for name, role, more in (("localhost", "server", []), ("site-1", "client", ["uid=site-1"])):
            (sites / name / "transfer").mkdir(exist_ok=True)
            program = [sys.executable, "-u", "-m", f"nvflare.private.fed.app.{role}.{role}_train"]
            options = ["-m", str(sites / name), "-s", f"fed_{role}.json", "--set", "secure_train=true", *more]
            words = [*program, *options, "org=bench", "config_folder=config"]
            processes.append(subprocess.Popen(words, cwd=folder, stdout=log, stderr=log, start_new_session=True))
            time.sleep(8.0)
        found = {size: job(folder, size, rounds, sites) for size in sizes}
        print(json.dumps({"version": nvflare.__version__, "rounds_s": found}))
    finally:
        for process in processes:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def job(folder: Path, size: int, rounds: int, sites: Path) -> list[float]:
    """Seconds of each round of one job."""
    place = folder / str(size)
    place.mkdir()
    np.save(place / "initial.npy", np.zeros(size, np.float32))
    recipe = NumpyFedAvgRecipe(
        name="exchange",
        initial_ckpt=str(place / "initial.npy"),
        min_clients=1,
        num_rounds=rounds + 1,  # rounds are the times between arrivals, one fewer than the models
        train_script=str(Path(__file__).with_name("nvflare_client.py")),
        train_args=str(place),
    )
    with contextlib.redirect_stdout(sys.stderr):
        run = recipe.execute(ProdEnv(startup_kit_location=str(sites / ADMIN), username=ADMIN, login_timeout=60.0))
        run.get_result(timeout=900.0)
    [arrivals] = [json.loads(path.read_text()) for path in place.glob("arrivals-*.json")]
    return [after - before for before, after in itertools.pairwise(arrivals)]


if __name__ == "__main__":
    main()
