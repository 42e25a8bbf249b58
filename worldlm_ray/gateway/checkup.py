"""Whether a member could join its world now: what `worldlm gateway check` looks at, one finding after the other.

First comes the way to the world, as far as it leads: name, certificate, gateway, clock, round trip, speed, versions.
Then what the two sides ask of each other: the charter, the member's configuration, its policy, its operator's word. A
world that cannot be reached is judged by the charter that it has shown last. Nothing is accepted here, and only
measurements are sent. A new charter is kept, so that `worldlm gateway charter diff` shows it.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

import worldlm_ray
from worldlm_ray.errors import GatewayError, MessageError, Refused, detail_of
from worldlm_ray.gateway import charter as charters
from worldlm_ray.gateway import guard, terms, wire
from worldlm_ray.gateway import policy as policies
from worldlm_ray.gateway.charter import Charter, Signed, difference
from worldlm_ray.gateway.contexts import client_context
from worldlm_ray.gateway.http import Http, checking
from worldlm_ray.gateway.policy import Policy
from worldlm_ray.gateway.probe import PROBE_BYTES, Probed
from worldlm_ray.gateway.profile import Profile
from worldlm_ray.gateway.standing import Standing, State
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.tree import parent_path

ROUND_TRIPS = 5
"""Of which the shortest is told."""
ENOUGH_S = 1.0
"""A first try with a sixteenth of PROBE_BYTES that takes so long has measured the speed."""
CLOCK_S = 300.0
"""The world's clock may differ by so much."""
LISTED = 4
"""Terms of a new charter that a line names."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    text: str
    is_good: bool = True
    mbit: tuple[float, float] | None = None
    """Of a measurement of speed: megabits per second up and down."""


async def check(profile: Profile, plan: Plan | None = None) -> AsyncIterator[Finding]:
    """Look at all that stands between a member and its world.

    Args:
        profile: the member's.
        plan: the member's run, to be compared with the charter; None for none.

    Raises:
        ConfigError: the plan's initial parameters or its tokenizer cannot be read.
    """
    shown: bytes | None = None
    yield await _name(profile)
    found = _certificate(profile)
    yield found
    if found.is_good:
        http = Http(profile.url, checking(client_context(profile), profile.check_server), connections=1, tries=2)
        try:
            async for finding in _measured(http):
                yield finding
            shown = await http.call("POST", "charter", most=wire.CHARTER_BYTES)
            yield await _versions(http, shown)
        except MessageError as error:
            yield _failed(error)
        finally:
            await http.close()
    for finding in _terms(profile, plan, shown):
        yield finding


# ---- the way to the world ----------------------------------------------------------------------------------------


async def _name(profile: Profile) -> Finding:
    parts = urlsplit(profile.url)
    host, port = parts.hostname or "", parts.port or 443
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return Finding("name", f"{host} is {', '.join(sorted({str(each[4][0]) for each in found}))}")
    except OSError as error:
        # With a proxy, the proxy looks names up.
        return Finding("name", f"{host} is not known here ({error.strerror or error})")


def _certificate(profile: Profile) -> Finding:
    try:
        days = profile.days_left()
    except GatewayError as error:
        return Finding("certificate", str(error), is_good=False)
    if days > 0:
        return Finding("certificate", f"of {profile.path}, good for {days:.1f} days")
    cure = f"ask for a new invitation, and run `worldlm gateway join LINE --dir {profile.folder}`"
    return Finding("certificate", f"of {profile.path}, over for {-days:.1f} days; {cure}", is_good=False)


async def _measured(http: Http) -> AsyncIterator[Finding]:
    began = time.monotonic()
    await _probe(http, b"\0")
    yield Finding("gateway", f"answers by TLS 1.3, after {1e3 * (time.monotonic() - began):.0f} ms for the first time")
    trips = []
    for _ in range(ROUND_TRIPS):
        began = time.monotonic()
        found = await _probe(http, b"\0")
        trips.append(time.monotonic() - began)
    apart_s = time.time() - found.now_s
    is_good = abs(apart_s) < CLOCK_S
    cure = "" if is_good else "; set the clock of this machine, or of the gateway's"
    yield Finding("clock", f"{apart_s:+.1f} s from the world's{cure}", is_good=is_good)
    yield Finding("round trip", f"{1e3 * min(trips):.1f} ms")
    for size in (PROBE_BYTES // 16, PROBE_BYTES):
        began = time.monotonic()
        await _probe(http, bytes(size))
        took_s = time.monotonic() - began
        if took_s > ENOUGH_S:
            break
    up = 8e-6 * size / took_s
    began = time.monotonic()
    got = await http.call("POST", "probe", most=PROBE_BYTES)
    down = 8e-6 * len(got) / (time.monotonic() - began)
    text = f"{up:,.1f} Mbit/s up, {down:,.1f} Mbit/s down, over one connection"
    yield Finding("speed", text, mbit=(up, down))


async def _versions(http: Http, shown: bytes) -> Finding:
    """Whether both sides speak alike; the layout is the charter's here, and compared with the configuration later."""
    try:
        layout = charters.read(shown).charter.alike.get("model.layout", "")
    except Refused:
        layout = ""
    hello = wire.Hello(layout=layout, software=f"worldlm_ray {worldlm_ray.__version__}")
    found = await http.ask("hello", hello, wire.Terms)
    both = f"protocol {hello.protocol} and schema {hello.schema} on both sides"
    return Finding("versions", f"{both}; {found.software} there, {hello.software} here")


