"""What a world's operator types about members: one line each way, and an error of one line with its cure."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from support.gateway import PASSPHRASE
from support.gateway_commands import refused, run

from worldlm_ray.errors import ConfigError, WorldLMError
from worldlm_ray.gateway import certificates, keys, profile
from worldlm_ray.gateway.authority import Authority
from worldlm_ray.gateway.invitation import read_invitation
from worldlm_ray.gateway.profile import Profile

EUROPE = "world/europe"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a file that holds the passphrase."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pass").write_text(f"{PASSPHRASE}\n")
    return tmp_path


@pytest.fixture
def world(here: Path) -> Authority:
    run("init", "ACME", "--name", "gw.acme.org", "--passphrase-file", "pass")
    return Authority(here / "gateway")


def joined(world: Authority, line: str, folder: Path) -> Profile:
    invitation = read_invitation(line.strip())
    member = profile.begin(folder, invitation, world.identity.root_pem)
    request = member.request()
    member.install(world.enrol(request, invitation.id, invitation.proof(request)).chain_pem)
    return member


def rows() -> dict[str, dict[str, object]]:
    found: list[dict[str, object]] = json.loads(run("members", "--json").stdout)
    return {str(row["member"]): row for row in found}


def test_every_command_is_summed_up_in_a_whole_sentence_and_fits_80_columns() -> None:
    lines = run("--help").output.partition("Commands:")[2].strip().splitlines()
    assert len(lines) == 15
    assert [line for line in lines if not line.endswith(".") or line.endswith("...")] == []
    for line in lines:
        for shown in run(line.split()[0], "--help").output.splitlines():
            assert len(shown) <= 80


def test_from_a_world_to_a_member_and_back(world: Authority, here: Path) -> None:
    invited = run("invite", EUROPE, "--expires", "30m")
    assert len(invited.stdout.splitlines()) == 1  # the line alone: it can be piped
    assert "lets world/europe in once, until" in invited.stderr
    assert (rows()[EUROPE]["state"], rows()[EUROPE]["key"]) == ("invited", None)

    member = joined(world, invited.stdout, here / "acme")
    [row] = rows().values()
    assert (row["state"], row["key"]) == ("active", keys.fingerprint(member.identity()[0].public_key()))
    assert row["days"] == pytest.approx(30, abs=0.01)
    assert "already" in refused("invite", EUROPE)

    assert "readmit world/europe` lets it in again" in run("revoke", EUROPE).stderr
    assert rows()[EUROPE]["state"] == "revoked"
    line = run("readmit", EUROPE).stdout
    assert rows()[EUROPE]["state"] == "invited"
    joined(world, line, here / "acme")
    assert rows()[EUROPE]["state"] == "active"

    assert "is paused" in run("revoke", EUROPE, "--pause").stderr
    assert rows()[EUROPE]["state"] == "paused"
    again = run("readmit", EUROPE)
    assert (again.stdout, again.stderr) == ("", "world/europe is let in again, with the key that it has\n")
    assert rows()[EUROPE]["state"] == "active"


def test_the_table_fits_80_columns_and_shows_the_key_where_there_is_room(world: Authority, here: Path) -> None:
    assert "none yet" in run("members").stdout
    member = joined(world, run("invite", EUROPE).stdout, here / "acme")
    world.authorise(certificates.der(member.identity()[1]))
    run("invite", "world/asia")
    table = run("members").stdout
    assert keys.spoken(str(rows()[EUROPE]["key"])) in table
    assert "https://gw.acme.org:8443   issuing key good for 120 days" in table
    [row] = [line for line in table.splitlines() if EUROPE in line]
    assert row.split()[1:5] == ["active", "30.0", "0", "s"]
    [row] = [line for line in table.splitlines() if "world/asia" in line]
    assert row.split()[1:5] == ["invited", "2.0", "-", "-"]


def test_a_key_is_approved_after_it_was_compared(world: Authority, here: Path) -> None:
    invitation = read_invitation(run("invite", EUROPE, "--approve").stdout.strip())
    assert "no key waits" in refused("approve", EUROPE)
    member = profile.begin(here / "acme", invitation, world.identity.root_pem)
    request = member.request()
    with pytest.raises(WorldLMError, match=r"^waiting"):
        world.enrol(request, invitation.id, invitation.proof(request))
    assert rows()[EUROPE]["state"] == "to be approved"
    with pytest.raises(WorldLMError, match="not approved"):
        run("approve", EUROPE, answer="n\n")
    done = run("approve", EUROPE, answer="y\n")
    assert keys.spoken(keys.fingerprint(certificates.read_request(request))) in done.stdout
    assert "gets its certificate when it asks next" in done.stderr
    member.install(world.enrol(request, invitation.id, invitation.proof(request)).chain_pem)
    assert rows()[EUROPE]["state"] == "active"


def test_an_invitation_is_taken_back(world: Authority) -> None:
    run("invite", EUROPE)
    assert run("revoke", EUROPE).stderr == "the invitation of world/europe is taken back\n"
    assert rows() == {}


def test_the_issuing_key_is_rotated_by_the_passphrase(world: Authority, here: Path) -> None:
    assert run("rotate", "--passphrase-file", "pass").stderr == "issuing key 2 is good for 120 days\n"
    (here / "pass").write_text("wrong horse")
    assert "cannot be read by this passphrase" in refused("rotate", "--passphrase-file", "pass")


def test_an_issuing_key_that_is_nearly_over_is_warned_of(world: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("members").stderr == ""
    monkeypatch.setattr("worldlm_ray.cli.gateway.WARNED_DAYS", 121)
    assert "WARNING the issuing key is over in 120 days; run `worldlm gateway rotate`" in run("members").stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["members", "--dir", "nowhere"], "nowhere: there is no such folder; name another by --dir, or make one"),
        (["invite", "europe"], "europe: is no path of a member; give one such as world/europe"),
        (["invite", EUROPE, "--expires", "tomorrow"], "--expires: 'tomorrow' is no time; give minutes, hours or days"),
        (["invite", EUROPE, "--expires", "400d"], "--expires: an invitation is good for 90 days at most"),
        (["revoke", EUROPE], f"{EUROPE}: is no member; there is none yet"),
        (["rotate"], "--passphrase-file: there is no terminal to ask for the passphrase; give a file"),
        (["rotate", "--passphrase-file", "nowhere"], "nowhere: the passphrase cannot be read from it"),
        (["init", "ACME", "--name", "a", "--passphrase-file", "pass"], "gateway: holds a world already"),
        (["init", "ACME", "--name", "a b", "--dir", "b", "--passphrase-file", "pass"], "--name: 'a b' is no host name"),
    ],
)
def test_an_error_is_one_line_with_its_cure(world: Authority, words: list[str], said: str) -> None:
    assert said in refused(*words)


def test_a_damaged_registry_is_named(world: Authority, here: Path) -> None:
    (here / "gateway" / "members.json").write_text("{")
    assert "members.json: is damaged, so that no member is let in; restore it from a copy" in refused("members")


def test_without_the_extra_the_cure_is_to_install_it(world: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(ConfigError, match=r"cryptography is not installed; run `pip install 'worldlm_ray\[gateway\]'`"):
        run("members")
