"""The life of a member's certificate, and its end, under a clock that the test moves."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.gateway import HOUR_S, PASSPHRASE, FakeClock, contents, make_member, make_world, request, shown_by

from worldlm_ray.errors import GatewayError, Refused
from worldlm_ray.gateway import certificates, keys, profile
from worldlm_ray.gateway.authority import MOST_KEYS, Authority
from worldlm_ray.gateway.profile import Profile
from worldlm_ray.gateway.registry import State

EUROPE = "world/europe"


def renewed(world: Authority, member: Profile) -> bytes:
    chain = world.renew(shown_by(member), member.request())
    member.install(chain)
    return chain


# ---- the life of a certificate ----------------------------------------------------------------------------------


def test_a_certificate_is_renewed_from_two_thirds_of_its_life_with_a_new_key(
    world: Authority, member: Profile, clock: FakeClock
) -> None:
    first = shown_by(member)
    clock.tick(days=19.9)
    assert not member.wants_renewal()
    clock.tick(days=0.2)
    assert member.wants_renewal()
    renewed(world, member)
    second = shown_by(member)
    assert keys.fingerprint(certificates.certificate_key(certificates.read_der(second))) != keys.fingerprint(
        certificates.certificate_key(certificates.read_der(first))
    )
    assert not member.wants_renewal()
    assert member.days_left() == 30
    assert world.authorise(first) == world.authorise(second) == EUROPE  # the old connection may go on
    clock.tick(days=10)
    with pytest.raises(Refused, match=r"^expired"):
        world.authorise(first)
    assert world.authorise(second) == EUROPE


def test_a_renewal_whose_answer_was_lost_is_asked_for_again(world: Authority, member: Profile) -> None:
    asked = member.request()
    world.renew(shown_by(member), asked)
    assert Profile(member.folder, clock=member.clock).request() == asked  # a new process asks for the same key
    renewed(world, member)
    assert len(world.registry.members()[EUROPE].keys) == 2
    assert world.authorise(shown_by(member)) == EUROPE


def test_a_member_that_renews_for_a_year_stays_and_its_old_keys_go(
    world: Authority, member: Profile, clock: FakeClock
) -> None:
    for _ in range(18):
        clock.tick(days=20.5)
        if world.identity.issuing_days() < 60:
            world.rotate(PASSPHRASE)
        renewed(world, member)
        assert world.authorise(shown_by(member)) == EUROPE
    assert len(world.registry.members()[EUROPE].keys) == 2
    assert member.generation == 7  # every third time, less than 60 days were left
    world.identity.renew_server()


def test_a_renewal_with_the_old_key_is_refused(world: Authority, member: Profile) -> None:
    with pytest.raises(Refused, match=r"^known_key: .*make a new one"):
        world.renew(shown_by(member), certificates.make_request(member.identity()[0]))


def test_a_member_has_a_bounded_number_of_keys(world: Authority, member: Profile) -> None:
    for _ in range(MOST_KEYS - 1):
        world.renew(shown_by(member), request())
    with pytest.raises(Refused, match=r"^too_many_keys: world/europe has 8 keys"):
        world.renew(shown_by(member), request())


def test_a_clock_that_is_an_hour_behind_is_no_trouble_and_one_of_a_day_is_named(
    world: Authority, member: Profile, clock: FakeClock
) -> None:
    clock.tick(hours=-0.9)
    assert world.authorise(shown_by(member)) == EUROPE
    clock.tick(hours=-23.1)
    with pytest.raises(Refused, match=r"^not_yet_valid: .*begins in 1380 min; set the clocks of both sides right"):
        world.authorise(shown_by(member))


def test_no_certificate_outlives_the_issuing_key(world: Authority, tmp_path: Path, clock: FakeClock) -> None:
    clock.tick(days=certificates.ISSUING_DAYS - 10)
    member = make_member(world, tmp_path / "acme", clock=clock)
    assert member.days_left() == 10


# ---- revocation -------------------------------------------------------------------------------------------------


def test_a_revoked_member_is_refused_at_its_next_request(world: Authority, member: Profile) -> None:
    operator = Authority(world.identity.folder, clock=world.clock)  # another process
    assert world.authorise(shown_by(member)) == EUROPE
    operator.revoke(EUROPE, by="ann")
    with pytest.raises(Refused, match=r"^revoked: world/europe .* ask the world's operator to readmit it"):
        world.authorise(shown_by(member))
    with pytest.raises(Refused, match=r"^revoked"):
        world.renew(shown_by(member), request())
    with pytest.raises(GatewayError, match=r"is revoked; run `worldlm gateway readmit"):
        world.invite(EUROPE, expires_s=HOUR_S)
    operator.revoke(EUROPE)
    operator.revoke(EUROPE, pause=True)  # is no way back
    assert world.registry.members()[EUROPE].state is State.REVOKED


def test_a_revoked_invitation_is_no_way_in(world: Authority) -> None:
    invitation, asked = world.invite(EUROPE, expires_s=HOUR_S), request()
    world.revoke(EUROPE)
    with pytest.raises(Refused, match=r"^bad_invitation"):
        world.enrol(asked, invitation.id, invitation.proof(asked))


def test_a_readmitted_member_has_a_new_key_and_the_old_one_stays_out(
    world: Authority, member: Profile, clock: FakeClock
) -> None:
    stolen = shown_by(member)
    world.revoke(EUROPE)
    invitation = world.readmit(EUROPE, expires_s=HOUR_S, by="ann")
    assert invitation is not None
    with pytest.raises(Refused, match=r"^unknown: .*not registered"):
        world.authorise(stolen)
    again = profile.begin(member.folder, invitation, world.identity.root_pem, clock=clock)
    asked = again.request()
    again.install(world.enrol(asked, invitation.id, invitation.proof(asked)).chain_pem)
    assert world.authorise(shown_by(again)) == EUROPE
    with pytest.raises(Refused, match=r"^unknown"):
        world.authorise(stolen)
    assert world.admissions(EUROPE) == 2


def test_a_paused_member_keeps_its_key(world: Authority, member: Profile) -> None:
    world.revoke(EUROPE, pause=True)
    with pytest.raises(Refused, match=r"^paused"):
        world.authorise(shown_by(member))
    assert world.readmit(EUROPE, expires_s=HOUR_S) is None
    assert world.authorise(shown_by(member)) == EUROPE
    assert world.admissions(EUROPE) == 1


@pytest.mark.parametrize("method", ["revoke", "readmit"])
def test_a_name_that_is_no_member_is_told_with_the_nearest(world: Authority, member: Profile, method: str) -> None:
    given = {} if method == "revoke" else {"expires_s": HOUR_S}
    with pytest.raises(GatewayError, match=r"is no member; did you mean 'world/europe'"):
        getattr(world, method)("world/eurpoe", **given)


# ---- who asks ---------------------------------------------------------------------------------------------------


def test_a_member_speaks_for_itself_alone(world: Authority, member: Profile, tmp_path: Path) -> None:
    make_member(world, tmp_path / "asia", "world/asia", clock=member.clock)
    assert world.authorise(shown_by(member), path=EUROPE) == EUROPE
    with pytest.raises(Refused, match=r"^wrong_path: world/europe .*speaks as 'world/asia'"):
        world.authorise(shown_by(member), path="world/asia")


def test_a_member_of_another_world_is_refused(world: Authority, tmp_path: Path, clock: FakeClock) -> None:
    other = make_world(tmp_path / "other", clock=clock)
    stranger = make_member(other, tmp_path / "stranger", clock=clock)
    with pytest.raises(Refused, match=r"^wrong_world"):
        world.authorise(shown_by(stranger))


def test_the_servers_certificate_is_not_one_of_a_member(world: Authority) -> None:
    server = certificates.der(world.identity.server()[1])
    for certificate in (server, certificates.der(world.identity.root), b"", b"0" * 10_000):
        with pytest.raises(Refused, match=r"^bad_certificate"):
            world.authorise(certificate)


def test_a_refusal_changes_no_file(world: Authority, member: Profile, clock: FakeClock) -> None:
    world.invite("world/asia", expires_s=HOUR_S)
    before = contents(world.identity.folder)
    for path in ("world/asia", "world", ""):
        with pytest.raises(Refused):
            world.authorise(shown_by(member), path=path)
    with pytest.raises(Refused):
        world.renew(shown_by(member), b"0")
    with pytest.raises(Refused):
        world.enrol(request(), "0" * 16, b"")
    assert contents(world.identity.folder) == before


def test_when_a_member_was_there_is_written_once_a_minute(world: Authority, member: Profile, clock: FakeClock) -> None:
    began_s = clock()
    for _ in range(3):
        world.authorise(shown_by(member))
        clock.tick(hours=0.005)
    assert world.registry.seen() == {EUROPE: began_s}
    clock.tick(hours=0.01)
    world.authorise(shown_by(member))
    assert world.registry.seen() == {EUROPE: clock()}
