"""What `worldlm gateway check` says of the way between a member and its world."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from support.borders import NodeAsParent, a_border
from support.gateway import make_member, make_world, moved_to
from support.nodes import a_node

from worldlm_ray.gateway.connections import ConnectionLimits
from worldlm_ray.gateway.probe import Finding, check
from worldlm_ray.gateway.profile import Profile
from worldlm_ray.tensors.layout import make_layout

LAYOUT = make_layout([("body.weight", (100,)), ("head.weight", (7,))], ["head.*"], layers=0)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


async def findings(profile: Profile) -> list[Finding]:
    return [finding async for finding in check(profile)]


def test_all_is_well_until_the_member_is_revoked(tmp_path: Path) -> None:
    async def look() -> None:
        node = a_node(layout=LAYOUT, initial=np.zeros(LAYOUT.size, np.float32), children=("a",))
        limits = ConnectionLimits(look_s=10.0)  # else a connection may be cut before its refusal is sent
        async with a_border(tmp_path, NodeAsParent(node), LAYOUT, limits=limits) as border:
            profile = moved_to(border.member("world/a").folder, border.port)
            found = await findings(profile)
            assert [each.what for each in found] == [
                "name",
                "certificate",
                "gateway",
                "clock",
                "round trip",
                "speed",
            ]
            assert all(each.is_good for each in found)
            assert "world/a, good for 30.0 days" in found[1].text
            assert found[-1].text.count("Mbit/s") == 2
            border.world.revoke("world/a")
            *_, last = await findings(profile)
            assert not last.is_good
            assert last.text.startswith("revoked: world/a")

    asyncio.run(look())


def test_a_gateway_that_is_not_there_is_said_in_a_line(tmp_path: Path) -> None:
    profile = make_member(make_world(tmp_path / "gateway", port=1), tmp_path / "profile")
    *_, last = asyncio.run(findings(profile))
    assert (last.what, last.is_good) == ("gateway", False)
    assert last.text.startswith("unreachable: ")
