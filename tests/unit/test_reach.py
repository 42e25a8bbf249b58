"""Whether a Ray cluster answers at an address: found out in seconds, and said in one line."""

from __future__ import annotations

import contextlib
import pickle
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
import ray
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from worldlm_ray.errors import Interrupted, RunError
from worldlm_ray.launch import reach
from worldlm_ray.launch.private import VERSION, check_version
from worldlm_ray.launch.reach import Unreachable


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine of the test may have a cluster, or settings."""
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_USE_TLS"):
        monkeypatch.delenv(name, raising=False)


def free_port() -> int:
    with socket.socket() as line:
        line.bind(("127.0.0.1", 0))
        return int(line.getsockname()[1])


def refused(address: str) -> str:
    began = time.monotonic()
    with pytest.raises(Unreachable) as found:
        reach.reach(address)
    assert time.monotonic() - began < 15.0
    text = str(found.value)
    assert "\n" not in text
    assert str(pickle.loads(pickle.dumps(found.value))) == text
    return text


@contextlib.contextmanager
def listener(answer: bytes | None) -> Iterator[int]:
    """A port that accepts connections, and says something or nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept: list[socket.socket] = []

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    line, _ = server.accept()
                    kept.append(line)
                    if answer is not None:
                        line.sendall(answer)
                        line.close()

        threading.Thread(target=serve, daemon=True).start()
        yield int(server.getsockname()[1])
        for line in kept:
            line.close()


@contextlib.contextmanager
def head(*, version: str = ray.__version__, refusal: grpc.StatusCode | None = None) -> Iterator[int]:
    """What a head of Ray answers to the question whether it lives."""

    class Service(gcs_service_pb2_grpc.NodeInfoGcsServiceServicer):  # type: ignore[misc]
        def CheckAlive(self, request: Any, context: Any) -> Any:
            if refusal is not None:
                context.abort(refusal, "InvalidAuthToken")
            return gcs_service_pb2.CheckAliveReply(ray_version=version)

    server = grpc.server(ThreadPoolExecutor(2))
    gcs_service_pb2_grpc.add_NodeInfoGcsServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield port
    server.stop(None)


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_port_where_nothing_listens(scheme: str) -> None:
    address = f"{scheme}127.0.0.1:{free_port()}"
    text = refused(address)
    assert text.startswith(f"cannot reach a Ray cluster at {address}: connection refused; ")
    assert "ray start --head" in text


def test_a_name_that_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert "the name 'nowhere' is unknown" in refused("nowhere:6379")


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.1:port", "10.0.0.1:", ":6379", "http://10.0.0.1:8265"])
def test_what_is_no_address(address: str) -> None:
    assert "HOST:" in refused(address)


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_port_where_something_else_listens(scheme: str) -> None:
    with listener(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n") as port:
        assert "something else than Ray listens there" in refused(f"{scheme}127.0.0.1:{port}")


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_port_that_never_answers(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "CONNECT_S", 0.5)
    monkeypatch.setattr(reach, "HEALTH_S", 0.5)
    with listener(None) as port:
        assert "answer" in refused(f"{scheme}127.0.0.1:{port}")


def test_a_head_that_lives_is_reached() -> None:
    with head() as port:
        assert reach.reach(f"127.0.0.1:{port}") == f"127.0.0.1:{port}"
        # It speaks gRPC, which is all that can be seen of a Ray Client server beforehand.
        assert reach.reach(f"ray://127.0.0.1:{port}") == f"ray://127.0.0.1:{port}"


@pytest.mark.parametrize("value", ["1", "TRUE"])
def test_a_ray_client_server_with_tls_is_left_to_rays_own_client(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers a plain preface with an alert, or not at all."""
    alert = bytes([21, 3, 3, 0, 2, 2, 10])
    with listener(alert) as port:
        address = f"ray://127.0.0.1:{port}"
        assert "something else than Ray" in refused(address)
        monkeypatch.setenv("RAY_USE_TLS", value)
        assert reach.reach(address) == address


def test_a_head_of_another_version_is_named_with_both() -> None:
    with head(version="2.9.3") as port:
        assert f"it runs Ray 2.9.3, this process Ray {ray.__version__}" in refused(f"127.0.0.1:{port}")


def test_a_refused_token_is_called_one() -> None:
    with head(refusal=grpc.StatusCode.UNAUTHENTICATED) as port:
        text = refused(f"127.0.0.1:{port}")
    assert "refuses the token" in text
    for name in ("RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token"):
        assert name in text


def test_another_service_of_grpc_is_no_head() -> None:
    with head(refusal=grpc.StatusCode.UNIMPLEMENTED) as port:
        assert "no head of Ray" in refused(f"127.0.0.1:{port}")


def test_auto_without_a_cluster_and_with_a_dead_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise ConnectionError("Could not find any running Ray instance")

    monkeypatch.setattr(reach.head, "local_address", none)
    assert "no cluster was started on this machine" in refused("auto")
    dead = f"127.0.0.1:{free_port()}"
    monkeypatch.setattr(reach.head, "local_address", lambda: dead)
    assert f"at {dead}: connection refused" in refused("auto")


def test_a_resolver_that_hangs_is_given_up_and_left_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    free = threading.Event()
    monkeypatch.setattr(reach, "_look", lambda _: str(free.wait(30.0)))
    monkeypatch.setattr(reach, "LIMIT_S", 0.3)
    assert "no answer within" in refused("slow:6379")
    with pytest.raises(Interrupted, match="nothing had begun"):
        reach.reach("slow:6379", lambda: True)
    free.set()


def test_the_error_of_rays_own_connection_becomes_one_line() -> None:
    error = RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.60.0\n    Python: 3.12.1")
    assert "started with: Ray: 2.60.0 Python: 3.12.1; mend that" in str(reach.explain("h:1", error))
    assert "RAY_AUTH_MODE=token" in str(reach.explain("h:1", RuntimeError("Authentication failed")))
    assert isinstance(reach.explain("h:1", error), RunError)


def test_another_minor_version_of_ray_is_refused_with_the_command_that_cures_it() -> None:
    check_version(f"{VERSION}.9")
    with pytest.raises(RunError, match=f"Ray 2.61.0 is installed.*pip install .*{VERSION}"):
        check_version("2.61.0")
