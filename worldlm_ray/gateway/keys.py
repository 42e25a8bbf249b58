"""Private keys, their fingerprints, and signatures: ECDSA over P-256 with SHA-256.

P-256 and not Ed25519: every TLS stack and load balancer takes it by default. All cryptography is the library's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from worldlm_ray.errors import GatewayError, Refused
from worldlm_ray.storage.filesystem import flush_folder, replacing

PrivateKey = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey
Clock = Callable[[], float]
"""Gives Unix seconds."""

_SIGNED = ec.ECDSA(hashes.SHA256())
_SHOWN_GROUPS = 8


def new_key() -> PrivateKey:
    """A new private key, by the operating system's entropy."""
    return ec.generate_private_key(ec.SECP256R1())


def p256(key: object) -> PublicKey | None:
    """A public key, if it is one of P-256."""
    return key if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1) else None


def fingerprint(key: PublicKey) -> str:
    """SHA-256 of a public key's SubjectPublicKeyInfo, in hex."""
    spki = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(spki).hexdigest()


def spoken(print_: str) -> str:
    """A fingerprint as two people compare it by telephone: its first 128 bits in groups of four digits."""
    return " ".join(print_[4 * group : 4 * group + 4] for group in range(_SHOWN_GROUPS))


# ---- signatures ----------------------------------------------------------------------------------------------


def sign(key: PrivateKey, data: bytes) -> bytes:
    """The signature of some bytes, in DER."""
    return key.sign(data, _SIGNED)


def verify(certificate: x509.Certificate | bytes, signature: bytes, data: bytes) -> None:
    """Check that the key of a certificate has signed some bytes.

    The certificate is not judged: ask `Authority.authorise` or `certificates.check_issued` for that.

    Args:
        certificate: of the signer; bytes are DER.
        signature: in DER.
        data: what was signed.

    Raises:
        Refused: bad_certificate or bad_signature.
    """
    if isinstance(certificate, bytes):
        try:
            certificate = x509.load_der_x509_certificate(certificate)
        except (ValueError, x509.InvalidVersion) as error:
            raise Refused("bad_certificate", "the signer's certificate cannot be read") from error
    verify_by_key(certificate_key(certificate), signature, data)


def verify_by_key(key: PublicKey, signature: bytes, data: bytes) -> None:
    """`verify`, by a public key.

    Raises:
        Refused: bad_signature.
    """
    try:
        key.verify(signature, data, _SIGNED)
    except InvalidSignature as error:
        who = spoken(fingerprint(key))
        raise Refused("bad_signature", f"the signature is not one of these bytes by the key {who}") from error


def certificate_key(certificate: x509.Certificate) -> PublicKey:
    """The public key of a certificate.

    Raises:
        Refused: bad_certificate: it is not one of P-256.
    """
    try:
        key = p256(certificate.public_key())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise Refused("bad_certificate", "the certificate's key cannot be read") from error
    if key is None:
        raise Refused("bad_certificate", "the certificate's key is not one of P-256")
    return key


# ---- files ---------------------------------------------------------------------------------------------------


def key_pem(key: PrivateKey, passphrase: str | None = None) -> bytes:
    """A private key as PEM (PKCS #8).

    Args:
        key: the key.
        passphrase: that encrypts it; None leaves it in the clear.
    """
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase is not None:
        encryption = serialization.BestAvailableEncryption(passphrase.encode())
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def write_private(path: Path, content: bytes) -> None:
    """Replace a file that holds a private key: mode 0600, durable, as a whole.

    Raises:
        GatewayError: the storage refused.
    """
    try:
        with replacing(path) as file:
            file.write(content)
        flush_folder(path.parent)
    except OSError as error:
        raise GatewayError(f"{path}: {error.strerror or error}; make the folder writable, and try again") from error


def read_private(path: Path, passphrase: str | None = None) -> tuple[PrivateKey, bytes]:
    """The private key of a PEM file, and the whole file.

    Args:
        path: the file; certificates may follow the key.
        passphrase: of an encrypted key.

    Raises:
        GatewayError: the file is missing, readable for others, damaged, or the passphrase is another one.
    """
    content = read_file(path)
    if path.stat().st_mode & 0o077:
        raise GatewayError(f"{path}: other users may read this private key; run `chmod 600 {path}`")
    try:
        key = serialization.load_pem_private_key(content, None if passphrase is None else passphrase.encode())
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        what = "is damaged" if passphrase is None else "cannot be read by this passphrase"
        cure = "restore the file from a copy" if passphrase is None else "give the one that was set at `init`"
        raise GatewayError(f"{path}: the private key {what}; {cure}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise GatewayError(f"{path}: the private key is not one of P-256; restore the file from a copy")
    return key, content


def read_file(path: Path) -> bytes:
    """The content of a file of the gateway's folder or of a profile.

    Raises:
        GatewayError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        cure = "name the folder by --dir" if isinstance(error, FileNotFoundError) else "make it readable"
        raise GatewayError(f"{path}: {error.strerror or error}; {cure}") from error


def read_facts(path: Path, kinds: dict[str, type], *, version: int, writer: str) -> dict[str, Any]:
    """What a file of facts says: a JSON mapping that its writer has written whole.

    Args:
        path: of the file.
        kinds: type of each fact.
        version: that `format` must have.
        writer: the command that makes the file, for the error.

    Raises:
        GatewayError: the file cannot be read, or is not as it was written.
    """
    try:
        facts = json.loads(read_file(path))
        good = all(isinstance(facts[key], kind) for key, kind in kinds.items()) and facts["format"] == version
    except (ValueError, KeyError, TypeError):
        good = False
    if not good:
        raise GatewayError(f"{path}: is not what `{writer}` wrote; restore it from a copy")
    return dict(facts)
