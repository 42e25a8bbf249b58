"""APPFL: a gRPC server and its clients on the loopback, exchanging parameters without training.

    python appfl_exchange.py server PORT SIZE CLIENTS ROUNDS FOLDER
    python appfl_exchange.py client PORT NAME ROUNDS FOLDER

Every client writes FOLDER/arrivals-NAME.json: when each model arrived, in seconds since 1970.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from appfl.agent import ServerAgent
from appfl.comm.grpc import GRPCClientCommunicator, GRPCServerCommunicator, serve
from appfl.config import ServerAgentConfig
from omegaconf import OmegaConf

LARGEST = 100 * 1024**2
"""Bytes of a gRPC message, at most: larger ones than its default of 2 MiB are no slower."""
MODEL = """
import torch

class Flat(torch.nn.Module):
    def __init__(self, size):
        super().__init__()
        parts = torch.zeros(size).split(size // 100)
        self.parts = torch.nn.ParameterList(torch.nn.Parameter(part.clone(), requires_grad=False) for part in parts)
"""


def server(port: str, size: int, clients: int, rounds: int, folder: Path) -> None:
    """Serve until it is killed."""
    (folder / "model.py").write_text(MODEL)
    config = OmegaConf.create(
        {
            "client_configs": {
                "train_configs": {},
                "model_configs": {
                    "model_path": str(folder / "model.py"),
                    "model_name": "Flat",
                    "model_kwargs": {"size": size},
                },
            },
            "server_configs": {
                "num_clients": clients,
                "scheduler": "SyncScheduler",
                "aggregator": "FedAvgAggregator",
                "num_global_epochs": rounds,
                "logging_output_dirname": str(folder / "log"),
                "logging_output_filename": "server",
            },
        }
    )
    agent = ServerAgent(server_agent_config=OmegaConf.merge(OmegaConf.structured(ServerAgentConfig), config))
    communicator = GRPCServerCommunicator(agent, max_message_size=LARGEST)
    serve(communicator, server_uri=f"127.0.0.1:{port}", max_message_size=LARGEST)


def client(port: str, name: str, rounds: int, folder: Path) -> None:
    """Return what came, as an update."""
    communicator = GRPCClientCommunicator(name, server_uri=f"127.0.0.1:{port}", max_message_size=LARGEST)
    model = communicator.get_global_model(init_model=True)
    arrivals = [time.time()]
    for _ in range(rounds):
        model = model[0] if isinstance(model, tuple) else model
        model = communicator.update_global_model(model)
        arrivals.append(time.time())
    (folder / f"arrivals-{name}.json").write_text(json.dumps(arrivals))


if __name__ == "__main__":
    role, port, *rest = sys.argv[1:]
    if role == "server":
        server(port, *(int(number) for number in rest[:3]), Path(rest[3]))
    else:
        client(port, rest[0], int(rest[1]), Path(rest[2]))
