"""What the tests of a border share: a world and a member under a clock that the test moves, and quick retries."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.gateway import FakeClock, make_member, make_world

from worldlm_ray.gateway import http
from worldlm_ray.gateway.authority import Authority
from worldlm_ray.gateway.profile import Profile


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def world(tmp_path: Path, clock: FakeClock) -> Authority:
    return make_world(tmp_path / "gateway", clock=clock)


@pytest.fixture
def member(world: Authority, tmp_path: Path, clock: FakeClock) -> Profile:
    return make_member(world, tmp_path / "acme", clock=clock)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A link that tries again at once, and directly."""
    monkeypatch.setattr(http, "FIRST_S", 0.001)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def traced() -> Iterator[None]:
    """A test that traces memory; the next one begins without, also when this one fails."""
    yield
    tracemalloc.stop()
