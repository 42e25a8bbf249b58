"""Certificates of a world: how they are made, and what is read from one.

    root        10 years   its key lies under a passphrase, and is needed at `init` and at `rotate` only
    issuing     120 days   its key lies on the gateway's machine, and signs the two below
    server      30 days    EKU serverAuth, the gateway's host names
    member      30 days    EKU clientAuth, exactly one URI: worldlm://WORLD ID/world/europe

A path is no DNS name, so that it stands in a URI, as SPIFFE does. Subjects mean nothing: the URI and the key count.
The identifier of an issuing key (SKI) begins with its generation. TLS binds it to the key: OpenSSL takes no certificate
whose authority key identifier (AKI) differs from its issuer's SKI. So a member sees from the server's certificate alone
whether it was made under an older issuing key than the newest one that the member has met.
"""

from __future__ import annotations

import datetime
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote, unquote

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.utils import CryptographyDeprecationWarning
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from worldlm_ray.config.values import checked_name
from worldlm_ray.errors import ConfigError, GatewayError, Refused
from worldlm_ray.gateway.keys import PrivateKey, PublicKey, certificate_key, fingerprint, p256

DAY_S = 86_400.0
ROOT_DAYS, ISSUING_DAYS, LEAF_DAYS = 3_650, 120, 30
EARLY_S = 3_600.0
"""So long before it is made a certificate begins: clocks of two organisations differ."""
MOST_BYTES = 4_096
"""Of a certificate, or of a request for one; ours have about 700."""
LONGEST_PATH = 1_024
"""Bytes of a member's path in UTF-8."""
_GENERATION_BYTES, _ID_BYTES = 4, 20
_SCHEME = "worldlm://"
UNREADABLE = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.ExtensionNotFound,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
    CryptographyDeprecationWarning,  # of a serial number below 1, where warnings are errors
)
"""What the library raises for bytes that a peer has made up."""
_URI = re.compile(r"worldlm://([0-9a-f]{64})/(.+)", re.DOTALL)


def checked_path(path: str) -> str:
    """A member's path below the world, such as `world/europe`.

    Raises:
        GatewayError: it cannot be one.
    """
    names = path.split("/")
    try:
        if len(names) < 2 or len(path.encode()) > LONGEST_PATH:
            raise ConfigError(path[:80], "is no path of a member", "give one such as world/europe")
        checked = "/".join(checked_name(name, path[:80]) for name in names)
    except ConfigError as error:
        raise GatewayError(str(error)) from error
    return checked


def member_uri(world: str, path: str) -> str:
    """What a member's certificate says: world id and path."""
    return f"{_SCHEME}{world}/{quote(path, safe='/')}"


# ---- making --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Signer:
    """A certificate that may sign others, with its key."""

    key: PrivateKey
    certificate: x509.Certificate


def make_root(key: PrivateKey, name: str, *, now_s: float) -> x509.Certificate:
    """The self-signed certificate of a world's root.

    Args:
        key: the root's.
        name: of the world, for people who read the certificate.
        now_s: Unix seconds.
    """
    subject = _subject(f"{name} root")
    builder = _begun(subject, subject, key.public_key(), now_s=now_s, end_s=now_s + ROOT_DAYS * DAY_S)
    return _as_authority(builder, _key_id(key.public_key(), 0), below=1).sign(key, hashes.SHA256())


def make_issuing(root: Signer, key: PublicKey, name: str, generation: int, *, now_s: float) -> x509.Certificate:
    """The certificate of an issuing key.

    Args:
        root: signs it.
        key: the issuing key.
        name: of the world.
        generation: counts a world's issuing keys from 1.
        now_s: Unix seconds.
    """
    subject = _subject(f"{name} issuing {generation}")
    end_s = min(now_s + ISSUING_DAYS * DAY_S, end_of(root.certificate))
    builder = _begun(subject, root.certificate.subject, key, now_s=now_s, end_s=end_s)
    builder = _as_authority(_issued_by(builder, root), _key_id(key, generation), below=0)
    return builder.sign(root.key, hashes.SHA256())


