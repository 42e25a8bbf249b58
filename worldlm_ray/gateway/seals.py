"""Signatures over a border: a member signs its pushes, the world's server its verdicts.

They do not depend on a connection, nor on a clock: the owner of a receipt can show later what was pushed and what
became of it. A verdict comes with the certificates of its signer, since a server's key is renewed every few weeks.
"""

from __future__ import annotations

from typing import Protocol

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from worldlm_ray.errors import GatewayError, Refused
from worldlm_ray.gateway import certificates, keys
from worldlm_ray.gateway.identity import Identity
from worldlm_ray.gateway.profile import Profile


class WorldSeal(Protocol):
    """Signatures of the world's side."""

    @property
    def chain(self) -> bytes:
        """Certificates of the signer, PEM."""
        ...

    def sign(self, data: bytes) -> bytes:
        """The signature of some bytes."""
        ...

    def verify(self, path: str, chain: bytes, signature: bytes, data: bytes) -> None:
        """Check that the member at a path has signed some bytes; raises Refused."""
        ...


class MemberSeal(Protocol):
    """Signatures of the member's side."""

    @property
    def chain(self) -> bytes:
        """Certificates of the signer, PEM."""
        ...

    def sign(self, data: bytes) -> bytes:
        """The signature of some bytes."""
        ...

    def verify(self, chain: bytes, signature: bytes, data: bytes) -> None:
        """Check that the world's server has signed some bytes; raises Refused."""
        ...


class ServerKey:
    """Signs by the key of the world's server.

    Args:
        identity: the world's.
    """

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self.reload()

    def reload(self) -> None:
        """The server's key has been renewed.

        Raises:
            GatewayError: its file is damaged.
        """
        key, content = keys.read_private(self._identity.server_file)
        self._key = key
        self.chain = certificates.pem(*certificates.read_pem(content, self._identity.server_file))
        """See WorldSeal."""

    def sign(self, data: bytes) -> bytes:
        """See WorldSeal."""
        return keys.sign(self._key, data)

    def verify(self, path: str, chain: bytes, signature: bytes, data: bytes) -> None:
        """See WorldSeal."""
        check_push(self._identity.root, path, chain, signature, data)


class MemberKey:
    """Signs by the key of a member.

    Args:
        profile: the member's.
    """

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self.reload()

    def reload(self) -> None:
        """The member's key has been renewed.

        Raises:
            GatewayError: its file is damaged.
        """
        self._key, *chain = self._profile.identity()
        self.chain = certificates.pem(*chain)
        """See MemberSeal."""

    def sign(self, data: bytes) -> bytes:
        """See MemberSeal."""
        return keys.sign(self._key, data)

    def verify(self, chain: bytes, signature: bytes, data: bytes) -> None:
        """See MemberSeal."""
        check_verdict(self._profile.root, chain, signature, data)


def check_push(root: x509.Certificate, path: str, chain: bytes, signature: bytes, data: bytes) -> None:
    """Check that a member of a world has signed some bytes. No clock is asked: the certificate may be over by now.

    The key need not be the one of the connection by which the bytes came: that may have been renewed meanwhile.

    Args:
        root: the world's.
        path: the member's.
        chain: certificates of the member and of its issuing key, PEM.
        signature: in DER.
        data: what was signed.

    Raises:
        Refused: bad_certificate, wrong_world or bad_signature.
    """
    certificate, issuing = _two(chain, "the push")
    if certificates.member_of(certificate) != (certificates.world_id(root), path):
        raise Refused("bad_signature", f"the push is not signed by {path}")
    certificates.check_issued(certificate, issuing, root)
    keys.verify(certificate, signature, data)


def check_verdict(root: x509.Certificate, chain: bytes, signature: bytes, data: bytes) -> None:
    """Check that a server of a world has signed some bytes. No clock is asked: the certificate may be over by now.

    Args:
        root: the world's.
        chain: certificates of the server and of its issuing key, PEM.
        signature: in DER.
        data: what was signed.

    Raises:
        Refused: bad_certificate, wrong_world or bad_signature.
    """
    certificate, issuing = _two(chain, "the verdict")
    try:
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except certificates.UNREADABLE as error:
        raise Refused("bad_certificate", "the verdict's signer is no server") from error
    if list(usage) != [ExtendedKeyUsageOID.SERVER_AUTH]:
        raise Refused("bad_certificate", "the verdict's signer is no server")
    certificates.check_issued(certificate, issuing, root)
    keys.verify(certificate, signature, data)


def _two(chain: bytes, what: str) -> list[x509.Certificate]:
    """The certificates of a signer and of its issuing key.

    Raises:
        Refused: bad_certificate.
    """
    try:
        found = certificates.read_pem(chain, what)
    except GatewayError as error:
        raise Refused("bad_certificate", f"{what} does not come with two certificates of its signer") from error
    if len(found) != 2:
        raise Refused("bad_certificate", f"{what} does not come with two certificates of its signer")
    return found
