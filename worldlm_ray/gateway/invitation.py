"""Invitations: one line that a world's operator gives to a member's, once.

    worldlm1.MFRGG...     base32 of version, url, world id, path, invitation's id, secret and a checksum

The secret has 128 bits. Both sides derive a key pair from it. The world keeps the public key only, so that a copy of
its folder lets no reader enrol. The member signs its certificate signing request with the private key: a proof that was
overheard fits no other request.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import msgpack
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from worldlm_ray.errors import GatewayError, Refused
from worldlm_ray.gateway import certificates
from worldlm_ray.gateway.certificates import checked_path
from worldlm_ray.gateway.keys import PrivateKey, p256, sign, verify_by_key

PREFIX = "worldlm1."
SECRET_BYTES, ID_BYTES = 16, 8
LONGEST_LINE = 4_096
LONGEST_URL = 512
_CHECK_BYTES = 4
_ID = re.compile(r"[0-9a-f]{16}")
_WORLD = re.compile(r"[0-9a-f]{64}")
_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
"""Of P-256's group (FIPS 186-4, D.1.2.3)."""


@dataclass(frozen=True, kw_only=True)
class Invitation:
    """What one line says."""

    url: str
    """Of the world's gateway."""
    world: str
    """World id: SHA-256 of the root's public key, in hex."""
    path: str
    """The member's."""
    id: str
    """16 hex digits."""
    secret: bytes = field(repr=False)
    """16 bytes."""

    @property
    def line(self) -> str:
        """The invitation as text."""
        body: bytes = msgpack.packb(
            [self.url, bytes.fromhex(self.world), self.path, bytes.fromhex(self.id), self.secret]
        )
        text = base64.b32encode(body + _checksum(body)).decode().rstrip("=")
        return PREFIX + text

    def proof(self, request: bytes) -> bytes:
        """What shows that the sender of a certificate signing request holds this invitation.

        Args:
            request: in DER.
        """
        return sign(self._key(), self._bound(request))

    @property
    def verifier(self) -> str:
        """What the world keeps in place of the secret, in hex."""
        point = self._key().public_key()
        return point.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.CompressedPoint).hex()

    def check_root(self, root_pem: bytes) -> str:
        """Check that this is the world's root, which any server may have sent.

        Returns:
            The root alone, as PEM.

        Raises:
            Refused: bad_certificate or wrong_world.
        """
        try:
            [root, *more] = certificates.read_pem(root_pem, "the server's answer")
        except GatewayError as error:
            raise Refused("bad_certificate", f"{self.url} answers without a certificate of its root") from error
        if more or certificates.world_id(root) != self.world:
            cure = "ask its operator for the address, and tell both if it is right: another server may answer there"
            raise Refused("wrong_world", f"{self.url} is not the world of this invitation; {cure}")
        return certificates.pem(root).decode()

    def _bound(self, request: bytes) -> bytes:
        return _bound(self.id, request)

    def _key(self) -> PrivateKey:
        digest = hashlib.sha512(b"worldlm invitation" + bytes.fromhex(self.id) + self.secret).digest()
        return ec.derive_private_key(int.from_bytes(digest, "big") % (_ORDER - 1) + 1, ec.SECP256R1())


def read_invitation(line: str) -> Invitation:
    """The invitation of a line.

    Raises:
        GatewayError: it is not one, or a character is wrong.
    """
    text = "".join(line.split()).strip("\"'")
    cure = "copy the whole line that `worldlm gateway invite` printed"
    if not text.startswith(PREFIX) or len(text) > LONGEST_LINE:
        raise GatewayError(f"this is no invitation: expected {PREFIX} and letters; {cure}")
    code = text.removeprefix(PREFIX).upper()
    try:
        raw = base64.b32decode(code + "=" * (-len(code) % 8))
        body, check = raw[:-_CHECK_BYTES], raw[-_CHECK_BYTES:]
        if check != _checksum(body):
            raise ValueError
        fields = msgpack.unpackb(body, max_ext_len=0)
        url, world, path, id_, secret = fields
        lengths = [len(each) for each in (world, id_, secret)]
        kinds = [type(each) for each in fields]
    except (ValueError, TypeError, binascii.Error, msgpack.UnpackException) as error:
        raise GatewayError(f"the invitation is damaged; {cure}") from error
    if kinds != [str, bytes, str, bytes, bytes] or lengths != [32, ID_BYTES, SECRET_BYTES]:
        raise GatewayError(f"the invitation is damaged; {cure}")
    return Invitation(url=_checked_url(url), world=world.hex(), path=checked_path(path), id=id_.hex(), secret=secret)


ASKS_CHARTER = b"charter"
"""In place of a certificate signing request in a proof: the stranger asks for the charter. No request is so short."""


def check_proof(verifier: str, invitation: str, proof: bytes, request: bytes) -> None:
    """Check what `Invitation.proof` made.

    Args:
        verifier: what the world keeps.
        invitation: its id.
        proof: as it came.
        request: the certificate signing request, in DER.

    Raises:
        Refused: bad_invitation.
    """
    try:
        point = p256(ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), bytes.fromhex(verifier)))
        assert point is not None
        verify_by_key(point, proof, _bound(invitation, request))
    except (ValueError, TypeError, UnsupportedAlgorithm, Refused) as error:
        raise bad_invitation() from error


def bad_invitation() -> Refused:
    """One answer for an invitation that is not there and for a wrong secret: a stranger learns nothing."""
    return Refused("bad_invitation", "there is no such invitation; ask the world's operator for a new one")


def is_id(text: object) -> bool:
    """Whether this can be an invitation's id: it names files."""
    return isinstance(text, str) and _ID.fullmatch(text) is not None


def _bound(invitation: str, request: bytes) -> bytes:
    return b"worldlm enrol" + bytes.fromhex(invitation) + request


def _checksum(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()[:_CHECK_BYTES]


def _checked_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        good = parts.scheme == "https" and parts.hostname and (parts.port or 443) and not parts.path.strip("/")
    except ValueError:
        good = False
    if not good or len(url) > LONGEST_URL or not url.isascii() or not url.isprintable():
        raise GatewayError("the invitation's address is not https://HOST:PORT; ask for a new invitation")
    return url
