"""Whether a Ray cluster can be reached, found out before Ray tries.

Ray's own client waits for minutes for a head that is not there, and writes its log on the terminal meanwhile. Here the
name is resolved, the port is connected to, and the head is asked whether it lives, each with a limit of seconds.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import grpc
import ray

from worldlm_ray.errors import Interrupted, RunError
from worldlm_ray.launch.private import head

CONNECT_S = 4.0
"""Time for a TCP connection."""
HEALTH_S = 5.0
"""Time for a head to say that it lives."""
LIMIT_S = 12.0
"""Time for everything, name servers included."""
LOOK_S = 0.1
"""Seconds between two looks whether the user wants to leave."""
CLIENT = "ray://"
AUTO = "auto"
CURE = "start one with `ray start --head`, give the right --address (HOST:6379 or auto), or leave it out"
TOKEN_CURE = (
    "the cluster wants token authentication: set RAY_AUTH_MODE=token here and give the cluster's own token by "
    "RAY_AUTH_TOKEN, by RAY_AUTH_TOKEN_PATH, or in ~/.ray/auth_token"
)
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""What an HTTP/2 client says first, with empty settings (RFC 9113, section 3.4)."""
SETTINGS = 4
"""Type of the frame with which every HTTP/2 server, and so every gRPC server, begins (RFC 9113, section 6.5)."""


class Unreachable(RunError):
    """A cluster cannot be reached; `problem` says why and what to do."""

    def __init__(self, address: str, problem: str) -> None:
        super().__init__(address, problem)
        self.address, self.problem = address, problem

    def __str__(self) -> str:
        return f"cannot reach a Ray cluster at {self.address}: {self.problem}"


def reach(address: str, should_stop: Callable[[], bool] = lambda: False) -> str:
    """Find out whether a cluster answers at this address.

    Args:
        address: `HOST:PORT` of a head, `ray://HOST:PORT` of a Ray Client server, or `auto`.
        should_stop: asked ten times a second; True gives up at once.

    Returns:
        The address with `auto` resolved.

    Raises:
        Unreachable: nothing answers there within `LIMIT_S`, or it is no Ray cluster of this version.
        Interrupted: `should_stop` said so.
    """
    found: list[str | BaseException] = []

    def look() -> None:
        try:
            found.append(_look(address))
        except BaseException as error:  # noqa: BLE001 - a boundary: raised below, on the thread that asked
            found.append(error)

    # Beside, since a resolver answers when it likes and cannot be interrupted.
    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    deadline = time.monotonic() + LIMIT_S
    while not found:
        if should_stop():
            raise Interrupted(f"stopped while connecting to {address}; nothing had begun")
        if time.monotonic() > deadline:
            raise Unreachable(address, f"no answer within {LIMIT_S:.0f} s; {CURE}")
        thread.join(LOOK_S)
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


def explain(address: str, error: BaseException) -> Unreachable:
    """The error of Ray's own connection in one line, with the token named where it is about the token."""
    text = " ".join(str(error).split()) or type(error).__name__
    if "token" in text.lower() or "authenticat" in text.lower():
        return Unreachable(address, f"{text}; {TOKEN_CURE}")
    return Unreachable(address, f"{text}; mend that, or give the --address of another cluster")


def _look(address: str) -> str:
    if address == AUTO:
        try:
            return _look(head.local_address())
        except ConnectionError as error:
            here = os.environ.get("RAY_ADDRESS")
            where = f"RAY_ADDRESS is {here}" if here else "no cluster was started on this machine"
            raise Unreachable(address, f"{where}; {CURE}") from error
    scheme, _, rest = address.rpartition("://")
    if scheme not in ("", "ray"):
        raise Unreachable(
            address, f"{scheme}:// is not what Ray's heads speak; give HOST:6379, ray://HOST:10001 or auto"
        )
    host, port = _split(address, rest)
    _connect(address, host, port, client=scheme == "ray")
    if scheme == "":
        _ask_head(address, f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    return address


def _split(address: str, rest: str) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{rest}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port:
        raise Unreachable(address, "it has no port; give HOST:PORT, such as 10.0.0.1:6379, ray://HOST:10001, or auto")
    return host, port


def _connect(address: str, host: str, port: int, *, client: bool) -> None:
    """Open a connection; of a Ray Client server also see that it speaks HTTP/2, as gRPC does, unless by TLS."""
    try:
        with socket.create_connection((host, port), timeout=CONNECT_S) as line:
            if not client or _uses_tls():
                return
            line.sendall(PREFACE)
            answer = line.recv(9)
    except socket.gaierror as error:
        raise Unreachable(address, f"the name {host!r} is unknown ({error.strerror}); {CURE}") from error
    except OSError as error:
        why = error.strerror or "no answer"
        raise Unreachable(address, f"{why.lower()}; {CURE}") from error
    if len(answer) < 4 or answer[3] != SETTINGS:
        raise Unreachable(address, f"something else than Ray listens there; {CURE}")


def _uses_tls() -> bool:
    """Whether this process speaks TLS with Ray: decided as Ray's own client and gRPC channels do."""
    return os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")


def _ask_head(address: str, target: str) -> None:
    """Ask the head's global control service whether it lives, and which version it is."""
    try:
        version = head.version(target, HEALTH_S)
    except grpc.RpcError as error:
        raise Unreachable(address, _refusal(error)) from error
    except Exception as error:  # the interceptor that adds the token raises what it likes
        raise explain(address, error) from error
    if version and version != ray.__version__:
        got = f"it runs Ray {version}, this process Ray {ray.__version__}"
        raise Unreachable(address, f"{got}; install the same version on both sides")


def _refusal(error: grpc.RpcError) -> str:
    """What a failed call means."""
    code, details = error.code(), " ".join((error.details() or "").split())
    if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        return f"it refuses the token of this process ({details}); {TOKEN_CURE}"
    if code == grpc.StatusCode.UNIMPLEMENTED:
        return f"what listens there is no head of Ray; a Ray Client server (port 10001) wants {CLIENT}HOST:PORT"
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"it accepts connections but does not answer within {HEALTH_S:.0f} s; {CURE}"
    return f"something else than Ray listens there; {CURE}"