async def _probe(http: Http, body: bytes) -> Probed:
    return wire.parsed(Probed, await http.call("POST", "probe", body))


def _failed(error: MessageError) -> Finding:
    if error.reason == "unreachable":
        cure = "check that the gateway runs, that its port is open to you, and HTTPS_PROXY"
        return Finding("gateway", f"{error.reason}: {error.detail}; {cure}", is_good=False)
    what = "versions" if error.reason in ("wrong_protocol", "wrong_schema", "unknown_request") else "world"
    cure = "; run one version of worldlm_ray on both sides" if what == "versions" else ""
    return Finding(what, f"{error.reason}: {error.detail}{cure}", is_good=False)


# ---- what the two sides ask of each other ------------------------------------------------------------------------


def _terms(profile: Profile, plan: Plan | None, shown: bytes | None) -> Iterator[Finding]:
    """Charter, configuration and policy.

    Args:
        profile: the member's.
        plan: the member's run.
        shown: the charter as it came now; None if it did not come.
    """
    policy, problem = Policy(), ""
    try:
        policy = policies.of_profile(profile.folder)
    except GatewayError as error:
        problem = detail_of(error)
    signed: Signed | None = None
    try:
        signed = profile.charters.newest() if shown is None else guard.kept(profile, shown)
        yield _charter(profile, signed, policy, is_new=shown is not None)
    except GatewayError as error:
        yield Finding("charter", detail_of(error), is_good=False)
    charter = None if signed is None else signed.charter
    if charter is not None and (limits := terms.limits(charter)):
        yield Finding("limits", f"at most {', and '.join(limits)}")
    yield from _configuration(profile, plan, charter)
    if problem:
        yield Finding("policy", problem, is_good=False)
        return
    yield from _policy(profile, plan, charter, policy)
    yield from _link(profile, policy)


def _charter(profile: Profile, signed: Signed | None, policy: Policy, *, is_new: bool) -> Finding:
    if signed is None:
        return Finding("charter", "none has been shown yet; mend the way to the world first", is_good=False)
    charter = signed.charter
    text = f"{charter.epoch} of {charter.node}{'' if is_new else ', as it was shown last'}"
    known = Standing(profile.folder).accepted
    if reason := guard.waits(profile, signed, policy, known):
        return Finding("charter", f"{text}; {reason}", is_good=False)
    accepted = known[0]
    if accepted in (0, charter.epoch) or accepted not in profile.charters.epochs():
        return Finding("charter", text)
    changed = difference(profile.charters.get(accepted).charter, charter)
    said = [f"{key} {'-' if was is None else was} -> {'-' if now is None else now}" for key, was, now in changed]
    more = [f"and {len(said) - LISTED} more"] if len(said) > LISTED else []
    return Finding("charter", f"{text}; since charter {accepted}: {', '.join([*said[:LISTED], *more])}")


def _configuration(profile: Profile, plan: Plan | None, charter: Charter | None) -> Iterator[Finding]:
    if plan is None:
        yield Finding("configuration", "not compared; `worldlm gateway check --conf FILE` does")
        return
    is_good = True
    for problem in _unfit(profile, plan, charter):
        is_good = False
        yield Finding("configuration", problem, is_good=False)
    if is_good and charter is not None:
        yield Finding("configuration", f"fits charter {charter.epoch}: {len(charter.alike)} terms are alike")


def _unfit(profile: Profile, plan: Plan, charter: Charter | None) -> Iterator[str]:
    path = plan.top.path
    if path != profile.path:
        yield f"its tree begins at {path}, and the profile is of {profile.path}; change the tree, or join anew"
    above = parent_path(path)
    if charter is None or above is None:
        return
    try:
        yield from terms.run_problems(plan, charter, terms.alike(plan, plan.node(above)))
    except Refused as error:
        yield error.detail


def _policy(profile: Profile, plan: Plan | None, charter: Charter | None, policy: Policy) -> Iterator[Finding]:
    problems: list[str] = []
    if charter is not None:
        try:
            policy.judge(charter)
        except Refused as error:
            problems.append(error.detail)
    problems += [] if plan is None else policy.run_problems(plan)
    for problem in problems:
        yield Finding("policy", problem, is_good=False)
    if problems:
        return
    if not (profile.folder / policies.FILE).exists():
        yield Finding("policy", f"none: this side refuses nothing ({profile.folder / policies.FILE} would say more)")
    elif charter is not None:
        run = "" if plan is None else ", and this configuration"
        yield Finding("policy", f"{profile.folder / policies.FILE} allows charter {charter.epoch}{run}")


def _link(profile: Profile, policy: Policy) -> Iterator[Finding]:
    """What the operator has said, and what the clock says."""
    try:
        standing, reason = Standing(profile.folder), guard.closed(profile, policy)
        if not reason and standing.state is State.LEAVING:
            reason = f"this member is leaving; run `worldlm gateway resume {profile.folder}` if it should go on"
        if not reason and policy.is_over(profile.clock()):
            reason = f"the day of stop.after {policy.stop.after} is over; edit {profile.folder / policies.FILE}"
        has_run = "a run has it now" if standing.is_running else "no run has it now"
    except GatewayError as error:
        reason = detail_of(error)
    yield Finding("link", reason or f"open; {has_run}", is_good=not reason)
