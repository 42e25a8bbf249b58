"""A member's policy: what it refuses, whatever the world's charter says. It is a file that the member's operator edits.

    send:    {bytes_per_day: 50e9, rate_mbps: 200, hours: "20:00-06:00", codecs: [int8, int4]}
    fields:  {tokens: rounded, residuals: none}
    require: {privacy: {unit: client, target_epsilon: 8}, min_clients: 4}
    accept:  {max_model_step: 10.0, charter: ask}
    stop:    {after: 2027-01-31}

Every key may be left out: it then refuses nothing. The policy is judged against the charter before a member joins, and
against the run before it begins. The member's side applies it to each request, before a byte is sent.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Literal

import yaml

from worldlm_ray.config.checks import positive
from worldlm_ray.config.federated import CodecName
from worldlm_ray.config.gateway import LeastPrivacy
from worldlm_ray.config.loading import hint_of
from worldlm_ray.config.values import Problems, merged
from worldlm_ray.config.yaml_text import Document
from worldlm_ray.errors import ConfigError, GatewayError, Refused
from worldlm_ray.exchange.compression import nbytes
from worldlm_ray.gateway import terms
from worldlm_ray.gateway.charter import Charter
from worldlm_ray.plan.border_checks import least_privacy, summed_clients
from worldlm_ray.plan.plan import Plan
from worldlm_ray.storage.filesystem import replace_text

FILE = "policy.yaml"
"""Name in a profile's folder."""
POLICY_BYTES = 65_536
DIGITS = 2
"""Decimal digits of a rounded count."""
SLOWEST_MBPS = 0.5
"""At this rate four connections send their pieces well within the time after which a gateway takes one for dead."""
ROUNDED = ("tokens", "started_tokens")
"""Fields of an update's header that count tokens."""
_HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Sending:
    """When, how fast and how much is sent."""

    bytes_per_day: float | None = None
    """Of updates, each day of this machine's clock; an update that would exceed it waits for the next day."""
    rate_mbps: float | None = None
    """Mbit/s of updates, at most."""
    hours: str | None = None
    """HH:MM-HH:MM by this machine's clock, in which the link is open; it may go over midnight."""
    codecs: list[CodecName] = field(default_factory=list)
    """Codecs by which updates may be sent. Unless given: any that the charter allows."""


@dataclass(frozen=True, kw_only=True)
class Fields:
    """What an update says beside its values."""

    tokens: Literal["exact", "rounded"] = "exact"
    """`rounded`: counts of tokens are rounded down to two digits."""
    residuals: Literal["all", "none"] = "all"
    """Key layers that fitted no client of this member; each names the client that it comes from."""


@dataclass(frozen=True, kw_only=True)
class Requirements:
    """What the member's run must have before anything is sent."""

    privacy: LeastPrivacy = field(default_factory=LeastPrivacy)
    min_clients: int = 1
    """Different clients whose work is in each update: see `summed_clients` in worldlm_ray/plan/border_checks.py."""


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """What is taken from the world."""

    max_model_step: float | None = None
    """Largest L2 distance of a model from the one before, in multiples of that one's L2 norm."""
    charter: Literal["any", "ask"] = "any"
    """`ask`: a new charter pauses the link until `worldlm gateway resume --accept-charter`."""


