"""TLS between a world's server and its members: which side accepts which certificate."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import ExtendedKeyUsageOID
from support.gateway import PASSPHRASE, FakeClock, Handshake, make_member, make_world, shown_by

from worldlm_ray.errors import GatewayError, Refused
from worldlm_ray.gateway import certificates, contexts, identity
from worldlm_ray.gateway.authority import Authority
from worldlm_ray.gateway.certificates import Signer
from worldlm_ray.gateway.keys import key_pem, new_key, write_private


def loaded(folder: Path, context: ssl.SSLContext, signer: Signer, certificate: x509.Certificate, key: object) -> None:
    """Have a context show a certificate."""
    file = folder / "forged.pem"
    write_private(file, key_pem(key) + certificates.pem(certificate, signer.certificate))  # type: ignore[arg-type]
    context.load_cert_chain(file)


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1"])
def test_a_member_and_its_world_accept_each_other(world: Authority, tmp_path: Path, name: str) -> None:
    member = make_member(world, tmp_path / "acme")
    tls = Handshake(contexts.server_context(world.identity), contexts.client_context(member), name=name)
    assert tls.client.version() == "TLSv1.3"
    assert tls.member == shown_by(member)
    assert world.authorise(tls.member) == "world/europe"
    member.check_server(tls.seen_server)


def test_a_server_of_another_name_is_refused(world: Authority, tmp_path: Path) -> None:
    member = make_member(world, tmp_path / "acme")
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        Handshake(contexts.server_context(world.identity), contexts.client_context(member), name="gw.evil.org")


def test_another_world_is_refused_by_both_sides(world: Authority, tmp_path: Path, clock: FakeClock) -> None:
    other = make_world(tmp_path / "other", clock=clock)
    member, stranger = make_member(world, tmp_path / "acme"), make_member(other, tmp_path / "stranger")
    with pytest.raises(ssl.SSLCertVerificationError):
        Handshake(contexts.server_context(other.identity), contexts.client_context(member))
    pretends = contexts.client_context(stranger)
    pretends.load_verify_locations(cadata=member.root_pem)
    with pytest.raises(ssl.SSLError):
        Handshake(contexts.server_context(world.identity), pretends)


def test_tls_1_2_is_refused(world: Authority, tmp_path: Path) -> None:
    old = contexts.client_context(make_member(world, tmp_path / "acme"))
    old.minimum_version = ssl.TLSVersion.TLSv1_2
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError):
        Handshake(contexts.server_context(world.identity), old)


def test_the_root_comes_unpinned_and_all_else_pinned_and_without_a_certificate(
    world: Authority, tmp_path: Path, clock: FakeClock
) -> None:
    server = contexts.server_context(world.identity)
    assert Handshake(server, contexts.unpinned_context()).member is None
    invitation = world.invite("world/europe", expires_s=60.0)
    assert Handshake(server, contexts.joining_context(invitation, world.identity.root_pem)).member is None
    other = make_world(tmp_path / "other", clock=clock)
    with pytest.raises(Refused, match=r"^wrong_world: .*not the world of this invitation"):
        contexts.joining_context(invitation, other.identity.root_pem)
    pinned = contexts.joining_context(invitation, world.identity.root_pem)
    with pytest.raises(ssl.SSLCertVerificationError):
        Handshake(contexts.server_context(other.identity), pinned)


def test_a_member_cannot_pose_as_the_server(world: Authority, tmp_path: Path) -> None:
    mallory = make_member(world, tmp_path / "mallory", "world/mallory")
    server = contexts.server_context(world.identity)
    server.load_cert_chain(mallory.identity_file)
    client = contexts.client_context(make_member(world, tmp_path / "acme"))
    client.check_hostname = False  # the purpose alone refuses it
    with pytest.raises(ssl.SSLCertVerificationError, match="purpose"):
        Handshake(server, client)


def test_a_member_cannot_make_certificates(world: Authority, tmp_path: Path, clock: FakeClock) -> None:
    key, certificate, _ = make_member(world, tmp_path / "mallory", "world/mallory").identity()
    forged_key = new_key()
    builder = x509.CertificateBuilder().subject_name(certificate.subject).issuer_name(certificate.subject)
    builder = builder.public_key(forged_key.public_key()).serial_number(7)
    builder = builder.not_valid_before(certificate.not_valid_before_utc)
    builder = builder.not_valid_after(certificate.not_valid_after_utc)
    uri = certificates.member_uri(world.identity.world, "world/europe")
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=False)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
    forged = builder.sign(key, hashes.SHA256())
    client = contexts.client_context(make_member(world, tmp_path / "acme"))
    loaded(tmp_path, client, Signer(key, certificate), forged, forged_key)
    with pytest.raises(ssl.SSLError):
        Handshake(contexts.server_context(world.identity), client)


def test_a_stolen_issuing_key_cannot_pose_as_the_server_after_a_rotation(
    world: Authority, tmp_path: Path, clock: FakeClock
) -> None:
    member, stolen = make_member(world, tmp_path / "acme"), world.identity.issuing()
    assert world.rotate(PASSPHRASE) == 2
    tls = Handshake(contexts.server_context(world.identity), contexts.client_context(member))
    member.check_server(tls.seen_server)
    assert member.generation == 2

    key, thief = new_key(), contexts.server_context(world.identity)
    forged = certificates.make_server(stolen, key.public_key(), ["localhost"], now_s=clock())
    loaded(tmp_path, thief, stolen, forged, key)
    tls = Handshake(thief, contexts.client_context(member))  # the chain is good until the old issuing key is over
    with pytest.raises(Refused, match=r"^old_issuing_key: .*issuing key 1, and 2 is known"):
        member.check_server(tls.seen_server)

    # A certificate that claims the newer key is none for TLS: its AKI is not the SKI of the key that signed it.
    newer = world.identity.issuing().certificate
    lying = Signer(stolen.key, _with_identifier_of(newer, stolen))
    forged = certificates.make_server(lying, key.public_key(), ["localhost"], now_s=clock())
    assert certificates.generation_of(forged) == 2
    loaded(tmp_path, thief, stolen, forged, key)
    with pytest.raises(ssl.SSLCertVerificationError):
        Handshake(thief, contexts.client_context(member))


def _with_identifier_of(newer: x509.Certificate, stolen: Signer) -> x509.Certificate:
    """A certificate of the stolen key whose SKI is that of the newer one."""
    old = stolen.certificate
    builder = x509.CertificateBuilder().subject_name(old.subject).issuer_name(old.subject).serial_number(7)
    builder = builder.public_key(stolen.key.public_key()).not_valid_before(old.not_valid_before_utc)
    builder = builder.not_valid_after(old.not_valid_after_utc)
    identifier = newer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return builder.add_extension(identifier, critical=False).sign(stolen.key, hashes.SHA256())


def test_a_certificate_of_the_old_issuing_key_is_good_until_it_ends(world: Authority, tmp_path: Path) -> None:
    member = make_member(world, tmp_path / "acme")
    world.rotate(PASSPHRASE)
    tls = Handshake(contexts.server_context(world.identity), contexts.client_context(member))
    assert tls.member is not None
    assert world.authorise(tls.member) == "world/europe"


def test_a_stolen_issuing_key_lets_no_one_in(world: Authority, tmp_path: Path, clock: FakeClock) -> None:
    member, stolen, key = make_member(world, tmp_path / "acme"), world.identity.issuing(), new_key()
    forged = certificates.make_member(stolen, key.public_key(), world.identity.world, "world/europe", now_s=clock())
    client = contexts.client_context(member)
    loaded(tmp_path, client, stolen, forged, key)
    tls = Handshake(contexts.server_context(world.identity), client)
    assert tls.member is not None
    with pytest.raises(Refused, match=r"^unknown: world/europe \(key .*: this key is not registered"):
        world.authorise(tls.member)


def test_a_server_renews_its_certificate_and_shows_it(world: Authority, tmp_path: Path, clock: FakeClock) -> None:
    member = make_member(world, tmp_path / "acme")
    server = contexts.server_context(world.identity)
    first = Handshake(server, contexts.client_context(member)).seen_server
    clock.tick(days=15)
    assert not world.identity.renew_server()
    clock.tick(days=6)
    assert world.identity.renew_server()
    contexts.reload(server, world.identity)
    _, second = world.identity.server()
    assert certificates.der(second) != first
    assert not world.identity.renew_server()


def test_a_rotated_server_shows_the_new_issuing_key_at_once(world: Authority) -> None:
    world.rotate(PASSPHRASE)
    assert certificates.generation_of(world.identity.server()[1]) == 2


def test_an_issuing_key_that_is_over_is_to_be_rotated(world: Authority, clock: FakeClock) -> None:
    clock.tick(days=certificates.ISSUING_DAYS)
    with pytest.raises(GatewayError, match="run `worldlm gateway rotate`"):
        contexts.server_context(world.identity)
    world.rotate(PASSPHRASE)
    assert world.identity.renew_server() is False
    assert identity.Identity(world.identity.folder, clock=clock).issuing_days() == pytest.approx(120, abs=0.01)
