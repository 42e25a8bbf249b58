"""The server of `worldlm dashboard`: one page and its data, read-only. No file of a run folder is ever served."""

from __future__ import annotations

import base64
import errno
import hashlib
import ipaddress
import re
import socket
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path

from worldlm_ray.errors import ConfigError
from worldlm_ray.reports.dashboard import Dashboard

TIMEOUT_S = 10.0
"""For a request to arrive. A connection that stays silent keeps no thread for longer."""
METHODS = ("GET", "HEAD")


class Server(ThreadingHTTPServer):
    """Serves one run. Each answer closes its connection.

    A page of another site may point its name at this machine to read from here (DNS rebinding). So a request has to
    name the address that the server is bound to, or `localhost` where that is the machine itself.

    Args:
        run_dir: folder of the run.
        host: address to bind to.
        port: to bind to; 0 takes a free one.

    Raises:
        ConfigError: the address or the port cannot be bound.
    """

    def __init__(self, run_dir: Path, *, host: str = "127.0.0.1", port: int) -> None:
        page = files(__package__).joinpath("dashboard.html").read_text(encoding="utf-8")
        self.dashboard, self.page, self.policy = Dashboard(run_dir), page.encode(), _policy(page)
        try:
            self.address_family, _, _, _, (address, *_) = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            self.names = _names(host, str(address))
            super().__init__((str(address), port), Handler)
        except (OSError, OverflowError, UnicodeError) as error:
            raise _refused(host, port, error) from error
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self.server_port}/"

    def answers_to(self, host: str) -> bool:
        """Whether a Host header names this server. The port may be another: a tunnel has its own."""
        name = re.sub(r":\d*$", "", host.strip()).strip("[]").lower()
        return name in self.names or ("*" in self.names and _is_address(name))


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: Server
    timeout = TIMEOUT_S
    server_version, sys_version = "worldlm", ""

    def parse_request(self) -> bool:
        """Refuse, before anything else, another method and another host."""
        if not super().parse_request():
            return False
        hosts = self.headers.get_all("Host") or []
        if self.command not in METHODS:
            self._answer(HTTPStatus.METHOD_NOT_ALLOWED, b"this page is read-only\n")
        elif len(hosts) != 1 or not self.server.answers_to(hosts[0]):
            self._answer(HTTPStatus.MISDIRECTED_REQUEST, b"this server has another name: see --host\n")
        else:
            return True
        return False

    def do_GET(self) -> None:
        """The page, or its data."""
        match self.path.partition("?")[0]:
            case "/":
                self._answer(HTTPStatus.OK, self.server.page, kind="text/html")
            case "/data.json":
                self._answer(HTTPStatus.OK, self.server.dashboard.json(), kind="application/json")
            case _:
                self._answer(HTTPStatus.NOT_FOUND, b"there is only / and /data.json\n")

    do_HEAD = do_GET

    def _answer(self, status: HTTPStatus, body: bytes, *, kind: str = "text/plain") -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", self.server.policy)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        if status is HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", ", ".join(METHODS))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: the page asks every two seconds."""


def _policy(page: str) -> str:
    """A policy under which the page runs its one script and asks this server only.

    Source: Content Security Policy Level 3, w3.org/TR/CSP3.
    """
    hashes = {
        tag: " ".join(f"'sha256-{_sha256(part)}'" for part in re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL))
        for tag in ("script", "style")
    }
    return (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _names(host: str, address: str) -> set[str]:
    """What a Host header may say, in lower case. `*` stands for any address that is a number: no name leads there."""
    names, bound = {host.lower(), address}, ipaddress.ip_address(address.partition("%")[0])
    if bound.is_loopback or bound.is_unspecified:
        names |= {"localhost", "127.0.0.1", "::1"}
    if bound.is_unspecified:
        names |= {"*", socket.gethostname().lower(), socket.getfqdn().lower()}
    return names


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _refused(host: str, port: int, error: Exception) -> ConfigError:
    """Which option names what cannot be bound."""
    number = error.errno if isinstance(error, OSError) and not isinstance(error, socket.gaierror) else None
    if number in (errno.EADDRINUSE, errno.EACCES) or isinstance(error, OverflowError):
        why = "is taken" if number == errno.EADDRINUSE else "is not allowed"
        return ConfigError("--port", f"{port} {why}", "give another one, or 0 for any that is free")
    return ConfigError("--host", f"cannot listen on {host!r}: {error}", "give an address of this machine")
