"""What each side of a border tells of the line, now and then: one record of the node on the other side."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from worldlm_ray.errors import GatewayError, WorldLMError
from worldlm_ray.gateway import certificates
from worldlm_ray.gateway.certificates import DAY_S
from worldlm_ray.gateway.keys import Clock
from worldlm_ray.gateway.meter import Meter, mbit_per_s
from worldlm_ray.gateway.profile import Profile
from worldlm_ray.gateway.requests import Member
from worldlm_ray.plan.plan import Plan
from worldlm_ray.records import BorderRecord

REPORT_S = 5.0
"""Between two records."""
PATIENCE_S = 45.0
"""A member that asks for nothing for so long is offline: three times the heartbeat, and a pull asks after 25 s."""


@dataclass(frozen=True, kw_only=True)
class Freight:
    """What crosses a border: see BorderRecord."""

    parameters: int
    codec: str
    overlap: bool = False


def freight(plan: Plan, *, is_member: bool = False) -> Freight:
    """What crosses a border of a run.

    Args:
        plan: the run.
        is_member: whether it is the border above the run, and not one below, of whose other side less is known.
    """
    overlap = is_member and (plan.top.kind != "client" or plan.top.settings.exchange.overlap)
    return Freight(parameters=plan.layout.size, codec=plan.config.exchange.codec, overlap=overlap)


async def tell_often(tell: Callable[[], None]) -> None:
    """Tell, again and again, until this is cancelled."""
    while True:
        await asyncio.sleep(REPORT_S)
        tell()


def of_member(member: Member, freight: Freight, *, now_s: float, clock: Clock = time.time) -> BorderRecord:
    """What the world's side tells of a member.

    Args:
        member: what the gateway knows of it.
        freight: what crosses.
        now_s: run time.
        clock: Unix seconds.
    """
    try:
        days = (certificates.end_of(certificates.read_der(member.certificate)) - clock()) / DAY_S
    except WorldLMError:
        days = None
    offline_s = member.meter.offline_s(patience_s=PATIENCE_S)
    return _record(member.path, member.meter, freight, now_s=now_s, days=days, offline_s=offline_s)


def of_parent(path: str, meter: Meter, profile: Profile, freight: Freight, *, now_s: float) -> BorderRecord:
    """What a member's side tells of the node above it.

    Args:
        path: of that node.
        meter: of the link.
        profile: the member's.
        freight: what crosses.
        now_s: run time.
    """
    try:
        days = profile.days_left()
    except GatewayError:
        days = None
    return _record(path, meter, freight, now_s=now_s, days=days, offline_s=meter.offline_s())


def _record(
    path: str, meter: Meter, freight: Freight, *, now_s: float, days: float | None, offline_s: float
) -> BorderRecord:
    found = meter.take()
    return BorderRecord(
        node=path,
        now_s=now_s,
        bytes_up=found.bytes_up,
        bytes_down=found.bytes_down,
        mbit_up=mbit_per_s(found.bytes_up, found.up_s),
        mbit_down=mbit_per_s(found.bytes_down, found.down_s),
        resumed=found.resumed,
        accepted=found.accepted,
        refused=found.refused,
        tau=found.tau,
        every_s=found.every_s,
        **vars(freight),
        certificate_days=days,
        offline_s=offline_s,
    )
