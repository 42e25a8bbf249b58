"""From an invitation to a certificate, its renewal and its end, under a clock that the test moves."""

from __future__ import annotations

import json
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from support.gateway import HOUR_S, PASSPHRASE, FakeClock, make_member, make_world, shown_by

from worldlm_ray.errors import GatewayError, Refused
from worldlm_ray.gateway import certificates, identity, keys, profile
from worldlm_ray.gateway.authority import MOST_KEYS, Authority
from worldlm_ray.gateway.invitation import Invitation, read_invitation
from worldlm_ray.gateway.profile import Profile
from worldlm_ray.gateway.registry import FILE, State

EUROPE = "world/europe"


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def world(tmp_path: Path, clock: FakeClock) -> Authority:
    return make_world(tmp_path / "gateway", clock=clock)


@pytest.fixture
def member(world: Authority, tmp_path: Path, clock: FakeClock) -> Profile:
    return make_member(world, tmp_path / "acme", clock=clock)


def request() -> bytes:
    return certificates.make_request(keys.new_key())


def contents(folder: Path) -> dict[str, bytes]:
    """All files of the gateway but the one that is lost without harm."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "seen.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def journal(world: Authority) -> list[tuple[str, str]]:
    lines = (world.identity.folder / "journal.jsonl").read_text().splitlines()
    return [(line["event"], line["path"]) for line in map(json.loads, lines)]


def renewed(world: Authority, member: Profile) -> bytes:
    chain = world.renew(shown_by(member), member.request())
    member.install(chain)
    return chain


# ---- invitations ---------------------------------------------------------------------------------------------


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


# ---- approval ------------------------------------------------------------------------------------------------


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


def test_only_a_key_that_has_come_is_approved(world: Authority) -> None:
    world.invite(EUROPE, expires_s=HOUR_S, approve=True)
    with pytest.raises(GatewayError, match=r"no key waits"):
        world.approve(EUROPE)


# ---- the life of a certificate -------------------------------------------------------------------------------


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


# ---- revocation ----------------------------------------------------------------------------------------------


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
    assert world.registry.members()[EUROPE].admissions == 2


def test_a_paused_member_keeps_its_key(world: Authority, member: Profile) -> None:
    world.revoke(EUROPE, pause=True)
    with pytest.raises(Refused, match=r"^paused"):
        world.authorise(shown_by(member))
    assert world.readmit(EUROPE, expires_s=HOUR_S) is None
    assert world.authorise(shown_by(member)) == EUROPE
    assert world.registry.members()[EUROPE].admissions == 1


@pytest.mark.parametrize("method", ["revoke", "readmit"])
def test_a_name_that_is_no_member_is_told_with_the_nearest(world: Authority, member: Profile, method: str) -> None:
    given = {} if method == "revoke" else {"expires_s": HOUR_S}
    with pytest.raises(GatewayError, match=r"is no member; did you mean 'world/europe'"):
        getattr(world, method)("world/eurpoe", **given)


# ---- who asks ------------------------------------------------------------------------------------------------


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


# ---- files ---------------------------------------------------------------------------------------------------


def test_files_with_keys_are_for_their_owner_alone(world: Authority, member: Profile) -> None:
    member.request()
    folders = [world.identity.folder, member.folder]
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in folders] == [0o700, 0o700]
    secret = [
        path for folder in folders for path in folder.rglob("*") if path.is_file() and b"PRIVATE" in path.read_bytes()
    ]
    assert {path.name for path in secret} == {"root.key", "issuing.pem", "server.pem", "identity.pem", "pending.pem"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in secret} == {0o600}
    member.identity_file.chmod(0o640)
    with pytest.raises(GatewayError, match=r"other users may read this private key; run `chmod 600"):
        member.identity()


def test_the_root_needs_its_passphrase(world: Authority) -> None:
    assert b"ENCRYPTED" in (world.identity.folder / "root.key").read_bytes()
    with pytest.raises(GatewayError, match=r"root.key: .*cannot be read by this passphrase; give the one"):
        world.rotate("wrong horse")
    (world.identity.folder / "root.key").unlink()  # it may be kept elsewhere
    with pytest.raises(GatewayError, match=r"root.key: No such file"):
        world.rotate(PASSPHRASE)
    assert world.identity.renew_server() is False


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", '{"format": 2, "members": {}}', '{"format": 1, "members": {"world/a": {}}}', "\x00" * 10]
    + ['{"format": 1, "members": {"world/a": {"state": "king", "keys": []}}}'],
)
def test_a_damaged_registry_lets_no_member_in(world: Authority, member: Profile, text: str) -> None:
    world.authorise(shown_by(member))
    (world.identity.folder / FILE).write_text(text)
    with pytest.raises(
        GatewayError, match=r"members.json: is damaged, so that no member is let in; restore it"
    ) as error:
        world.authorise(shown_by(member))
    assert not isinstance(error.value, Refused)


def test_a_registry_that_is_gone_lets_no_member_in(world: Authority, member: Profile) -> None:
    kept = (world.identity.folder / FILE).read_bytes()
    (world.identity.folder / FILE).unlink()
    with pytest.raises(GatewayError, match=r"members.json: .*restore it from a copy"):
        world.authorise(shown_by(member))
    (world.identity.folder / FILE).write_bytes(kept)
    assert world.authorise(shown_by(member)) == EUROPE


def test_a_disk_that_is_full_changes_nothing(
    world: Authority, member: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("worldlm_ray.gateway.registry.replace_text", full)
        with pytest.raises(GatewayError, match=r"No space left on device; nothing has changed: make room"):
            world.revoke(EUROPE)
        assert world.authorise(shown_by(member)) == EUROPE
    world.revoke(EUROPE)
    with pytest.raises(Refused, match=r"^revoked"):
        world.authorise(shown_by(member))


def test_changes_of_two_processes_are_both_kept(world: Authority, tmp_path: Path, member: Profile) -> None:
    twin = Authority(world.identity.folder, clock=world.clock)
    twin.registry.members()
    make_member(world, tmp_path / "asia", "world/asia", clock=member.clock)
    twin.revoke(EUROPE)
    states = {path: each.state for path, each in world.registry.members().items()}
    assert states == {EUROPE: State.REVOKED, "world/asia": State.ACTIVE}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"names": []}, "members need a name to call"),
        ({"names": ["host name"]}, "--name"),
        ({"names": ["bücher.example"]}, "--name"),
        ({"passphrase": "short"}, "at least 8 characters"),
        ({"port": 0}, "is no port"),
        ({"name": "x" * 60}, "WORLD"),
        ({"name": ""}, "WORLD"),
    ],
)
def test_a_world_that_cannot_be_made_leaves_no_world(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    given = {"name": "acme", "names": ["localhost"], "passphrase": PASSPHRASE, "port": 8_443} | changes
    with pytest.raises(GatewayError, match=said):
        identity.init(tmp_path / "gateway", **given)  # type: ignore[arg-type]
    assert not (tmp_path / "gateway" / "gateway.json").exists()
    make_world(tmp_path / "gateway")


def test_a_world_is_not_made_over_another(world: Authority) -> None:
    with pytest.raises(GatewayError, match=r"holds a world already"):
        identity.init(world.identity.folder, "acme", ["localhost"], PASSPHRASE)


# ---- the member's folder -------------------------------------------------------------------------------------


def test_a_profile_belongs_to_one_world_and_path(world: Authority, member: Profile) -> None:
    other = world.invite("world/asia", expires_s=HOUR_S)
    with pytest.raises(GatewayError, match=r"is the profile of world/europe in another world; give another name"):
        profile.begin(member.folder, other, world.identity.root_pem)


def test_an_answer_for_another_member_key_or_world_is_not_installed(
    world: Authority, member: Profile, tmp_path: Path, clock: FakeClock
) -> None:
    kept, asked = member.identity_file.read_bytes(), member.request()
    key = certificates.read_request(asked)
    issuing, id_ = world.identity.issuing(), world.identity.world
    other = make_world(tmp_path / "other", clock=clock).identity.issuing()

    def answer(**changes: object) -> bytes:
        given = {"issuing": issuing, "key": key, "world": id_, "path": EUROPE, "now_s": clock()} | changes
        return certificates.pem(certificates.make_member(**given), issuing.certificate)  # type: ignore[arg-type]

    for wrong, reason in (
        (answer(path="world/asia"), "bad_certificate: .*another member"),
        (answer(world="0" * 64), "bad_certificate: .*another member"),
        (answer(key=keys.new_key().public_key()), "bad_certificate: .*another key"),
        (answer(issuing=other), "wrong_world"),
        (b"", "bad_certificate: .*without two certificates"),
        (certificates.pem(issuing.certificate), "bad_certificate: .*without two certificates"),
    ):
        with pytest.raises(Refused, match=rf"^{reason}"):
            member.install(wrong)
        assert member.identity_file.read_bytes() == kept
        assert member.request() == asked
    member.install(answer())
    assert member.identity_file.read_bytes() != kept


@pytest.mark.parametrize("name", ["profile.json", "root.pem", "identity.pem", "pending.pem"])
def test_a_damaged_profile_is_one_line_that_names_the_file(member: Profile, name: str) -> None:
    member.request()
    file = member.folder / name
    content = file.read_bytes()
    for damage in (b"", content[: len(content) // 2], content.replace(b"2", b"3").replace(b"A", b"B")):
        file.write_bytes(damage)
        with pytest.raises(GatewayError, match=rf"{name}.*; (restore|remove)"):
            _use(Profile(member.folder, clock=member.clock))


def _use(member: Profile) -> None:
    member.identity()
    member.request()


# ---- signatures ----------------------------------------------------------------------------------------------


def test_a_signature_is_of_these_bytes_by_this_key(world: Authority, member: Profile) -> None:
    key, certificate, issuing = member.identity()
    signature = keys.sign(key, b"push")
    keys.verify(certificate, signature, b"push")
    keys.verify(shown_by(member), signature, b"push")
    certificates.check_issued(certificate, issuing, world.identity.root)
    for other, mark, data in (
        (certificate, signature, b"pull"),
        (certificate, signature[:-1], b"push"),
        (certificate, b"", b"push"),
        (world.identity.server()[1], signature, b"push"),
    ):
        with pytest.raises(Refused, match=r"^bad_signature"):
            keys.verify(other, mark, data)
    with pytest.raises(Refused, match=r"^bad_certificate"):
        keys.verify(b"0", signature, b"push")


def test_a_receipt_of_another_world_is_refused(world: Authority, tmp_path: Path, clock: FakeClock) -> None:
    other = make_world(tmp_path / "other", clock=clock).identity
    receipt, issuing = other.server()[1], other.issuing().certificate
    certificates.check_issued(receipt, issuing, other.root)
    for root, middle in ((world.identity.root, issuing), (other.root, world.identity.issuing().certificate)):
        with pytest.raises(Refused, match=r"^wrong_world"):
            certificates.check_issued(receipt, middle, root)


def test_an_invitation_does_not_show_its_secret(world: Authority) -> None:
    invitation: Invitation = world.invite(EUROPE, expires_s=HOUR_S)
    assert repr(invitation.secret) not in repr(invitation)
