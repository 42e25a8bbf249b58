"""A world with a gateway's folder, members of it in temporary folders, and TLS between the two without a network."""

from __future__ import annotations

import json
import ssl
import time
from collections.abc import Sequence
from pathlib import Path

from worldlm_ray.gateway import certificates, identity, keys, profile
from worldlm_ray.gateway.authority import Authority
from worldlm_ray.gateway.keys import Clock
from worldlm_ray.gateway.profile import Profile

PASSPHRASE = "correct horse"
HOSTS = ("localhost", "127.0.0.1")
HOUR_S = 3_600.0


class FakeClock:
    """Unix seconds that move when a test says so; begins now, since TLS looks at the machine's clock."""

    def __init__(self) -> None:
        self.now_s = float(int(time.time()))

    def __call__(self) -> float:
        return self.now_s

    def tick(self, *, hours: float = 0.0, days: float = 0.0) -> None:
        self.now_s += hours * HOUR_S + days * 24 * HOUR_S


def make_world(folder: Path, *, clock: Clock = time.time, port: int = 8_443, hosts: Sequence[str] = HOSTS) -> Authority:
    """A world whose server is called localhost or 127.0.0.1, unless a test says otherwise."""
    identity.init(folder, "acme", hosts, PASSPHRASE, port=port, clock=clock)
    return Authority(folder, clock=clock)


def make_member(world: Authority, folder: Path, path: str = "world/europe", *, clock: Clock = time.time) -> Profile:
    """A member that has enrolled, by an invitation: its profile lies in the folder."""
    invitation = world.invite(path, expires_s=HOUR_S, by="a test")
    member = profile.begin(folder, invitation, world.identity.root_pem, clock=clock)
    request = member.request()
    member.install(world.enrol(request, invitation.id, invitation.proof(request)).chain_pem)
    return member


def moved_to(folder: Path, port: int) -> Profile:
    """A member's profile, for a gateway that listens at another port."""
    file = folder / profile.FACTS
    file.write_text(json.dumps(json.loads(file.read_text()) | {"url": f"https://localhost:{port}"}))
    return Profile(folder)


def shown_by(member: Profile) -> bytes:
    """The certificate that a member shows, in DER."""
    return ssl.PEM_cert_to_DER_cert(_first_certificate(member.identity_file.read_text()))


def _first_certificate(text: str) -> str:
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    return begin + text.partition(begin)[2].partition(end)[0] + end


def request() -> bytes:
    """A certificate signing request of a new key, in DER."""
    return certificates.make_request(keys.new_key())


def contents(folder: Path) -> dict[str, bytes]:
    """All files of the gateway but the one that is lost without harm."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "seen.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def journal(world: Authority) -> list[tuple[str, str]]:
    """Event and path of each line of a world's journal."""
    lines = (world.identity.folder / "journal.jsonl").read_text().splitlines()
    return [(line["event"], line["path"]) for line in map(json.loads, lines)]


class Handshake:
    """Both ends of a TLS connection in memory, after the handshake and one message each way.

    Args:
        server: the server's context.
        client: the client's.
        name: by which the client calls the server.

    Raises:
        ssl.SSLError: one side refuses the other.
    """

    def __init__(self, server: ssl.SSLContext, client: ssl.SSLContext, *, name: str = "localhost") -> None:
        up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.server = server.wrap_bio(up, down, server_side=True)
        self.client = client.wrap_bio(down, up, server_hostname=name)
        waiting = [self.client, self.server]
        while waiting:
            waiting = [end for end in waiting if not _shaken(end)]
        for sender, receiver in ((self.client, self.server), (self.server, self.client)):
            sender.write(b"hello")
            assert receiver.read(5) == b"hello"

    @property
    def member(self) -> bytes | None:
        """The client's certificate as the server sees it, in DER."""
        return self.server.getpeercert(binary_form=True)

    @property
    def seen_server(self) -> bytes:
        """The server's certificate as the client sees it, in DER."""
        found = self.client.getpeercert(binary_form=True)
        assert found is not None
        return found


def _shaken(end: ssl.SSLObject) -> bool:
    try:
        end.do_handshake()
    except ssl.SSLWantReadError:
        return False
    return True
