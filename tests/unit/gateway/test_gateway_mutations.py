"""Mutated requests, certificates, invitations and signatures: a named refusal each, no crash, no growth.

`make soak` runs five times as many.
"""

from __future__ import annotations

import base64
import hashlib
import random
import resource
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from support.gateway import HOUR_S, make_member, shown_by

from worldlm_ray.errors import GatewayError, Refused
from worldlm_ray.gateway import certificates, keys
from worldlm_ray.gateway.authority import Authority
from worldlm_ray.gateway.invitation import Invitation, read_invitation

GROWTH_KB = 64_000
BYTES = bytes(range(256))


@pytest.fixture
def count(many: Callable[..., int]) -> int:
    """Of mutations: each of the six kinds occurs thousands of times, and in a soak five times as often."""
    return many(20_000, 5)


def mutated(rng: random.Random, original: bytes) -> bytes:
    """Bytes with one to four changes: flipped, cut, repeated, inserted, or replaced by a length that lies."""
    found = bytearray(original)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(found) + 1)
        kind = rng.randrange(6)
        if kind == 0 and at < len(found):
            found[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del found[at:]
        elif kind == 2:
            found[at:at] = found[: rng.randrange(64)]
        elif kind == 3:
            found[at:at] = rng.randbytes(rng.randrange(1, 32))
        elif kind == 4 and at < len(found):
            found[at] = rng.choice((0x00, 0x30, 0x7F, 0x80, 0x84, 0xFF))
        else:
            del found[at : at + rng.randrange(1, 16)]
    return bytes(found) if found != original else mutated(rng, original)


def refusals(call: Callable[[bytes], object], original: bytes, count: int) -> Counter[str]:
    """How often each refusal was the answer to mutated bytes; `ok` where it was none.

    Fails if the process grows: after a tenth of the calls, all that is kept on purpose is there.
    """
    rng, seen = random.Random(7), Counter[str]()
    before = 0
    for number in range(count):
        if number == count // 10:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            call(mutated(rng, original))
            seen["ok"] += 1
        except Refused as refused:
            seen[refused.reason] += 1
        except GatewayError as error:
            seen["one line" if "\n" not in str(error) else "several lines"] += 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GROWTH_KB
    assert sum(seen.values()) == count
    return seen


def test_mutated_requests(world: Authority, count: int) -> None:
    invitation = world.invite("world/europe", expires_s=HOUR_S)

    def enrol(request: bytes) -> None:
        world.enrol(request, invitation.id, invitation.proof(request))

    key = keys.new_key()
    seen = refusals(enrol, certificates.make_request(key), count)
    # A bit that counts the unused bits of a signature is not signed: with that one changed, it is the same request.
    assert set(seen) <= {"bad_request", "invitation_used", "ok"}
    assert seen["bad_request"] > 0.999 * count
    assert known_keys(world) <= {keys.fingerprint(key.public_key())}


def test_mutated_requests_for_a_renewal(world: Authority, tmp_path: Path, count: int) -> None:
    certificate = shown_by(make_member(world, tmp_path / "acme", clock=world.clock))
    before, key = known_keys(world), keys.new_key()

    def renew(request: bytes) -> None:
        world.renew(certificate, request)

    seen = refusals(renew, certificates.make_request(key), count)
    assert set(seen) <= {"bad_request", "ok"}
    assert seen["bad_request"] > 0.999 * count
    assert known_keys(world) - before <= {keys.fingerprint(key.public_key())}


def known_keys(world: Authority) -> set[str]:
    """Fingerprints of all keys that are registered."""
    return {key.fingerprint for member in world.registry.members().values() for key in member.keys}


def test_mutated_certificates(world: Authority, tmp_path: Path, count: int) -> None:
    """TLS refuses a certificate that was changed; what it says is read as if TLS did not."""
    member = make_member(world, tmp_path / "acme", clock=world.clock)
    seen = refusals(world.authorise, shown_by(member), count)
    assert {"bad_certificate", "wrong_world", "unknown"} <= set(seen)
    assert set(seen) <= {"bad_certificate", "wrong_world", "unknown", "not_yet_valid", "expired", "ok"}
    assert seen["ok"] < count // 4  # where the key, the path and the times have stayed


def test_mutated_invitations(world: Authority, count: int) -> None:
    line = world.invite("world/europe", expires_s=HOUR_S).line

    def read(text: bytes) -> None:
        assert read_invitation(text.decode("latin-1")).line == line  # spaces, quotes and lower case may differ

    seen = refusals(read, line.encode(), count)
    assert seen["one line"] > 0.99 * count


def test_mutated_bodies_of_invitations_with_a_right_checksum(world: Authority, count: int) -> None:
    """A person who makes lines on purpose: whatever is read is an invitation whose line says the same."""
    invitation = world.invite("world/europe", expires_s=HOUR_S)

    def read(raw: bytes) -> None:
        found = read_invitation(line_of(raw))
        assert isinstance(found, Invitation)
        assert read_invitation(found.line) == found

    seen = refusals(read, body_of(invitation.line), count)
    assert seen["one line"] > 0
    assert seen["ok"] > 0


def test_mutated_proofs_and_signatures(world: Authority, count: int) -> None:
    invitation = world.invite("world/europe", expires_s=HOUR_S)
    request = certificates.make_request(keys.new_key())

    def enrol(proof: bytes) -> None:
        world.enrol(request, invitation.id, proof)

    assert set(refusals(enrol, invitation.proof(request), count)) == {"bad_invitation"}
    assert world.registry.members() == {}
    key, certificate = world.identity.server()
    seen = refusals(lambda mark: keys.verify(certificate, mark, b"data"), keys.sign(key, b"data"), count // 10)
    assert set(seen) == {"bad_signature"}


@pytest.mark.parametrize(
    "id_", ["", "../members", "/etc/passwd", "0" * 15, "G" * 16, "0" * 16 + "\n", "a" * 10_000, 7, None]
)
def test_an_id_that_is_none_never_becomes_a_file_name(world: Authority, id_: object) -> None:
    request = certificates.make_request(keys.new_key())
    with pytest.raises(Refused, match=r"^bad_invitation"):
        world.enrol(request, id_, b"")  # type: ignore[arg-type]


def test_the_fields_of_a_request_may_be_of_any_type(world: Authority) -> None:
    invitation = world.invite("world/europe", expires_s=HOUR_S)
    good = certificates.make_request(keys.new_key())
    for request, proof in ((None, b""), ("text", b""), (b"0" * 5_000, b""), (good, None), (good, "text"), (good, 7)):
        with pytest.raises(Refused, match=r"^bad_(request|invitation)"):
            world.enrol(request, invitation.id, proof)  # type: ignore[arg-type]


def test_the_mutations_do_change_what_they_are_given() -> None:
    rng = random.Random(7)
    assert not any(mutated(rng, BYTES) == BYTES for _ in range(1_000))


def body_of(line: str) -> bytes:
    """The bytes of an invitation without the checksum."""
    code = line.removeprefix("worldlm1.")
    return base64.b32decode(code + "=" * (-len(code) % 8))[:-4]


def line_of(body: bytes) -> str:
    """An invitation of these bytes, with the checksum that belongs to them."""
    return "worldlm1." + base64.b32encode(body + hashlib.sha256(body).digest()[:4]).decode().rstrip("=")
