"""What `worldlm gateway check` says of the way between a member and its world, and of what each asks of the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.borders import NodeAsParent, a_border, run
from support.gateway import make_member, make_world, moved_to
from support.guards import write
from support.nodes import a_node
from support.worlds import client

from worldlm_ray.gateway import terms
from worldlm_ray.gateway.charter import impose
from worldlm_ray.gateway.checkup import Finding, check
from worldlm_ray.gateway.connections import ConnectionLimits
from worldlm_ray.gateway.profile import Profile
from worldlm_ray.gateway.standing import Standing, State
from worldlm_ray.plan.plan import Plan
from worldlm_ray.tensors.layout import make_layout

Tiny = Callable[..., Plan]
LAYOUT = make_layout([("body.weight", (100,)), ("head.weight", (7,))], ["head.*"], layers=0)
WAY = ["name", "certificate", "gateway", "clock", "round trip", "speed", "versions"]

pytestmark = pytest.mark.usefixtures("quick")


async def findings(profile: Profile, plan: Plan | None = None) -> list[Finding]:
    return [finding async for finding in check(profile, plan)]


def wrong(found: list[Finding]) -> list[str]:
    return [f"{each.what}: {each.text}" for each in found if not each.is_good]


def a_world(layout: Any = LAYOUT) -> NodeAsParent:
    return NodeAsParent(a_node(layout=layout, initial=np.zeros(layout.size, np.float32), children=("a",)))


def a_member(tiny: Tiny, folder: Path, **changes: Any) -> Plan:
    tree = {"federation": "world/a", "children": [client("b", folder, 2)]}
    return tiny(**({"world": tree, "joins": "profile"} | changes))


# ---- the way ------------------------------------------------------------------------------------------------------


def test_all_is_well_until_the_member_is_revoked(tmp_path: Path) -> None:
    async def look() -> None:
        limits = ConnectionLimits(look_s=10.0)  # else a connection may be cut before its refusal is sent
        alike = {"model.layout": LAYOUT.hash}
        async with a_border(tmp_path, a_world(), LAYOUT, limits=limits, alike=alike) as border:
            profile = moved_to(border.member("world/a").folder, border.port)
            found = await findings(profile)
            assert [each.what for each in found] == [*WAY, "charter", "configuration", "policy", "link"]
            assert not wrong(found)
            by_name = {each.what: each.text for each in found}
            assert "world/a, good for 30.0 days" in by_name["certificate"]
            assert by_name["speed"].count("Mbit/s") == 2
            assert by_name["charter"] == "1 of world"
            assert by_name["configuration"] == "not compared; `worldlm gateway check --conf FILE` does"
            assert by_name["link"] == "open; no run has it now"
            border.world.revoke("world/a")
            found = await findings(profile)
            [said] = wrong(found)
            assert said.startswith("world: revoked: world/a (key ")
            assert said.endswith("is no member any more; ask the world's operator to readmit it")
            assert "1 of world, as it was shown last" in [each.text for each in found]

    run(look())


def test_a_gateway_that_is_not_there_is_said_in_a_line(tmp_path: Path) -> None:
    async def look() -> None:
        profile = make_member(make_world(tmp_path / "gateway", port=1), tmp_path / "profile")
        away, no_charter = wrong(await findings(profile))
        assert away.startswith("gateway: unreachable: ")
        assert away.endswith("; check that the gateway runs, that its port is open to you, and HTTPS_PROXY")
        assert no_charter == "charter: none has been shown yet; mend the way to the world first"

    run(look())


def test_a_certificate_that_is_over_needs_no_connection(member: Profile, clock: Any) -> None:
    clock.tick(days=31)
    found: list[Finding] = []

    async def look() -> None:
        found.extend(await findings(member))

    run(look())
    cure = f"ask for a new invitation, and run `worldlm gateway join LINE --dir {member.folder}`"
    assert wrong(found)[0] == f"certificate: of world/europe, over for 1.0 days; {cure}"
    assert "gateway" not in [each.what for each in found]


def test_a_world_of_another_version_is_named(tmp_path: Path) -> None:
    async def look() -> None:
        async with a_border(tmp_path, a_world(), LAYOUT, alike={"model.layout": LAYOUT.hash}) as border:
            border.gateway._settings = replace(border.settings, hello=replace(border.settings.hello, schema=1))
            [said] = wrong(await findings(moved_to(border.member().folder, border.port)))
            assert said.startswith("versions: wrong_schema: got schema ")
            assert said.endswith("run one version of worldlm_ray on both sides")

    run(look())


# ---- what each side asks of the other -----------------------------------------------------------------------------


def test_a_configuration_that_fits_is_said_to_fit(tiny: Tiny, tmp_path: Path) -> None:
    async def look() -> None:
        plan = a_member(tiny, tmp_path)
        alike = terms.alike(plan, plan.root)
        async with a_border(tmp_path, a_world(plan.layout), plan.layout, alike=alike) as border:
            profile = moved_to(border.member().folder, border.port)
            write(profile.folder, send={"codecs": ["fp32"]})
            found = await findings(profile, plan)
            assert not wrong(found)
            said = [f"{each.what}: {each.text}" for each in found[len(WAY) :]]
            assert said == [
                "charter: 1 of world",
                f"configuration: fits charter 1: {len(alike)} terms are alike",
                f"policy: {profile.folder}/policy.yaml allows charter 1, and this configuration",
                "link: open; no run has it now",
            ]
            assert Standing(profile.folder).accepted == (0, "")  # a look accepts nothing

    run(look())


def test_every_point_that_fails_is_a_line_with_its_cure(tiny: Tiny, tmp_path: Path) -> None:
    async def look() -> None:
        plan = a_member(tiny, tmp_path, budget={"rounds": 5}, seed=3)
        other = a_member(tiny, tmp_path)
        alike = terms.alike(other, other.root)
        imposed = {"exchange.codecs": "int8", "privacy.unit": "record"}
        async with a_border(tmp_path, a_world(plan.layout), plan.layout, alike=alike, imposed=imposed) as border:
            profile = moved_to(border.member().folder, border.port)
            write(profile.folder, send={"codecs": ["int4"]}, require={"min_clients": 2}, stop={"after": "2020-01-31"})
            said = wrong(await findings(profile, plan))
            mine = terms.alike(plan, plan.root)["model.initial"]
            assert said == [
                "configuration: budget.rounds is '5' at world/a, and '2' in charter 1 of world: "
                "have it alike on both sides",
                "configuration: seed is '3' at world/a, and '0' in charter 1 of world: have it alike on both sides",
                f"configuration: model.initial is '{mine}' at world/a, and '{alike['model.initial']}' in charter 1 of "
                "world: have it alike on both sides",
                "configuration: exchange.codec is fp32 at world/a, and not in charter 1 of world; "
                "set it to one of int8",
                "configuration: world.children[0].privacy.unit: is none at world/a/b, and record is asked for "
                "in charter 1 of world; make it stricter",
                "policy: charter 1 of world asks for more: exchange.codecs is int8, and send.codecs int4; "
                "edit the policy, or ask the world's operator",
                "policy: an update of world/a may be the work of 1, and require.min_clients is 2; "
                "set privacy.unit: client with a larger aggregation.buffer_size, or ask for less",
                "policy: exchange.codec is fp32 at world/a, and not in send.codecs; set it to one of int4",
                f"link: the day of stop.after 2020-01-31 is over; edit {profile.folder}/policy.yaml",
            ]

    run(look())


def test_another_path_than_the_profile_s_is_named(tiny: Tiny, tmp_path: Path) -> None:
    async def look() -> None:
        profile = make_member(make_world(tmp_path / "gateway", port=1), tmp_path / "profile", "world/europe")
        said = wrong(await findings(profile, a_member(tiny, tmp_path)))
        text = "its tree begins at world/a, and the profile is of world/europe; change the tree, or join anew"
        assert f"configuration: {text}" in said

    run(look())


def a_charter(profile: Profile, folder: Path, alike: dict[str, str], imposed: dict[str, str]) -> None:
    """One more charter that the world has shown to a member."""
    from worldlm_ray.gateway.authority import Authority

    profile.charters.keep(impose(Authority(folder / "gateway").identity, "world", alike, imposed))


@pytest.mark.parametrize(
    ("sections", "prepare", "said"),
    [
        ({}, State.PAUSED, "link: paused by the operator; run `worldlm gateway resume PROFILE`"),
        ({}, State.LEFT, "link: this member has left; run `worldlm gateway resume PROFILE` if it should go on"),
        ({}, State.LEAVING, "link: this member is leaving; run `worldlm gateway resume PROFILE` if it should go on"),
        (
            {"accept": {"charter": "ask"}},
            State.ACTIVE,
            "charter: 2 of world, as it was shown last; charter 2 waits to be accepted; look at `worldlm gateway "
            "charter diff PROFILE`, and run `worldlm gateway resume PROFILE --accept-charter`",
        ),
        ({"send": {"codex": []}}, State.ACTIVE, "policy: PROFILE/policy.yaml: send.codex"),
    ],
)
def test_what_keeps_a_link_shut_is_said(tmp_path: Path, sections: Any, prepare: State, said: str) -> None:
    async def look() -> None:
        profile = make_member(make_world(tmp_path / "gateway", port=1), tmp_path / "profile")
        a_charter(profile, tmp_path, {"seed": "0"}, {"exchange.codecs": "fp32"})
        newest = profile.charters.newest()
        assert newest is not None
        Standing(profile.folder).accept(newest)
        a_charter(profile, tmp_path, {"seed": "1"}, {"exchange.codecs": "fp32", "gateway.member_rate_mbps": "8.0"})
        write(profile.folder, **sections)
        Standing(profile.folder).become(prepare)
        found = await findings(profile)
        _, line = wrong(found)  # the first is of the gateway
        assert line.replace(str(profile.folder), "PROFILE").startswith(said)
        lines = [f"{each.what}: {each.text}" for each in found]
        assert "limits: at most 8 Mbit/s both ways together" in lines
        if "accept" not in sections:
            changed = "gateway.member_rate_mbps - -> 8.0, seed 0 -> 1"
            assert f"charter: 2 of world, as it was shown last; since charter 1: {changed}" in lines

    run(look())


# ---- limits in the charter ----------------------------------------------------------------------------------------


def test_a_member_s_limits_are_imposed_and_a_change_of_them_is_another_charter(tiny: Tiny, tmp_path: Path) -> None:
    def imposed(**limits: float) -> dict[str, str]:
        gateway = {"listen": "127.0.0.1:8443"} | limits
        plan = tiny([client("a", tmp_path, 1), {"member": "europe"}], gateway=gateway)
        return terms.imposed(plan, plan.root)

    none, some = imposed(), imposed(member_rate_mbps=200, member_gb_per_day=50, rate_mbps=500)
    keys = ["gateway.member_rate_mbps", "gateway.member_gb_per_day"]
    assert [none[key] for key in keys] == ["none", "none"]
    assert [some[key] for key in keys] == ["200.0", "50.0"]
    assert some == none | {key: some[key] for key in keys}  # what is of all members together stays at the world
    world = make_world(tmp_path / "gateway")
    made = [impose(world.identity, "world", {}, each).charter for each in (none, none, some)]
    assert [charter.epoch for charter in made] == [1, 1, 2]
    assert terms.limits(made[0]) == []
    assert terms.limits(made[2]) == ["200 Mbit/s both ways together", "50 GB of updates and models a day (UTC)"]
