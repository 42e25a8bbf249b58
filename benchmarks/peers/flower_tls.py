"""Flower's SuperLink with TLS and authenticated SuperNodes, and one SuperNode, exchanging parameters without training.

    python flower_tls.py ROUNDS FOLDER SIZE...

Prints one line of JSON: the seconds of every round, by size, as the strategy sees them.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import flwr
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

PROJECT = """
[project]
name = "exchange"
version = "1.0.0"
description = "An exchange without training"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "bench"

[tool.flwr.app.components]
serverapp = "exchange:server"
clientapp = "exchange:client"

[tool.flwr.app.config]
size = 1
rounds = 1
out = ""
"""
BIN = Path(sys.executable).parent


def keys(folder: Path) -> None:
    """A CA, the server's certificate from it, and the SuperNode's key pair."""
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    ca, server = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "bench")])
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    for key, extension, name in (
        (ca, x509.BasicConstraints(ca=True, path_length=0), "ca"),
        (server, address, "server"),
    ):
        subject = issuer if name == "ca" else x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
        number = x509.random_serial_number()
        made = x509.CertificateBuilder(issuer, subject, key.public_key(), number, now - day, now + day)
        signed = made.add_extension(extension, critical=name == "ca").sign(ca, hashes.SHA256())
        (folder / f"{name}.crt").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    pem, none = serialization.Encoding.PEM, serialization.NoEncryption()
    (folder / "server.key").write_bytes(server.private_bytes(pem, serialization.PrivateFormat.PKCS8, none))
    node = ec.generate_private_key(ec.SECP384R1())
    (folder / "node").write_bytes(node.private_bytes(pem, serialization.PrivateFormat.OpenSSH, none))
    public = node.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    (folder / "node.pub").write_bytes(public)
    (folder / "node").chmod(0o600)


def free_port() -> int:
    """A port that nothing listens at now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def main() -> None:
    """One size after the other."""
    rounds, folder, sizes = int(sys.argv[1]), Path(sys.argv[2]), [int(size) for size in sys.argv[3:]]
    keys(folder)
    package = folder / "app" / "exchange"
    package.mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("flower_apps.py"), package / "__init__.py")
    (folder / "app" / "pyproject.toml").write_text(PROJECT)
    port, runtime = free_port(), free_port()
    (folder / "config.toml").write_text(
        f'[superlink]\ndefault = "bench"\n[superlink.bench]\naddress = "127.0.0.1:{port}"\n'
        f'root-certificates = "{folder}/ca.crt"\n'
    )
    env = os.environ | {"FLWR_HOME": str(folder), "HOME": str(folder), "PATH": f"{BIN}:{os.environ['PATH']}"}
    log = (folder / "log").open("w")
    processes: list[subprocess.Popen[bytes]] = []

    def begin(*command: str) -> None:
        options = {"stdout": log, "stderr": log, "env": env, "cwd": folder}
        processes.append(subprocess.Popen(command, **options))

    def flower(*words: str) -> bool:
        """Run `flwr`; returns whether it has succeeded."""
        return not subprocess.run([BIN / "flwr", *words], stdout=log, stderr=log, env=env, cwd=folder).returncode

    try:
        tls = ("--ssl-certfile", "server.crt", "--ssl-keyfile", "server.key", "--ssl-ca-certfile", "ca.crt")
        begin(
            str(BIN / "flower-superlink"),
            *tls,
            "--enable-supernode-auth",
            "--disable-runtime-dependency-installation",
            *("--port", str(port)),
        )
        for _ in range(30):
            if flower("supernode", "register", "node.pub", "bench"):
                break
            time.sleep(2.0)
        begin(
            *(str(BIN / "flower-supernode"), "--root-certificates", "ca.crt", "--superlink", f"127.0.0.1:{port}"),
            *("--auth-supernode-private-key", "node", "--port", str(runtime)),
        )
        found = {}
        for size in sizes:
            out = folder / f"{size}.json"
            if not flower("run", "app", "bench", "--run-config", f"size={size} rounds={rounds} out='{out}'"):
                sys.exit((folder / "log").read_text()[-2_000:])
            deadline = time.monotonic() + 900
            while not out.exists() and time.monotonic() < deadline:
                time.sleep(0.5)
            if not out.exists():
                sys.exit((folder / "log").read_text()[-2_000:])
            found[size] = json.loads(out.read_text())
        print(json.dumps({"version": flwr.__version__, "rounds_s": found}))
    finally:
        for process in reversed(processes):
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20.0)
        _end_all(folder)


def _end_all(folder: Path) -> None:
    """End what Flower has started in other sessions, by the folder in its environment."""
    for file in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"FLWR_HOME={folder}".encode() in file.read_bytes().split(b"\0"):
                os.kill(int(file.parent.name), signal.SIGKILL)


if __name__ == "__main__":
    main()