@dataclass(frozen=True, kw_only=True)
class Stopping:
    """When the member leaves by itself."""

    after: str | None = None
    """YYYY-MM-DD: the last day, by this machine's clock."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """All of it."""

    send: Sending = field(default_factory=Sending)
    fields: Fields = field(default_factory=Fields)
    require: Requirements = field(default_factory=Requirements)
    accept: Acceptance = field(default_factory=Acceptance)
    stop: Stopping = field(default_factory=Stopping)

    # ---- what it refuses -------------------------------------------------------------------------------------

    def judge(self, charter: Charter) -> None:
        """Refuse a charter that asks for what this policy does not allow.

        Raises:
            Refused: policy: every conflict, in one line.
        """
        if found := list(self._conflicts(charter)):
            more = f"charter {charter.epoch} of {charter.node} asks for more: {', and '.join(found)}"
            raise Refused("policy", f"{more}; edit the policy, or ask the world's operator")

    def _conflicts(self, charter: Charter) -> Iterator[str]:
        allowed = self.send.codecs
        shared = [name for name in charter.codecs if not allowed or name in allowed]
        if not shared:
            yield f"exchange.codecs is {', '.join(charter.codecs)}, and send.codecs {', '.join(allowed)}"
        size = terms.number(charter, "model.parameters")
        if self.send.bytes_per_day is not None and size is not None and shared:
            least = min(nbytes(name, int(size)) for name in shared)
            if least > self.send.bytes_per_day:
                yield f"an update has {least:,} bytes, and send.bytes_per_day is {self.send.bytes_per_day:,.0f}"
        if self.fields.tokens == "rounded" and "weight" in charter.fields:
            yield "the world sums updates by their exact weight, and fields.tokens is rounded"

    def check_run(self, plan: Plan) -> None:
        """Refuse a run of the member that does not have what `require` and `send.codecs` ask for.

        Raises:
            Refused: policy: names the key of the policy, or of the run's configuration.
        """
        for problem in self.run_problems(plan):
            raise Refused("policy", problem)

    def run_problems(self, plan: Plan) -> Iterator[str]:
        """What of a run of the member `require` and `send.codecs` do not allow, one line for each."""
        for error in least_privacy(plan, self.require.privacy):
            yield f"{error} (require.privacy)"
        if (found := summed_clients(plan.top)) < self.require.min_clients:
            got = f"an update of {plan.top.path} may be the work of {found}, and require.min_clients is"
            cure = "set privacy.unit: client with a larger aggregation.buffer_size, or ask for less"
            yield f"{got} {self.require.min_clients}; {cure}"
        codec = plan.top.settings.exchange.codec
        if self.send.codecs and codec not in self.send.codecs:
            cure = f"set it to one of {', '.join(self.send.codecs)}"
            yield f"exchange.codec is {codec} at {plan.top.path}, and not in send.codecs; {cure}"

    # ---- when it sends ---------------------------------------------------------------------------------------

    def is_open(self, now_s: float) -> bool:
        """Whether the clock is inside `send.hours`."""
        if self.send.hours is None:
            return True
        first, last = _minutes(self.send.hours)
        now = time.localtime(now_s)
        minute = 60 * now.tm_hour + now.tm_min
        return first <= minute < last if first < last else minute >= first or minute < last

    def is_over(self, now_s: float) -> bool:
        """Whether the day of `stop.after` is over."""
        return self.stop.after is not None and day_of(now_s) > self.stop.after

    # ---- what it sends ---------------------------------------------------------------------------------------

    def allowed(self, header: dict[str, Any]) -> dict[str, Any]:
        """The fields of an update's header as they may be sent; what has changed is another object.

        Args:
            header: as the member's federation or client has packed it.
        """
        found = dict(header)
        if self.fields.residuals == "none" and found.get("residuals"):
            found["residuals"] = []
        if self.fields.tokens == "rounded":
            found |= {name: rounded(found[name]) for name in ROUNDED if isinstance(found.get(name), int)}
        return found


def rounded(count: int) -> int:
    """A count rounded down to two decimal digits: it never claims more than there is."""
    scale: int = 10 ** max(len(str(count)) - DIGITS, 0)
    return count // scale * scale


def day_of(now_s: float) -> str:
    """The day of this machine's clock, YYYY-MM-DD."""
    return time.strftime("%Y-%m-%d", time.localtime(now_s))


# ---- the file ----------------------------------------------------------------------------------------------------


def load(path: Path) -> Policy:
    """Read a policy.

    Raises:
        GatewayError: the file cannot be read, or a key or a value in it is wrong.
    """
    try:
        raw = path.read_bytes()
        if len(raw) > POLICY_BYTES:
            raise GatewayError(f"{path}: has {len(raw):,} bytes, expected at most {POLICY_BYTES:,}; give a policy")
        found = Document(raw.decode(), Policy, hint_of).value
    except OSError as error:
        raise GatewayError(f"{path}: {error.strerror or error}; give the file of a policy") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        detail = " ".join(str(error).split())[:200]
        raise GatewayError(f"{path}: is not valid YAML ({detail}); mend the file") from error
    problems = Problems()
    policy = merged(Policy(), {} if found is None else found, prefix="", problems=problems)
    _check(policy, problems)
    if problems.found:
        raise GatewayError(f"{path}: " + " | ".join(" ".join(str(each).split()) for each in problems.found))
    return policy


def of_profile(folder: Path) -> Policy:
    """The policy of a profile; one that refuses nothing if there is no file.

    Raises:
        GatewayError: as `load`.
    """
    path = folder / FILE
    return load(path) if path.exists() else Policy()


def install(source: Path, folder: Path) -> None:
    """Copy a policy into a profile's folder.

    Raises:
        GatewayError: it cannot be read or written.
    """
    try:
        replace_text(folder / FILE, source.read_text(encoding="utf-8"), durable=True)
    except OSError as error:
        raise GatewayError(f"{folder / FILE}: {error.strerror or error}; make the folder writable") from error


def _check(policy: Policy, problems: Problems) -> None:
    numbers = {
        "send.bytes_per_day": policy.send.bytes_per_day,
        "require.privacy.target_epsilon": policy.require.privacy.target_epsilon,
        "require.min_clients": policy.require.min_clients,
        "accept.max_model_step": policy.accept.max_model_step,
    }
    for key, value in numbers.items():
        if value is not None:
            with problems.kept():
                positive(value, key)
    if policy.send.rate_mbps is not None and policy.send.rate_mbps < SLOWEST_MBPS:
        got = f"got {policy.send.rate_mbps:g}"
        problems.add(ConfigError("send.rate_mbps", got, f"give at least {SLOWEST_MBPS}: slower transfers look dead"))
    hours, after = policy.send.hours, policy.stop.after
    if hours is not None and (not _HOURS.fullmatch(hours) or len(set(_minutes(hours))) == 1):
        problems.add(ConfigError("send.hours", f"got {hours!r}", "give HH:MM-HH:MM, such as 20:00-06:00"))
    if after is not None and not _is_day(after):
        problems.add(ConfigError("stop.after", f"got {after!r}", "give a day, such as 2027-01-31"))


def _minutes(hours: str) -> tuple[int, int]:
    """First and last minute of the day."""
    match = _HOURS.fullmatch(hours)
    assert match is not None, "checked when the policy was read"
    return 60 * int(match[1]) + int(match[2]), 60 * int(match[3]) + int(match[4])


def _is_day(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False
