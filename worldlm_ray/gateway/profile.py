"""A member's side: its key, its certificate, and the world that it has joined. The key never leaves the folder.

    profile.json    url, world id, path, the invitation's id, newest generation of the world's issuing key
    root.pem        the world's root: the only one that the member accepts
    identity.pem    the member's key, its certificate and the issuing certificate (0600)
    pending.pem     a key and its certificate signing request that have no answer yet (0600)
    charters/       the world's charters by epoch (charter.py)
    policy.yaml     what the member refuses (policy.py)

Further files are the operator's word (standing.py) and the log of what has left (sent.py).
A request is kept until its answer has come: asked again, the world gives the same certificate.
"""

from __future__ import annotations

import base64
import json
import time
from pathlib import Path
from typing import Any

from cryptography import x509

from worldlm_ray.errors import GatewayError, Refused
from worldlm_ray.gateway import certificates
from worldlm_ray.gateway.certificates import DAY_S
from worldlm_ray.gateway.charter import Charters
from worldlm_ray.gateway.invitation import Invitation
from worldlm_ray.gateway.keys import (
    Clock,
    PrivateKey,
    certificate_key,
    fingerprint,
    key_pem,
    new_key,
    read_facts,
    read_file,
    read_private,
    write_private,
)
from worldlm_ray.storage.filesystem import make_folder, replace_text

FORMAT = 1
FACTS, ROOT, IDENTITY, PENDING = "profile.json", "root.pem", "identity.pem", "pending.pem"
_BEGIN, _END = b"-----BEGIN CERTIFICATE REQUEST-----\n", b"-----END CERTIFICATE REQUEST-----\n"


class Profile:
    """What a member keeps of one world.

    Args:
        folder: made by `begin`.
        clock: Unix seconds.

    Raises:
        GatewayError: the folder is missing or damaged.
    """

    def __init__(self, folder: Path, *, clock: Clock = time.time) -> None:
        self.folder, self.clock = folder, clock
        facts = _facts(folder / FACTS)
        self.url: str = facts["url"]
        """Of the world's gateway."""
        self.world: str = facts["world"]
        """World id, in hex."""
        self.path: str = facts["path"]
        """The member's."""
        self.invitation: str = facts["invitation"]
        """Id of the newest invitation that the member has followed."""
        self.generation: int = facts["generation"]
        """Of the newest issuing key that the member has met."""
        self.root_pem = read_file(folder / ROOT).decode(errors="replace")
        [self.root, *_] = certificates.read_pem(self.root_pem.encode(), folder / ROOT)
        if certificates.world_id(self.root) != self.world:
            raise GatewayError(f"{folder / ROOT}: is not the root of {FACTS}; restore the folder from a copy")
        self.charters = Charters(folder, self.root)
        """That the world has shown."""

    @property
    def identity_file(self) -> Path:
        """Key and chain of the member, as PEM."""
        return self.folder / IDENTITY

    @property
    def has_joined(self) -> bool:
        """Whether there is a certificate."""
        return self.identity_file.exists()

    def identity(self) -> tuple[PrivateKey, x509.Certificate, x509.Certificate]:
        """The member's key, its certificate, and the issuing certificate.

        Raises:
            GatewayError: there is none, or the file is damaged.
        """
        key, content = read_private(self.identity_file)
        chain = certificates.read_pem(content, self.identity_file)
        if len(chain) != 2 or fingerprint(certificate_key(chain[0])) != fingerprint(key.public_key()):
            raise GatewayError(f"{self.identity_file}: key and certificate do not fit; restore it from a copy")
        return key, chain[0], chain[1]

    def days_left(self) -> float:
        """Days until the certificate ends."""
        return (certificates.end_of(self.identity()[1]) - self.clock()) / DAY_S

    def wants_renewal(self) -> bool:
        """Whether two thirds of the certificate's life are over."""
        return certificates.is_worn(self.identity()[1], now_s=self.clock())

    def request(self) -> bytes:
        """The certificate signing request (DER) of a new key; the same one until `install` has its answer.

        Raises:
            GatewayError: the storage refused.
        """
        path = self.folder / PENDING
        if path.exists():
            return self._pending()[1]
        key = new_key()
        request = certificates.make_request(key)
        write_private(path, key_pem(key) + _BEGIN + base64.encodebytes(request) + _END)
        return request

    def install(self, chain_pem: bytes) -> None:
        """Take the answer to `request`: the member's certificate and the issuing certificate.

        Raises:
            Refused: bad_certificate or wrong_world: it is not for this key, this world and this path.
            GatewayError: there is no request, or the storage refused.
        """
        key, _ = self._pending()
        try:
            certificate, issuing = certificates.read_pem(chain_pem, self.url)
        except (GatewayError, ValueError) as error:
            raise Refused("bad_certificate", f"{self.url} answers without two certificates") from error
        certificates.check_issued(certificate, issuing, self.root)
        if certificates.member_of(certificate) != (self.world, self.path):
            raise Refused("bad_certificate", f"{self.url} answers by the certificate of another member")
        if fingerprint(certificate_key(certificate)) != fingerprint(key.public_key()):
            raise Refused("bad_certificate", f"{self.url} answers by the certificate of another key")
        self._check_generation(certificate)
        write_private(self.identity_file, key_pem(key) + certificates.pem(certificate, issuing))
        (self.folder / PENDING).unlink()

    def check_server(self, certificate: bytes) -> None:
        """Refuse a server whose certificate an older issuing key has made than the newest that this member has met.

        TLS has checked the chain and the host name before.

        Args:
            certificate: the server's, in DER.

        Raises:
            Refused: bad_certificate or old_issuing_key.
        """
        self._check_generation(certificates.read_der(certificate))

    def _check_generation(self, certificate: x509.Certificate) -> None:
        met = certificates.generation_of(certificate)
        if met < self.generation:
            got = f"{self.url} shows a certificate of issuing key {met}, and {self.generation} is known"
            raise Refused("old_issuing_key", f"{got}: it may be stolen; ask the world's operator")
        if met > self.generation:
            self.generation = met
            _change_facts(self.folder, generation=met)

    def _pending(self) -> tuple[PrivateKey, bytes]:
        path = self.folder / PENDING
        key, content = read_private(path)
        try:
            body = content.split(_BEGIN)[1].split(_END)[0]
            request = base64.b64decode(body)
            found = fingerprint(certificates.read_request(request))
        except (IndexError, ValueError, Refused) as error:
            raise GatewayError(f"{path}: is damaged; remove it, and ask for a new invitation") from error
        if found != fingerprint(key.public_key()):
            raise GatewayError(f"{path}: is damaged; remove it, and ask for a new invitation")
        return key, request


