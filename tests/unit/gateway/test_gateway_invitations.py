"""An invitation, from its line to a first certificate, under a clock that the test moves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support.gateway import HOUR_S, FakeClock, contents, journal, request, shown_by

from worldlm_ray.errors import GatewayError, Refused
from worldlm_ray.gateway import certificates, keys, profile
from worldlm_ray.gateway.authority import Authority
from worldlm_ray.gateway.invitation import read_invitation
from worldlm_ray.gateway.profile import Profile
from worldlm_ray.gateway.registry import State

EUROPE = "world/europe"


# ---- invitations ------------------------------------------------------------------------------------------------


def test_an_invitation_is_one_line_that_says_where_and_which_world(world: Authority) -> None:
    invitation = world.invite("world/Île-de-France", expires_s=48 * HOUR_S, by="ann")
    line = invitation.line
    assert line.startswith("worldlm1.")
    assert line.isascii()
    assert len(line.split()) == 1
    assert len(line) < 300
    assert read_invitation(line) == invitation
    assert read_invitation(f'  "{line[:60]}\n  {line[60:].lower()}"\n') == invitation  # as a mail program breaks it
    assert (invitation.url, invitation.world) == ("https://localhost:8443", world.identity.world)


def test_the_folder_does_not_hold_the_secret(world: Authority) -> None:
    invitation = world.invite(EUROPE, expires_s=HOUR_S)
    kept = b"".join(contents(world.identity.folder).values())
    assert invitation.secret.hex().encode() not in kept
    assert invitation.line.encode() not in kept
    assert invitation.verifier.encode() in kept


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "this is no invitation"),
        ("worldlm2.MFRGG", "this is no invitation"),
        ("worldlm1.", "damaged"),
        ("worldlm1.MFRGG", "damaged"),
        ("worldlm1.0189", "damaged"),
        ("worldlm1." + "A" * 5_000, "this is no invitation"),
    ],
)
def test_a_line_that_is_none_is_refused(line: str, said: str) -> None:
    with pytest.raises(GatewayError, match=rf"{said}.*copy the whole line"):
        read_invitation(line)


def test_a_wrong_letter_is_found_before_anything_is_sent(world: Authority) -> None:
    line = world.invite(EUROPE, expires_s=HOUR_S).line
    other = "A" if line[40] != "A" else "B"
    with pytest.raises(GatewayError, match=r"damaged"):
        read_invitation(line[:40] + other + line[41:])


@pytest.mark.parametrize("url", ["http://gw.acme.org:8443", "https://", "https://gw/path", "https://gw:0x", "gw:8443"])
def test_an_address_that_is_none_is_refused(world: Authority, url: str) -> None:
    line = replace(world.invite(EUROPE, expires_s=HOUR_S), url=url).line
    with pytest.raises(GatewayError, match=r"address is not https://HOST:PORT"):
        read_invitation(line)


@pytest.mark.parametrize("path", ["world", "europe", "", "world/../italy", "world//italy", "world/a b", "/world/a"])
def test_a_path_that_is_none_is_refused(world: Authority, path: str) -> None:
    with pytest.raises(GatewayError):
        world.invite(path, expires_s=HOUR_S)


@pytest.mark.parametrize("expires_s", [0.0, -1.0, 91 * 24 * HOUR_S])
def test_an_invitation_for_ever_or_never_is_refused(world: Authority, expires_s: float) -> None:
    with pytest.raises(GatewayError, match=r"90 days at most"):
        world.invite(EUROPE, expires_s=expires_s)


def test_a_member_enrols_once(world: Authority, tmp_path: Path, clock: FakeClock) -> None:
    invitation = world.invite(EUROPE, expires_s=HOUR_S, by="ann")
    member = profile.begin(tmp_path / "acme", invitation, world.identity.root_pem, clock=clock)
    assert not member.has_joined
    asked = member.request()
    enrolled = world.enrol(asked, invitation.id, invitation.proof(asked))
    assert enrolled.path == EUROPE
    member.install(enrolled.chain_pem)
    assert member.has_joined
    assert world.authorise(shown_by(member)) == EUROPE

    known = world.registry.members()[EUROPE]
    assert (known.state, known.invited_by, known.since_s, known.admissions) == (State.ACTIVE, "ann", clock(), 1)
    [key] = known.keys
    assert key.fingerprint == keys.fingerprint(member.identity()[0].public_key())
    assert key.expires_s - clock() == 30 * certificates.DAY_S
    assert key.begins_s == clock() - HOUR_S
    assert journal(world) == [("invited", EUROPE), ("enrolled", EUROPE)]


def test_the_same_request_has_the_same_answer_while_the_invitation_is_good(world: Authority, clock: FakeClock) -> None:
    invitation, asked = world.invite(EUROPE, expires_s=2 * HOUR_S), request()
    first = world.enrol(asked, invitation.id, invitation.proof(asked))
    clock.tick(hours=1)
    before = contents(world.identity.folder)
    assert world.enrol(asked, invitation.id, invitation.proof(asked)) == first
    assert contents(world.identity.folder) == before
    clock.tick(hours=1)
    with pytest.raises(Refused, match=r"^invitation_expired: .*ask the world's operator for a new one"):
        world.enrol(asked, invitation.id, invitation.proof(asked))


def test_a_crash_before_the_answer_is_kept_gives_the_same_key_another_certificate(
    world: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    invitation, asked = world.invite(EUROPE, expires_s=HOUR_S), request()

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(world.invitations, "answer", crash)
        with pytest.raises(KeyboardInterrupt):
            world.enrol(asked, invitation.id, invitation.proof(asked))
    enrolled = world.enrol(asked, invitation.id, invitation.proof(asked))
    assert world.authorise(certificates.der(certificates.read_pem(enrolled.chain_pem, "")[0])) == EUROPE
    assert len(world.registry.members()[EUROPE].keys) == 1


def test_a_second_request_is_refused_and_recorded(world: Authority) -> None:
    invitation, first, second = world.invite(EUROPE, expires_s=HOUR_S), request(), request()
    world.enrol(first, invitation.id, invitation.proof(first))
    for _ in range(300):
        with pytest.raises(Refused, match=r"^invitation_used: .* tell the world's operator at once"):
            world.enrol(second, invitation.id, invitation.proof(second))
    assert journal(world).count(("refused", EUROPE)) == 100  # the disk does not fill


def test_of_two_servers_at_once_one_uses_an_invitation(world: Authority) -> None:
    twin = Authority(world.identity.folder, clock=world.clock)
    invitation, first, second = world.invite(EUROPE, expires_s=HOUR_S), request(), request()
    kept = world.invitations.get(invitation.id)
    mine = world.invitations.use(kept, first, "a")
    assert twin.invitations.use(kept, second, "b") == mine
    with pytest.raises(Refused, match=r"invitation_used"):
        twin.enrol(second, invitation.id, invitation.proof(second))


def test_a_wrong_secret_and_an_unknown_invitation_are_told_apart_by_the_world_alone(world: Authority) -> None:
    invitation, asked = world.invite(EUROPE, expires_s=HOUR_S), request()
    guess = replace(invitation, secret=bytes(16))
    said = set()
    for id_, proof in (
        (invitation.id, guess.proof(asked)),
        (invitation.id, invitation.proof(request())),  # that of another request
        (invitation.id, b""),
        ("0" * 16, invitation.proof(asked)),
        ("../" + invitation.id, invitation.proof(asked)),
        ("", b""),
    ):
        with pytest.raises(Refused, match=r"^bad_invitation") as refused:
            world.enrol(asked, id_, proof)
        said.add(str(refused.value))
    assert len(said) == 1
    assert world.invitations.use_of(invitation.id) is None


def test_an_invitation_that_is_over_is_refused(world: Authority, clock: FakeClock) -> None:
    invitation, asked = world.invite(EUROPE, expires_s=HOUR_S), request()
    clock.tick(hours=1)
    with pytest.raises(Refused, match=r"^invitation_expired"):
        world.enrol(asked, invitation.id, invitation.proof(asked))
    assert world.registry.members() == {}


def test_a_newer_invitation_takes_the_older_one_back(world: Authority) -> None:
    old, new, asked = world.invite(EUROPE, expires_s=HOUR_S), world.invite(EUROPE, expires_s=HOUR_S), request()
    with pytest.raises(Refused, match=r"^bad_invitation"):
        world.enrol(asked, old.id, old.proof(asked))
    assert world.enrol(asked, new.id, new.proof(asked)).path == EUROPE


@pytest.mark.parametrize("word", ["revoke", "invite"])
def test_an_invitation_that_is_taken_back_in_the_middle_of_an_enrolment_is_no_way_in(
    world: Authority, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    operator = Authority(world.identity.folder, clock=world.clock)
    invitation, asked = world.invite(EUROPE, expires_s=HOUR_S), request()

    def meanwhile(_: object) -> bool:
        getattr(operator, word)(EUROPE, **({"expires_s": HOUR_S} if word == "invite" else {}))
        return True

    monkeypatch.setattr(world.invitations, "is_approved", meanwhile)
    with pytest.raises(Refused, match=r"^bad_invitation"):
        world.enrol(asked, invitation.id, invitation.proof(asked))
    assert world.registry.members() == {}


def test_files_of_old_invitations_are_removed(world: Authority, clock: FakeClock) -> None:
    first = world.invite(EUROPE, expires_s=HOUR_S)
    clock.tick(days=31)
    world.invite("world/asia", expires_s=HOUR_S)
    assert not list(world.invitations.folder.glob(f"{first.id}.*"))


def test_a_member_is_not_invited_twice(world: Authority, member: Profile, clock: FakeClock) -> None:
    with pytest.raises(GatewayError, match=rf"is a member already; .*readmit {EUROPE}"):
        world.invite(EUROPE, expires_s=HOUR_S)
    clock.tick(days=31)
    with pytest.raises(Refused, match=r"^expired: .*over for 1.0 days; ask the world's operator for a new invitation"):
        world.authorise(shown_by(member))
    old = shown_by(member)
    invitation = world.invite(EUROPE, expires_s=HOUR_S)  # its keys are over
    again = profile.begin(member.folder, invitation, world.identity.root_pem, clock=clock)
    asked = again.request()
    again.install(world.enrol(asked, invitation.id, invitation.proof(asked)).chain_pem)
    assert world.authorise(shown_by(again)) == EUROPE
    assert shown_by(again) != old


def test_one_key_belongs_to_one_member(world: Authority, member: Profile) -> None:
    asked = certificates.make_request(member.identity()[0])
    invitation = world.invite("world/asia", expires_s=HOUR_S)
    with pytest.raises(Refused, match=rf"^known_key: .* is that of {EUROPE}; make a new one for world/asia"):
        world.enrol(asked, invitation.id, invitation.proof(asked))


# ---- approval ---------------------------------------------------------------------------------------------------


def test_a_key_waits_for_its_approval_and_is_compared_by_people(
    world: Authority, tmp_path: Path, clock: FakeClock
) -> None:
    invitation = world.invite(EUROPE, expires_s=HOUR_S, approve=True)
    member = profile.begin(tmp_path / "acme", invitation, world.identity.root_pem, clock=clock)
    asked = member.request()
    mark = keys.spoken(keys.fingerprint(certificates.read_request(asked)))
    for _ in range(2):
        with pytest.raises(Refused, match=rf"^waiting: .*`worldlm gateway approve {EUROPE}`.* {mark}"):
            world.enrol(asked, invitation.id, invitation.proof(asked))
        clock.tick(hours=2)  # the telephone may take longer than the invitation is good for
    assert [keys.spoken(use.fingerprint) for _, use in world.invitations.waiting()] == [mark]
    assert world.registry.members() == {}
    world.approve(EUROPE, by="ann")
    member.install(world.enrol(asked, invitation.id, invitation.proof(asked)).chain_pem)
    assert world.authorise(shown_by(member)) == EUROPE
    assert world.invitations.waiting() == []
    clock.tick(hours=1)  # from the approval on
    with pytest.raises(Refused, match=r"^invitation_expired"):
        world.enrol(asked, invitation.id, invitation.proof(asked))


def test_a_key_that_is_not_approved_is_turned_away_by_revoke(world: Authority) -> None:
    invitation, asked = world.invite(EUROPE, expires_s=HOUR_S, approve=True), request()
    with pytest.raises(Refused, match=r"^waiting"):
        world.enrol(asked, invitation.id, invitation.proof(asked))
    assert world.revoke(EUROPE) is False  # it was no member
    with pytest.raises(Refused, match=r"^bad_invitation"):
        world.enrol(asked, invitation.id, invitation.proof(asked))
    assert world.invitations.waiting() == []


def test_only_a_key_that_has_come_is_approved(world: Authority) -> None:
    world.invite(EUROPE, expires_s=HOUR_S, approve=True)
    with pytest.raises(GatewayError, match=r"no key waits"):
        world.approve(EUROPE)


def test_a_world_takes_no_more_members_than_its_operator_allows(world: Authority, member: Profile) -> None:
    full = Authority(world.identity.folder, clock=world.clock, most_members=1)
    invitation = full.invite("world/asia", expires_s=HOUR_S)
    asked = request()
    with pytest.raises(Refused) as found:
        full.enrol(asked, invitation.id, invitation.proof(asked))
    assert str(found.value) == (
        "too_many_members: the world has 1 members already; its operator can revoke one, or raise gateway.max_members"
    )
    assert journal(full)[-1] == ("refused", "world/asia")
    assert "world/asia" not in full.registry.members()
    full.revoke(EUROPE)
    assert full.enrol(asked, invitation.id, invitation.proof(asked)).path == "world/asia"
