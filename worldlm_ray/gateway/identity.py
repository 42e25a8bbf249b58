"""A world's keys: a folder beside its YAML, made by `worldlm gateway init`.

    gateway.json    name, world id, host names, port
    root.key        the root's key, under a passphrase; it may be kept elsewhere, and is needed at `rotate` only
    root.pem        the root's certificate: members pin it
    issuing.pem     issuing key and certificate
    server.pem      the server's key, its certificate and the issuing certificate

Further files of the folder belong to the registry and to invitations. Files with keys have mode 0600.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cryptography import x509

from worldlm_ray.errors import GatewayError
from worldlm_ray.gateway import certificates
from worldlm_ray.gateway.certificates import Signer
from worldlm_ray.gateway.keys import (
    Clock,
    PrivateKey,
    key_pem,
    new_key,
    read_facts,
    read_file,
    read_private,
    write_private,
)
from worldlm_ray.storage.filesystem import make_folder, replace_text

FORMAT = 1
PORT = 8_443
LEAST_PASSPHRASE = 8
"""Characters."""
LONGEST_NAME = 40
"""Characters of a world's name: a subject has 64, with what stands behind it."""
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|[0-9a-fA-F:.]{2,45}")
WRITER = "worldlm gateway init"
FACTS, ROOT_KEY, ROOT, ISSUING, SERVER = "gateway.json", "root.key", "root.pem", "issuing.pem", "server.pem"


class Identity:
    """The keys of one world, as its folder has them.

    Args:
        folder: made by `init`.
        clock: Unix seconds.

    Raises:
        GatewayError: the folder is missing or damaged.
    """

    def __init__(self, folder: Path, *, clock: Clock = time.time) -> None:
        self.folder, self.clock = folder, clock
        facts = _facts(folder / FACTS)
        self.name: str = facts["name"]
        """Of the world, for people."""
        self.names: list[str] = facts["names"]
        """Host names by which members call the server; the first stands in invitations."""
        self.port: int = facts["port"]
        [self.root, *_] = certificates.read_pem(read_file(folder / ROOT), folder / ROOT)
        self.world = certificates.world_id(self.root)
        """The world's id: SHA-256 of the root's public key, in hex."""
        if facts["world"] != self.world:
            raise GatewayError(f"{folder / ROOT}: is not the root of {FACTS}; restore the folder from a copy")

    @property
    def url(self) -> str:
        """Where members find the server."""
        host = f"[{self.names[0]}]" if ":" in self.names[0] else self.names[0]
        return f"https://{host}:{self.port}"

    @property
    def root_pem(self) -> bytes:
        """The root's certificate: public, and what a server answers to a member that is about to join."""
        return certificates.pem(self.root)

    @property
    def server_file(self) -> Path:
        """Key and chain of the server, as PEM."""
        return self.folder / SERVER

    def issuing(self) -> Signer:
        """The issuing key of now: read anew, since another process may have rotated it.

        Raises:
            GatewayError: it is missing, damaged or over.
        """
        path = self.folder / ISSUING
        key, content = read_private(path)
        [certificate, *_] = certificates.read_pem(content, path)
        if self.clock() >= certificates.end_of(certificate):
            raise GatewayError(f"{path}: the issuing certificate is over; run `worldlm gateway rotate`")
        return Signer(key, certificate)

    def issuing_days(self) -> float:
        """Days until the issuing certificate ends; it is to be rotated before."""
        [certificate, *_] = certificates.read_pem(read_file(self.folder / ISSUING), self.folder / ISSUING)
        return (certificates.end_of(certificate) - self.clock()) / certificates.DAY_S

    def server(self) -> tuple[PrivateKey, x509.Certificate]:
        """Key and certificate of the server: they also sign verdicts.

        Raises:
            GatewayError: they are missing or damaged.
        """
        key, content = read_private(self.server_file)
        return key, certificates.read_pem(content, self.server_file)[0]

    def renew_server(self) -> bool:
        """Make the server a new key and certificate, if it has none or two thirds of its life are over.

        Returns:
            Whether it has been renewed: a context that has loaded the old one must load `server_file` again.

        Raises:
            GatewayError: as `issuing`.
        """
        issuing = self.issuing()
        if self.server_file.exists():
            _, old = self.server()
            same = certificates.generation_of(old) == generation(issuing.certificate)
            if same and not certificates.is_worn(old, now_s=self.clock()):
                return False
        key = new_key()
        certificate = certificates.make_server(issuing, key.public_key(), self.names, now_s=self.clock())
        write_private(self.server_file, key_pem(key) + certificates.pem(certificate, issuing.certificate))
        return True

    def rotate(self, passphrase: str) -> int:
        """Replace the issuing key. Certificates of members stay good until they end; the old key makes no more.

        Members that have heard the new server refuse one that the old key made.

        Args:
            passphrase: of the root's key.

        Returns:
            The new key's generation.

        Raises:
            GatewayError: the root's key is missing or the passphrase is another one.
        """
        root = Signer(read_private(self.folder / ROOT_KEY, passphrase)[0], self.root)
        path = self.folder / ISSUING
        old = certificates.read_pem(read_file(path), path)[0]
        number = generation(old) + 1
        _write_issuing(path, root, self.name, number, now_s=self.clock())
        self.renew_server()
        return number