def make_server(issuing: Signer, key: PublicKey, names: Sequence[str], *, now_s: float) -> x509.Certificate:
    """The certificate of a gateway's server.

    Args:
        issuing: signs it.
        key: the server's.
        names: DNS names or addresses by which members call it.
        now_s: Unix seconds.
    """
    found = [_host(name) for name in names]
    return _leaf(issuing, key, x509.SubjectAlternativeName(found), ExtendedKeyUsageOID.SERVER_AUTH, now_s=now_s)


def make_member(
    issuing: Signer, key: PublicKey, world: str, path: str, *, now_s: float, days: float = LEAF_DAYS
) -> x509.Certificate:
    """The certificate of a member.

    Args:
        issuing: signs it.
        key: the member's.
        world: the world's id.
        path: the member's.
        now_s: Unix seconds.
        days: until it ends; never after the issuing certificate.
    """
    uri = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(member_uri(world, path))])
    return _leaf(issuing, key, uri, ExtendedKeyUsageOID.CLIENT_AUTH, now_s=now_s, days=days)


def make_request(key: PrivateKey) -> bytes:
    """A certificate signing request in DER. It names nothing: the path is that of the invitation or old certificate."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(_subject("worldlm member"))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _host(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _begun(
    subject: x509.Name, issuer: x509.Name, key: PublicKey, *, now_s: float, end_s: float
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    builder = builder.serial_number(x509.random_serial_number())
    return builder.not_valid_before(_at(now_s - EARLY_S)).not_valid_after(_at(end_s))


def _as_authority(builder: x509.CertificateBuilder, identifier: bytes, *, below: int) -> x509.CertificateBuilder:
    return (
        builder.add_extension(x509.BasicConstraints(ca=True, path_length=below), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier(identifier), critical=False)
    )


def _leaf(
    issuing: Signer,
    key: PublicKey,
    names: x509.SubjectAlternativeName,
    purpose: x509.ObjectIdentifier,
    *,
    now_s: float,
    days: float = LEAF_DAYS,
) -> x509.Certificate:
    end_s = min(now_s + days * DAY_S, end_of(issuing.certificate))
    builder = _begun(_subject("worldlm"), issuing.certificate.subject, key, now_s=now_s, end_s=end_s)
    builder = (
        _issued_by(builder, issuing)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(names, critical=False)
    )
    return builder.sign(issuing.key, hashes.SHA256())


def _issued_by(builder: x509.CertificateBuilder, signer: Signer) -> x509.CertificateBuilder:
    identifier = signer.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    aki = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)
    return builder.add_extension(aki, critical=False)


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _key_id(key: PublicKey, generation: int) -> bytes:
    digest = bytes.fromhex(fingerprint(key))
    return generation.to_bytes(_GENERATION_BYTES, "big") + digest[: _ID_BYTES - _GENERATION_BYTES]


def _at(seconds: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(int(seconds), tz=datetime.UTC)


# ---- reading -------------------------------------------------------------------------------------------------


def begin_of(certificate: x509.Certificate) -> float:
    """Unix seconds at which a certificate begins."""
    return certificate.not_valid_before_utc.timestamp()


def end_of(certificate: x509.Certificate) -> float:
    """Unix seconds at which a certificate ends."""
    return certificate.not_valid_after_utc.timestamp()


def is_worn(certificate: x509.Certificate, *, now_s: float) -> bool:
    """Whether two thirds of a certificate's life are over: it is to be renewed."""
    begin, end = begin_of(certificate), end_of(certificate)
    return now_s >= begin + (end - begin) * 2 / 3


def pem(*certificates: x509.Certificate) -> bytes:
    """Certificates as PEM, one after the other."""
    return b"".join(each.public_bytes(serialization.Encoding.PEM) for each in certificates)


def der(certificate: x509.Certificate) -> bytes:
    """A certificate in DER."""
    return certificate.public_bytes(serialization.Encoding.DER)


