"""Flower: a gRPC server and its clients on the loopback, exchanging parameters without training.

    python flower_exchange.py server PORT SIZE CLIENTS ROUNDS
    python flower_exchange.py client PORT

The server prints one line of JSON at the end: the seconds of every round, from the strategy's configuration of a round
to the end of its aggregation.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import flwr
import numpy as np
from flwr.common import ndarrays_to_parameters
from flwr.server.strategy import FedAvg

LARGEST = 2**31 - 1
"""Bytes of a gRPC message, at most."""


class Timed(FedAvg):
    """FedAvg that looks at the clock."""

    def configure_fit(self, *arguments: Any, **named: Any) -> Any:
        """A round begins."""
        self.began = time.perf_counter()
        return super().configure_fit(*arguments, **named)

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
        """A round ends."""
        if failures:
            sys.exit(f"round {server_round}: {failures}")
        found = super().aggregate_fit(server_round, results, failures)
        rounds.append(time.perf_counter() - self.began)
        return found


class Idle(flwr.client.NumPyClient):
    """Returns what it got, as an update."""

    def fit(self, parameters: Any, config: Any) -> Any:
        """No training."""
        return parameters, 100, {}


rounds: list[float] = []


def main() -> None:
    """One process of the exchange."""
    role, port, *numbers = sys.argv[1:]
    address = f"127.0.0.1:{port}"
    if role == "client":
        flwr.client.start_client(server_address=address, client=Idle().to_client(), grpc_max_message_length=LARGEST)
        return
    size, clients, count = (int(number) for number in numbers)
    strategy = Timed(
        fraction_evaluate=0.0,
        min_fit_clients=clients,
        min_available_clients=clients,
        initial_parameters=ndarrays_to_parameters([np.zeros(size, np.float32)]),
    )
    flwr.server.start_server(
        server_address=address,
        strategy=strategy,
        config=flwr.server.ServerConfig(num_rounds=count),
        grpc_max_message_length=LARGEST,
    )
    print(json.dumps({"version": flwr.__version__, "rounds_s": rounds}))


if __name__ == "__main__":
    main()