def init(
    folder: Path, name: str, names: Sequence[str], passphrase: str, *, port: int = PORT, clock: Clock = time.time
) -> Identity:
    """Make the keys of a world.

    Args:
        folder: must not hold a world yet.
        name: of the world, for people.
        names: host names or addresses of the server; the first stands in invitations.
        passphrase: for the root's key.
        port: of the server, as members reach it.
        clock: Unix seconds.

    Raises:
        GatewayError: there is a world already, a name or the passphrase cannot be used, or the storage refused.
    """
    if (folder / FACTS).exists():
        raise GatewayError(f"{folder}: holds a world already; give another folder by --dir")
    if not names:
        raise GatewayError("--name: members need a name to call; give the host name of the gateway's machine")
    for host in names:
        if not _HOST.fullmatch(host):
            raise GatewayError(f"--name: {host!r} is no host name; give one such as gw.acme.org, or an address")
    if not 0 < len(name) <= LONGEST_NAME:
        raise GatewayError(f"WORLD: a name of 1 to {LONGEST_NAME} characters is expected; got {len(name)}")
    if len(passphrase) < LEAST_PASSPHRASE:
        raise GatewayError(f"the passphrase is too short; give at least {LEAST_PASSPHRASE} characters")
    if not 0 < port < 65_536:
        raise GatewayError(f"--port: {port} is no port; give one from 1 to 65535")
    now_s, key = clock(), new_key()
    try:
        root = Signer(key, certificates.make_root(key, name, now_s=now_s))
        make_folder(folder)
        folder.chmod(0o700)
        write_private(folder / ROOT_KEY, key_pem(key, passphrase))
        write_private(folder / ROOT, certificates.pem(root.certificate))
        _write_issuing(folder / ISSUING, root, name, 1, now_s=now_s)
        facts = {"format": FORMAT, "name": name, "names": list(names), "port": port}
        facts["world"] = certificates.world_id(root.certificate)
        replace_text(folder / FACTS, json.dumps(facts, indent=2) + "\n", durable=True)  # last: the world is whole
    except OSError as error:
        raise GatewayError(f"{folder}: {error.strerror or error}; give a folder that can be written") from error
    identity = Identity(folder, clock=clock)
    identity.renew_server()
    return identity


def generation(issuing: x509.Certificate) -> int:
    """Which of a world's issuing keys a certificate is of."""
    identifier = issuing.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return int.from_bytes(identifier.digest[:4], "big")


def _write_issuing(path: Path, root: Signer, name: str, number: int, *, now_s: float) -> None:
    key = new_key()
    certificate = certificates.make_issuing(root, key.public_key(), name, number, now_s=now_s)
    write_private(path, key_pem(key) + certificates.pem(certificate))


def _facts(path: Path) -> dict[str, Any]:
    kinds = {"format": int, "name": str, "names": list, "port": int, "world": str}
    facts = read_facts(path, kinds, version=FORMAT, writer=WRITER)
    if not facts["names"] or not all(isinstance(name, str) for name in facts["names"]):
        raise GatewayError(f"{path}: is not what `{WRITER}` wrote; restore it from a copy")
    return facts