def read_pem(content: bytes, where: object) -> list[x509.Certificate]:
    """The certificates of a PEM file of ours, at least one.

    Raises:
        GatewayError: there is none, or one is damaged.
    """
    try:
        return x509.load_pem_x509_certificates(content)
    except UNREADABLE as error:
        raise GatewayError(f"{where}: no certificate can be read from it; restore the file from a copy") from error


def read_der(content: bytes) -> x509.Certificate:
    """A certificate that a peer has sent.

    Raises:
        Refused: bad_certificate.
    """
    if not isinstance(content, bytes) or len(content) > MOST_BYTES:
        raise Refused("bad_certificate", f"expected a certificate of at most {MOST_BYTES} bytes")
    try:
        return x509.load_der_x509_certificate(content)
    except UNREADABLE as error:
        raise Refused("bad_certificate", "the certificate is not DER") from error


def check_request_size(content: object) -> None:
    """Check that bytes may be looked at as a certificate signing request.

    Raises:
        Refused: bad_request.
    """
    if not isinstance(content, bytes) or len(content) > MOST_BYTES:
        raise Refused("bad_request", f"expected a certificate signing request of at most {MOST_BYTES} bytes")


def read_request(content: bytes) -> PublicKey:
    """The public key of a certificate signing request, whose signature proves that the sender has the private one.

    Everything else in the request is ignored.

    Raises:
        Refused: bad_request.
    """
    check_request_size(content)
    try:
        request = x509.load_der_x509_csr(content)
        key = p256(request.public_key())
        signed = key is not None and request.is_signature_valid
    except UNREADABLE as error:
        raise Refused("bad_request", "the certificate signing request cannot be read") from error
    if key is None or not signed:
        raise Refused("bad_request", "the request is not signed by a key of P-256")
    return key


def member_of(certificate: x509.Certificate) -> tuple[str, str]:
    """World id and path of a member's certificate.

    Raises:
        Refused: bad_certificate: it is not one of a member.
    """
    try:
        extensions = certificate.extensions
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        purposes = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except UNREADABLE as error:
        raise Refused("bad_certificate", "the certificate names no member") from error
    [only, *others] = [*names, None]
    match = _URI.fullmatch(only.value) if isinstance(only, x509.UniformResourceIdentifier) else None
    if match is None or others != [None] or list(purposes) != [ExtendedKeyUsageOID.CLIENT_AUTH]:
        raise Refused("bad_certificate", "the certificate does not name exactly one member")
    world, path = match[1], unquote(match[2])
    if member_uri(world, path) != only.value:
        raise Refused("bad_certificate", "the certificate's path is not written in the one way that counts")
    return world, path


def generation_of(certificate: x509.Certificate) -> int:
    """Of the issuing key that made a certificate.

    Raises:
        Refused: bad_certificate: it does not say.
    """
    try:
        aki = certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
    except UNREADABLE as error:
        raise Refused("bad_certificate", "the certificate does not name its issuing key") from error
    if aki is None or len(aki) != _ID_BYTES:
        raise Refused("bad_certificate", "the certificate does not name its issuing key")
    return int.from_bytes(aki[:_GENERATION_BYTES], "big")


def check_issued(certificate: x509.Certificate, issuing: x509.Certificate, root: x509.Certificate) -> None:
    """Check the signatures of a chain: by these a receipt's signer belongs to a world, without a connection.

    Args:
        certificate: the signer's, or another one's.
        issuing: the certificate of the issuing key.
        root: the world's.

    Raises:
        Refused: wrong_world.
    """
    try:
        certificate.verify_directly_issued_by(issuing)
        issuing.verify_directly_issued_by(root)
    except (InvalidSignature, *UNREADABLE) as error:
        raise Refused("wrong_world", "the certificate was not made by this world") from error


def world_id(root: x509.Certificate) -> str:
    """SHA-256 of the root's public key, in hex: what an invitation pins."""
    return fingerprint(certificate_key(root))
