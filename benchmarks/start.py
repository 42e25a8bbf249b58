"""Seconds from `worldlm train` to the first trained step of five clients, and to everybody's.

One command, as a user gives it, on a cluster that it starts itself. Rounds have one step, and what counts is
when the audit trail has the update: a little later than the step itself.
"""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

CORPORA = ("python_stdlib", "python_reference", "cpp_headers", "licenses", "package_descriptions")
RUNS = 3


def first_updates(folder: Path) -> tuple[float, float]:
    """Seconds until the first client has been heard, and until all have."""
    clients = [{"client": f"c{i}", "data": {"corpus": corpus}} for i, corpus in enumerate(CORPORA)]
    conf = {
        "merge": {"client": 1.0},  # one model per client
        "model": {"preset": "nano"},
        "budget": {"rounds": 10_000},
        "training": {"local_steps": 1, "batch_size": 8},
        "data": {"cache_dir": str(folder.parent / "cache")},
        "world": {"children": clients},
    }
    folder.mkdir()
    (folder / "conf.yaml").write_text(yaml.safe_dump(conf), encoding="utf-8")
    run, heard = folder / "run", dict[str, float]()
    command = [sys.executable, "-m", "worldlm_ray", "train", str(folder / "conf.yaml"), "--run-dir", str(run)]
    began = time.monotonic()
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while len(heard) < len(clients):
            time.sleep(0.05)
            if driver.poll() is not None or time.monotonic() - began > 300.0:
                raise RuntimeError("the run did not begin")
            trail = run / "audit" / "world.jsonl"
            for line in trail.read_text(encoding="utf-8").splitlines() if trail.is_file() else []:
                if '"accepted"' in line:
                    heard.setdefault(json.loads(line)["sender"], time.monotonic() - began)
    finally:
        driver.send_signal(signal.SIGINT)
        driver.wait()
    return min(heard.values()), max(heard.values())


def run() -> dict[str, Any]:
    """Several starts; the first also reads and cuts the texts."""
    with tempfile.TemporaryDirectory() as folder:
        found = [first_updates(Path(folder) / str(number)) for number in range(RUNS)]
    print(f"{len(CORPORA)} clients, nano; the first start also prepares the texts")
    print(f"{'start':>6} {'first client (s)':>17} {'all clients (s)':>16}")
    for number, (first, last) in enumerate(found, start=1):
        print(f"{number:6} {first:17.1f} {last:16.1f}")
    median = statistics.median(first for first, _ in found)
    print(f"median {median:.1f} s; target: at most 20 s to the first training step")
    return {"starts": found, "median_s": median}
