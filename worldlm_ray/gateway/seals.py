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

    def verify(self, certificate: bytes, signature: bytes, data: bytes) -> None:
        """Check that a member has signed some bytes; raises Refused."""
        ...


class MemberSeal(Protocol):
    """Signatures of the member's side."""

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

    def verify(self, certificate: bytes, signature: bytes, data: bytes) -> None:
        """See WorldSeal. The certificate is that of the connection, which has been authorised."""
        keys.verify(certificate, signature, data)


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
        self._key, _, _ = self._profile.identity()

    def sign(self, data: bytes) -> bytes:
        """See MemberSeal."""
        return keys.sign(self._key, data)

    def verify(self, chain: bytes, signature: bytes, data: bytes) -> None:
        """See MemberSeal."""
        check_verdict(self._profile.root, chain, signature, data)


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
    try:
        certificate, issuing = certificates.read_pem(chain, "the verdict")
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except (GatewayError, ValueError, x509.ExtensionNotFound, x509.DuplicateExtension) as error:
        raise Refused("bad_certificate", "the verdict does not come with two certificates of a server") from error
    if list(usage) != [ExtendedKeyUsageOID.SERVER_AUTH]:
        raise Refused("bad_certificate", "the verdict's signer is no server")
    certificates.check_issued(certificate, issuing, root)
    keys.verify(certificate, signature, data)
