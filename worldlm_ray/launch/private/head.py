"""The head of a Ray cluster: where the local one is, and whether one answers.

`ray.init` is the only public way to find out either. It retries for minutes and writes its log on the terminal.
"""

from __future__ import annotations

from ray._private import services
from ray._private.gcs_utils import create_gcs_channel
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc


def local_address() -> str:
    """HOST:PORT of the cluster that RAY_ADDRESS names, or that was started on this machine.

    Raises:
        ConnectionError: there is none.
    """
    return str(services.canonicalize_bootstrap_address_or_die("auto"))


def version(target: str, timeout_s: float) -> str:
    """Ray's version on the head whose global control service listens at `target`; empty if it does not say.

    Raises:
        grpc.RpcError: no answer, or a refusal.
        Exception: what Ray raises where a token is missing or unreadable.
    """
    channel = create_gcs_channel(target)
    try:
        service = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        reply = service.CheckAlive(gcs_service_pb2.CheckAliveRequest(), timeout=timeout_s)
    finally:
        channel.close()
    return str(reply.ray_version)
