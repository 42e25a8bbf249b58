"""A client of nvflare_exchange.py: returns what it got, as an update, and notes when each model arrived."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import nvflare.client as flare


def main() -> None:
    """Until the job is done."""
    arrivals = []
    flare.init()
    while flare.is_running():
        model = flare.receive()
        if model is None:
            break
        arrivals.append(time.time())
        flare.send(flare.FLModel(params=model.params, metrics={"accuracy": 0.0}))
        Path(sys.argv[1], f"arrivals-{os.getpid()}.json").write_text(json.dumps(arrivals))


if __name__ == "__main__":
    main()
