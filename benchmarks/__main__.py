"""Run benchmarks by name, print a table for each and write JSON to benchmarks/out/."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

NAMES = (
    "exchange",
    "aggregation",
    "scale",
    "client_overhead",
    "compiled",
    "node_memory",
    "busy",
    "overlap",
    "goodput",
    "node_loss",
    "join",
    "many_clients",
    "start",
    "zero",
    "zero_exchange",
    "privacy",
    "membership",
    "measuring",
    "batched_clients",
    "adapters",
    "gateway",
    "peers_tls",
)
OUT = Path(__file__).parent / "out"


def _first_line(module: ModuleType) -> str:
    return (module.__doc__ or "").splitlines()[0]


def main() -> None:
    """Run what was asked for, or everything."""
    wanted = sys.argv[1:] or NAMES
    if wanted[0] == "gpu":
        from benchmarks.gpu import main as gpu

        sys.exit(gpu(list(wanted[1:])))
    if {"-h", "--help"} & set(wanted):
        print("python -m benchmarks [NAME ...]: all of them, or\n")
        for name in NAMES:
            print(f"  {name:16} {_first_line(import_module(f'benchmarks.{name}'))}")
        print(f"  {'gpu':16} {_first_line(import_module('benchmarks.gpu'))}")
        return
    for name in wanted:
        if name not in NAMES:
            sys.exit(f"there is no benchmark {name!r}; there are {', '.join(NAMES)}")
    OUT.mkdir(exist_ok=True)
    print(f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}")
    for name in wanted:
        module = import_module(f"benchmarks.{name}")
        print(f"\n{name}: {_first_line(module)}", flush=True)
        result = module.run()
        (OUT / f"{name}.json").write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
