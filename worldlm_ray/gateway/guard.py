"""A member's policy at work: what keeps the link shut, and what is looked at before anything crosses it.

A guard decides and remembers, and sends nothing. `worldlm_ray/gateway/guarded.py` asks it before each request.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np

from worldlm_ray.errors import GatewayError, MessageError, Refused, detail_of
from worldlm_ray.exchange.limits import checked_norm
from worldlm_ray.exchange.messages import read_header
from worldlm_ray.gateway import policy as policies
from worldlm_ray.gateway.charter import Signed, checked
from worldlm_ray.gateway.policy import Policy
from worldlm_ray.gateway.profile import Profile
from worldlm_ray.gateway.sent import Sent
from worldlm_ray.gateway.standing import Standing, State, digest_of
from worldlm_ray.gateway.terms import check_run
from worldlm_ray.plan.plan import Plan
from worldlm_ray.tensors.buffers import Flat, squared_norm


class Guard:
    """What one member lets through.

    Args:
        profile: the member's.
        plan: the member's run.
        mine: its settings that must be alike, by `terms.alike`.
    """

    def __init__(self, profile: Profile, plan: Plan, mine: Mapping[str, str]) -> None:
        self._profile, self._plan, self._mine = profile, plan, mine
        self.sent = Sent(profile.folder)
        self._standing, self._known = Standing(profile.folder), profile.charters
        self._stamp: tuple[int, ...] = (-1,)
        self._policy, self._problem = Policy(), ""
        self._full_day, self._waiting = "", (0, "")
        """The day on which no further update fits; epoch of a charter that waits for the operator, and what to say."""

    @property
    def policy(self) -> Policy:
        """As the file says now; after a bad edit the one before, and `shut` says so."""
        self._look()
        return self._policy

    @property
    def is_leaving(self) -> bool:
        """Whether the member is to leave, or has left; a damaged file shuts the link, and says neither."""
        try:
            return self._standing.state in (State.LEAVING, State.LEFT)
        except GatewayError:
            return False

    def begin(self) -> None:
        """Refuse a run that may send nothing whatever the world says.

        Raises:
            GatewayError: the policy is damaged or is not met, or the member has left.
        """
        self._look()
        if self._problem or self._standing.state is State.LEFT:
            raise GatewayError(self._shut())

    def shut(self) -> str:
        """Why nothing may cross the link now, with the cure; empty if the link is open."""
        try:
            return self._shut()
        except GatewayError as error:
            return str(error)

    def has_left(self) -> None:
        """The world knows that the member has left."""
        self._standing.become(State.LEFT)

    def leave_if_over(self) -> bool:
        """Begin to leave once `stop.after` is over; returns whether that is now."""
        if not self.policy.is_over(self.now_s()) or self.is_leaving:
            return False
        self._standing.become(State.LEAVING)
        return True

    # ---- what comes --------------------------------------------------------------------------------------------

    def meet(self, raw: bytes) -> None:
        """Look at the charter that the world has shown.

        Args:
            raw: as it came.

        Raises:
            Refused: lower_epoch, policy, wrong_settings; charter_waits: an operator must accept it; or as
                `charter.checked` refuses.
            GatewayError: the profile is damaged.
        """
        signed = judged(self._profile, raw, self.policy)
        check_run(self._plan, signed.charter, self._mine)
        self.policy.check_run(self._plan)
        self._accept(signed)

    def model_problem(self, values: Flat, before: Flat | None) -> str:
        """Why a model that has come may not be handed on; empty if it may.

        Args:
            values: the model, fp32 [size].
            before: the model before, of the same size; None for none.
        """
        try:
            checked_norm(values, "the model")
        except MessageError as error:
            return error.detail
        most = self.policy.accept.max_model_step
        if most is None or before is None:
            return ""
        whole = max(math.sqrt(squared_norm(before)), float(np.finfo(np.float32).tiny))
        step = math.sqrt(squared_norm(values, before)) / whole
        cure = "ask the world's operator, or raise it"
        return "" if step <= most else f"its step of {step:.4g} is above accept.max_model_step {most:g}; {cure}"

    # ---- what goes ---------------------------------------------------------------------------------------------

    def update(self, header: bytes, nbytes: int) -> bytes:
        """The header of an update as it may be sent; the log knows of it then.

        Args:
            header: as the member's federation or client has packed it.
            nbytes: of the update's values.

        Raises:
            Refused: policy, or why the link is shut: nothing may be sent.
            GatewayError: the log cannot be written.
        """
        fields = read_header(header, most_bytes=len(header))
        try:
            allowed = self._allowed(fields, nbytes)
        except GatewayError as error:
            self.sent.waits(fields, nbytes, detail_of(error))
            raise
        self.sent.waits(fields, nbytes, "")
        changed = [name for name, value in fields.items() if allowed[name] is not value]
        packed: bytes = msgpack.packb(allowed) if changed else header
        sizes = {name: len(msgpack.packb(value)) for name, value in allowed.items()}
        facts = {"seq": fields.get("seq"), "codec": fields.get("codec", "fp32"), "fields": sizes, "changed": changed}
        self.sent.add(self.now_s(), "push", nbytes=nbytes, **facts)
        return packed

    def _allowed(self, fields: dict[str, Any], nbytes: int) -> dict[str, Any]:
        if reason := self.shut():
            raise Refused("shut", reason)
        policy, now_s = self.policy, self.now_s()
        codec = fields.get("codec", "fp32")
        if policy.send.codecs and codec not in policy.send.codecs:
            raise Refused("policy", f"the update is {codec}, which is not in send.codecs; {_edit(self._profile)}")
        most = policy.send.bytes_per_day
        if most is not None and self.sent.today_bytes(now_s) + nbytes > most:
            self._full_day = policies.day_of(now_s)
            raise Refused("policy", self._shut())
        return policy.allowed(fields)

    # ---- why it is shut ------------------------------------------------------------------------------------------

    def _shut(self) -> str:
        self._look()
        if reason := self._problem or closed(self._profile, self._policy):
            return reason
        if self._waiting[0] and self._waiting[0] > self._standing.accepted[0]:
            return self._waiting[1]
        if self._full_day == policies.day_of(self.now_s()):
            most, today = self._policy.send.bytes_per_day or math.inf, self.sent.today_bytes(self.now_s())
            text = f"{today:,} bytes have gone today, and send.bytes_per_day is {most:,.0f}"
            return f"{text}; {_edit(self._profile)}"
        return ""

    def _accept(self, signed: Signed) -> None:
        """Accept a charter, or have it wait for the operator.

        Raises:
            Refused: charter_waits.
        """
        accepted = self._standing.accepted
        if reason := waits(self._profile, signed, self._policy, accepted):
            self._waiting = (signed.charter.epoch, reason)
            raise Refused("charter_waits", reason)
        if accepted != (signed.charter.epoch, digest_of(signed)):
            self._standing.accept(signed)

    def _look(self) -> None:
        """Read the policy again if its file has changed."""
        path = self._profile.folder / policies.FILE
        try:
            stat = path.stat()
            stamp: tuple[int, ...] = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
        except FileNotFoundError:
            stamp = ()
        except OSError as error:
            self._problem, self._stamp = f"{path}: {error.strerror or error}; make it readable", (-1,)
            return
        if stamp == self._stamp:
            return
        self._stamp, self._full_day = stamp, ""
        try:
            self._policy, self._problem = policies.of_profile(self._profile.folder), ""
            self._policy.check_run(self._plan)
        except GatewayError as error:
            self._problem = detail_of(error)

    def now_s(self) -> float:
        """The time of day, Unix seconds."""
        return self._profile.clock()


def judged(profile: Profile, raw: bytes, policy: Policy) -> Signed:
    """A charter as it came, once it is found to be the world's, and allowed by the policy; the profile keeps it.

    Args:
        profile: the member's: it remembers the highest epoch.
        raw: as it came.
        policy: the member's.

    Raises:
        Refused: lower_epoch, policy, or as `charter.checked` refuses.
        GatewayError: the profile is damaged or cannot be written.
    """
    signed = kept(profile, raw)
    policy.judge(signed.charter)
    return signed


def kept(profile: Profile, raw: bytes) -> Signed:
    """A charter as it came, once it is found to be the world's; the profile keeps it. The arguments are `judged`'s.

    Raises:
        Refused: lower_epoch, or as `charter.checked` refuses.
        GatewayError: the profile is damaged or cannot be written.
    """
    signed = checked(raw, profile.root, where=profile.url, least_generation=profile.generation)
    epoch, known = signed.charter.epoch, profile.charters.newest()
    if known is not None and epoch < known.charter.epoch:
        cure = f"the world's operator runs `worldlm gateway charter set --epoch {known.charter.epoch + 1}`"
        raise Refused("lower_epoch", f"the world shows charter {epoch}, and {known.charter.epoch} is known; {cure}")
    if known is not None and epoch == known.charter.epoch and known.body != signed.body:
        cure = f"the world's operator runs `worldlm gateway charter set --epoch {epoch + 1}`"
        raise Refused("lower_epoch", f"the world shows another charter {epoch} than the one that is known; {cure}")
    if known is None or epoch > known.charter.epoch:
        profile.charters.keep(signed)
    return signed


def waits(profile: Profile, signed: Signed, policy: Policy, accepted: tuple[int, str]) -> str:
    """Why a charter waits for the operator, with the cure; empty where it need not.

    Args:
        profile: the member's.
        signed: the charter.
        policy: the member's.
        accepted: epoch and digest of the charter that is accepted, by `Standing.accepted`.
    """
    folder, epoch = profile.folder, signed.charter.epoch
    if policy.accept.charter == "any" or not accepted[0] or accepted == (epoch, digest_of(signed)):
        return ""
    see = f"look at `worldlm gateway charter diff {folder}`"
    cure = f"{see}, and run `worldlm gateway resume {folder} --accept-charter`"
    return f"charter {epoch} waits to be accepted; {cure}"


def closed(profile: Profile, policy: Policy) -> str:
    """Why the operator or the clock keeps a link shut, with the cure; empty where neither does.

    Args:
        profile: the member's.
        policy: the member's.

    Raises:
        GatewayError: the profile is damaged.
    """
    state, folder = Standing(profile.folder).state, profile.folder
    if state is State.PAUSED:
        return f"paused by the operator; run `worldlm gateway resume {folder}`"
    if state is State.LEFT:
        return f"this member has left; run `worldlm gateway resume {folder}` if it should go on"
    if not policy.is_open(profile.clock()):
        return f"it is outside of send.hours {policy.send.hours}; {_edit(profile)}"
    return ""


def _edit(profile: Profile) -> str:
    return f"wait, or edit {profile.folder / policies.FILE}"
