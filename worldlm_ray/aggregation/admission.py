"""What a node accepts from its children. Decides, changes nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass

from worldlm_ray.aggregation.events import Event, Joined
from worldlm_ray.aggregation.sums import GRID
from worldlm_ray.config.federated import AggregationConfig
from worldlm_ray.errors import MessageError
from worldlm_ray.exchange.limits import LARGEST_COUNT, MOST_RESTARTS, MOST_SKIPPED, checked, checked_norm
from worldlm_ray.exchange.messages import Packed, Update, read_header
from worldlm_ray.exchange.quota import Quota
from worldlm_ray.exchange.replies import ACCEPTED, Verdict

TRAINED = ("stale", "not_finite", "norm_exceeded", "too_soon", "privacy_exhausted")
"""Refusals of an update that was trained and will not come again: its tokens are spent."""
LARGEST_SUM = 2.0**62
"""In multiples of the grid: what an update may add to an exact sum of 64 bits."""
_PLAIN = {"child": str, "sender": str, "incarnation": int, "to": int, "seq": int, "started_tokens": int}
"""Fields of an event that a child gives."""


@dataclass(frozen=True, kw_only=True)
class Sender:
    """What a node knows of the child that sent an update."""

    last_seq: int | None = 0
    """Highest seq accepted from it; None if it is not a child."""
    seen_seq: int = 0
    """Highest seq judged, refusals included."""
    waiting: str | None = None
    """Name of the refusal if its last update is not in a version yet, and none may join it there."""
    exhausted: bool = False
    """Whether its privacy budget holds no further update."""
    quota: Quota | None = None
    """What it may claim; None where it is not known."""


def check_plain(event: Event) -> None:
    """Check the type and the size of what a call brings beside a message, before the event changes anything.

    Raises:
        MessageError: malformed.
    """
    for name, value in vars(event).items():
        if name in _PLAIN:
            jumps = name == "incarnation" and isinstance(event, Joined)  # has its own limit and name
            checked(name, value, _PLAIN[name], most=math.inf if jumps else LARGEST_COUNT)


def check_incarnation(child: str, incarnation: int, *, known: int) -> None:
    """Refuse a join by which every later life of the child would be superseded.

    Raises:
        MessageError: implausible_incarnation.
    """
    if incarnation > known + MOST_RESTARTS:
        got = f"{child} joins as incarnation {incarnation}, and {known} is known: at most {MOST_RESTARTS} more"
        raise MessageError("implausible_incarnation", got)


def judge(update: Update, *, rules: AggregationConfig, sender: Sender, version: int, incarnation: int = 1) -> Verdict:
    """Decide about a well-formed update.

    Args:
        update: the update.
        rules: max_staleness and max_update_norm.
        sender: what the node knows of the child.
        version: the node's version now.
        incarnation: the node's.
    """
    tau = version - update.base_version
    if update.base_incarnation < incarnation:
        # Versions that this node had published before it died and went back: they were never older than this one.
        tau = max(tau, 0)
    reason, detail = _standing(update, rules, sender, tau)
    if reason == ACCEPTED and update.base_incarnation > incarnation:
        reason, detail = "future_version", f"from incarnation {update.base_incarnation} of this node"
    if reason == ACCEPTED:
        reason, detail = _values(update, rules)
    return Verdict(
        reason=reason,
        seq=update.seq,
        base_version=update.base_version,
        version=version,
        tau=max(tau, 0),
        detail=detail,
    )


def _standing(update: Update, rules: AggregationConfig, sender: Sender, tau: int) -> tuple[str, str]:
    """Who sent it, whether it was seen before, what it claims, and how old it is."""
    if sender.last_seq is None:
        return "unknown_sender", f"there is no child {update.sender!r}"
    if update.seq <= sender.last_seq:
        return "duplicate", f"seq {update.seq} after {sender.last_seq}"
    if update.seq > max(sender.last_seq, sender.seen_seq) + MOST_SKIPPED:
        # Every later update of the child would be a duplicate of one that was never made.
        return "implausible_seq", f"seq {update.seq} after {sender.last_seq}: at most {MOST_SKIPPED} are skipped"
    claimed = max(update.tokens, update.weight)  # the weight in a sum is the tokens of a round, too
    if sender.quota is not None and claimed > sender.quota.update_tokens:
        got = f"got {claimed} tokens, expected at most {sender.quota.update_tokens}"
        return "too_many_tokens", f"{got} of {update.sender} in one update"
    if sender.waiting is not None:
        return sender.waiting, "an aggregation takes one update of each child"
    if sender.exhausted:
        return "privacy_exhausted", f"the privacy budget of {update.sender} holds no further update"
    if tau < 0:
        return "future_version", f"from version {update.base_version}, this node is at {update.base_version + tau}"
    if rules.max_staleness is not None and tau > rules.max_staleness:
        return "stale", f"tau {tau} is above max_staleness {rules.max_staleness}: pull again"
    if update.tokens == 0 and update.weight == 0:  # a child that leaves a sum has trained nothing for that
        return "malformed", "tokens is 0, expected the tokens that the update was trained on"
    return ACCEPTED, ""


def _values(update: Update, rules: AggregationConfig) -> tuple[str, str]:
    """Finite, and not larger than allowed. One pass over the buffer."""
    try:
        norm = checked_norm(update.values)
    except MessageError as error:
        return error.reason, error.detail
    if norm * update.weight > LARGEST_SUM * GRID:
        return "norm_exceeded", f"norm {norm:.4g} times weight {update.weight} is more than a sum holds"
    if rules.max_update_norm is not None and norm > rules.max_update_norm:
        return "norm_exceeded", f"norm {norm:.4g} is above max_update_norm {rules.max_update_norm:g}"
    return ACCEPTED, ""


def refuse_malformed(packed: Packed, error: MessageError, *, version: int, most_bytes: int) -> Verdict:
    """The verdict about a message that could not be read, with whatever its header still says."""
    try:
        fields = read_header(packed.header, most_bytes=most_bytes)
    except MessageError:
        fields = {}

    def said(name: str) -> int:
        try:
            return int(checked(name, fields.get(name), int))
        except MessageError:
            return 0

    return Verdict(
        reason=error.reason,
        seq=said("seq"),
        base_version=said("base_version"),
        version=version,
        tau=0,
        detail=error.detail,
    )
