"""Flower's apps of an exchange without training: its SuperLink and SuperNode run them (see flower_tls.py)."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()
server = ServerApp()


class Timed(FedAvg):
    """FedAvg that looks at the clock: from the configuration of a round to the end of its aggregation."""

    def __init__(self) -> None:
        super().__init__(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
        self.rounds: list[float] = []
        self._began = 0.0

    def configure_train(self, *arguments: Any, **named: Any) -> Any:
        """A round begins."""
        self._began = time.perf_counter()
        return super().configure_train(*arguments, **named)

    def aggregate_train(self, *arguments: Any, **named: Any) -> Any:
        """A round ends."""
        found = super().aggregate_train(*arguments, **named)
        self.rounds.append(time.perf_counter() - self._began)
        return found


@client.train()
def train(message: Message, context: Context) -> Message:
    """Return what came, as an update."""
    metrics = MetricRecord({"num-examples": 100})
    return Message(content=RecordDict({"arrays": message.content["arrays"], "metrics": metrics}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """All rounds; their seconds go into a file."""
    asked, strategy = context.run_config, Timed()
    arrays = ArrayRecord([np.zeros(asked["size"], np.float32)])
    strategy.start(grid=grid, initial_arrays=arrays, num_rounds=asked["rounds"], timeout=600)
    file = Path(asked["out"])
    file.with_suffix(".part").write_text(json.dumps(strategy.rounds))
    file.with_suffix(".part").replace(file)