def joined(folder: Path, *, clock: Clock = time.time) -> Profile:
    """A profile that has a certificate.

    Args:
        folder: of the profile.
        clock: Unix seconds.

    Raises:
        GatewayError: there is none, or it has not joined yet.
    """
    cure = f"run `worldlm gateway join LINE --dir {folder}`"
    if not folder.is_dir():
        raise GatewayError(f"{folder}: there is no such profile; {cure}")
    profile = Profile(folder, clock=clock)
    if not profile.has_joined:
        raise GatewayError(f"{folder}: has no certificate yet; {cure} again")
    return profile


def begin(folder: Path, invitation: Invitation, root_pem: bytes, *, clock: Clock = time.time) -> Profile:
    """Make the folder of a member that is about to join; begun before for the same world and path, go on.

    Args:
        folder: of this profile alone.
        invitation: names world, path and address.
        root_pem: what the world's server calls its root.
        clock: Unix seconds.

    Raises:
        Refused: wrong_world: another root.
        GatewayError: the folder belongs to another world or path, or the storage refused.
    """
    root = invitation.check_root(root_pem)
    if (folder / FACTS).exists():
        known = _facts(folder / FACTS)
        if (known["world"], known["path"]) != (invitation.world, invitation.path):
            raise GatewayError(f"{folder}: is the profile of {known['path']} in another world; give another name")
    try:
        make_folder(folder)
        folder.chmod(0o700)
        replace_text(folder / ROOT, root, durable=True)
    except OSError as error:
        raise GatewayError(f"{folder}: {error.strerror or error}; give a folder that can be written") from error
    _change_facts(folder, url=invitation.url, world=invitation.world, path=invitation.path, invitation=invitation.id)
    return Profile(folder, clock=clock)


def _change_facts(folder: Path, **changes: Any) -> None:
    known = _facts(folder / FACTS) if (folder / FACTS).exists() else {"format": FORMAT, "generation": 1}
    try:
        replace_text(folder / FACTS, json.dumps(known | changes, indent=2) + "\n", durable=True)
    except OSError as error:
        raise GatewayError(f"{folder}: {error.strerror or error}; give a folder that can be written") from error


def _facts(path: Path) -> dict[str, Any]:
    kinds = {"format": int, "url": str, "world": str, "path": str, "invitation": str, "generation": int}
    return read_facts(path, kinds, version=FORMAT, writer="worldlm gateway join")
