"""The folders of a world and of a member: their modes, what damage to them means, and signatures."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from support.gateway import HOUR_S, PASSPHRASE, FakeClock, make_member, make_world, shown_by

from worldlm_ray.errors import GatewayError, Refused
from worldlm_ray.gateway import certificates, identity, keys, profile
from worldlm_ray.gateway.authority import Authority
from worldlm_ray.gateway.invitation import Invitation
from worldlm_ray.gateway.profile import Profile
from worldlm_ray.gateway.registry import FILE, State

EUROPE = "world/europe"


# ---- files ------------------------------------------------------------------------------------------------------


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


# ---- the member's folder ----------------------------------------------------------------------------------------


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


# ---- signatures -------------------------------------------------------------------------------------------------


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
