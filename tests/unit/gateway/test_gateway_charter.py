"""A charter is signed by the world's issuing key, its epoch only rises, and both sides keep it."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from support.gateway import PASSPHRASE, make_member, make_world

from worldlm_ray.errors import GatewayError, Refused
from worldlm_ray.gateway import charter, keys
from worldlm_ray.gateway.authority import Authority
from worldlm_ray.gateway.charter import Charter, Charters, Signed, difference, impose
from worldlm_ray.gateway.guard import judged
from worldlm_ray.gateway.policy import Policy
from worldlm_ray.gateway.profile import Profile

ALIKE = {"budget.rounds": "2", "seed": "0"}
IMPOSED = {"exchange.codecs": "int8 int4", "aggregation.max_staleness": "none"}


def test_without_a_change_the_charter_stays_and_with_one_its_epoch_rises(world: Authority) -> None:
    one = impose(world.identity, "world", ALIKE, IMPOSED)
    assert one.charter.epoch == 1
    assert impose(world.identity, "world", ALIKE, IMPOSED).raw == one.raw
    two = impose(world.identity, "world", ALIKE | {"seed": "1"}, IMPOSED)
    assert two.charter.epoch == 2
    assert impose(world.identity, "world", ALIKE, IMPOSED).charter.epoch == 3  # back again is a change, too
    assert Charters(world.identity.folder, world.identity.root).epochs() == [1, 2, 3]


def test_the_world_signs_no_lower_epoch(world: Authority) -> None:
    impose(world.identity, "world", ALIKE, IMPOSED, epoch=7)
    for epoch in (0, 3, 7):
        with pytest.raises(GatewayError, match=rf"--epoch: {epoch} does not rise above 7, .*; give one from 8"):
            impose(world.identity, "world", ALIKE, IMPOSED, epoch=epoch)
    assert impose(world.identity, "world", ALIKE, IMPOSED, epoch=9).charter.epoch == 9


def test_a_member_remembers_the_highest_epoch_and_refuses_a_lower_one(world: Authority, member: Profile) -> None:
    old, new = (impose(world.identity, "world", ALIKE | {"seed": seed}, IMPOSED) for seed in "01")
    judged(member, new.raw, Policy())
    judged(member, new.raw, Policy())
    with pytest.raises(Refused, match=r"lower_epoch: the world shows charter 1, and 2 is known; .*--epoch 3"):
        judged(Profile(member.folder, clock=member.clock), old.raw, Policy())
    assert member.charters.epochs() == [2]


def test_two_charters_of_one_epoch_are_not_believed(world: Authority, member: Profile) -> None:
    judged(member, impose(world.identity, "world", ALIKE, IMPOSED).raw, Policy())
    (world.identity.folder / charter.FOLDER / "0001.json").unlink()
    other = impose(world.identity, "world", ALIKE | {"seed": "5"}, IMPOSED)
    with pytest.raises(Refused, match="lower_epoch: the world shows another charter 1"):
        judged(member, other.raw, Policy())


def test_a_charter_of_another_world_or_of_a_member_s_key_is_refused(
    world: Authority, member: Profile, tmp_path: Path
) -> None:
    signed = impose(make_world(tmp_path / "other").identity, "world", ALIKE, IMPOSED)
    with pytest.raises(Refused, match="bad_certificate"):
        judged(member, signed.raw, Policy())
    body = impose(world.identity, "world", ALIKE, IMPOSED).body
    key, own, issuing = member.identity()
    from worldlm_ray.gateway import certificates

    for chain in (certificates.pem(own), certificates.pem(issuing)):
        forged = Signed(
            charter=charter.read(impose(world.identity, "world", ALIKE, IMPOSED).raw).charter,
            body=body,
            signature=keys.sign(key, b"worldlm charter\n" + body),
            chain=chain,
        )
        with pytest.raises(Refused, match=r"bad_certificate|bad_signature"):
            judged(member, forged.raw, Policy())
    with pytest.raises(Refused, match="no_charter"):
        judged(member, b"", Policy())
    assert member.charters.epochs() == []


def test_after_a_rotation_the_same_charter_is_signed_by_the_new_key(world: Authority, member: Profile) -> None:
    old = impose(world.identity, "world", ALIKE, IMPOSED)
    world.rotate(PASSPHRASE)
    new = impose(world.identity, "world", ALIKE, IMPOSED)
    assert (new.body, new.chain != old.chain) == (old.body, True)
    member.generation = 2
    with pytest.raises(Refused, match="old_issuing_key"):
        judged(member, old.raw, Policy())
    judged(member, new.raw, Policy())


def test_what_differs_is_named(world: Authority) -> None:
    old = Charter(world="w", node="world", epoch=1, alike=ALIKE, imposed=IMPOSED)
    new = replace(old, epoch=2, alike={"seed": "1", "budget.tokens": "9"})
    assert difference(old, new) == [
        ("budget.rounds", "2", None),
        ("budget.tokens", None, "9"),
        ("seed", "0", "1"),
    ]
    assert len(difference(None, old)) == 4
    assert list(old.unlike(ALIKE | {"more": "x"}, who="world/a")) == []
    for mine, got in ((ALIKE | {"seed": "3"}, "'3'"), ({"budget.rounds": "2"}, "'not given'")):
        said = f"seed is {got} at world/a, and '0' in charter 1 of world: have it alike on both sides"
        assert list(old.unlike(mine, who="world/a")) == [said]


def test_a_term_that_is_too_long_is_named_before_anything_is_signed(world: Authority) -> None:
    with pytest.raises(GatewayError, match=r"seed: too long for a charter; give a shorter value"):
        impose(world.identity, "world", {"seed": "x" * 300}, {})
    assert Charters(world.identity.folder, world.identity.root).newest() is None


def test_mutated_charters_are_refused_by_name(world: Authority, tmp_path: Path) -> None:
    member = make_member(world, tmp_path / "m", clock=world.clock)
    raw, random_ = impose(world.identity, "world", ALIKE, IMPOSED).raw, random.Random(5)
    names = set()
    for _ in range(600):
        changed = bytearray(raw)
        for _ in range(random_.randint(1, 3)):
            place = random_.randrange(len(changed))
            changed[place : place + random_.randint(0, 2)] = random_.randbytes(random_.randint(0, 2))
        if json_of(bytes(changed)) == json_of(raw):
            continue
        with pytest.raises(Refused) as error:
            judged(member, bytes(changed), Policy())
        names.add(error.value.reason)
    assert names <= {"bad_charter", "bad_certificate", "bad_signature", "wrong_world"}
    assert {"bad_charter", "bad_signature"} <= names
    assert member.charters.epochs() == []


def json_of(raw: bytes) -> object:
    """What counts of a charter's file: its parts, with the signature and the certificate as their readers see them."""
    try:
        signed = charter.read(raw)
    except Refused:
        return None
    from worldlm_ray.gateway import certificates

    try:
        chain = [certificates.der(each) for each in certificates.read_pem(signed.chain, "")]
    except GatewayError:
        return None
    return signed.body, signed.signature, chain


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", "{" * 5_000, json.dumps({"charter": "{}"}), "\xff"])
def test_what_is_no_charter_is_refused(text: str) -> None:
    with pytest.raises(Refused, match="bad_charter"):
        charter.read(text.encode("latin-1"))


def test_a_damaged_file_is_named(world: Authority) -> None:
    impose(world.identity, "world", ALIKE, IMPOSED)
    (world.identity.folder / charter.FOLDER / "0001.json").write_text("{")
    with pytest.raises(GatewayError, match=r"0001\.json: is no charter of this world .*; restore it from a copy"):
        impose(world.identity, "world", ALIKE, IMPOSED)
