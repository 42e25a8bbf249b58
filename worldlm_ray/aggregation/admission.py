"""What a node accepts from its children. Decides, changes nothing."""

from __future__ import annotations

import math

from worldlm_ray.aggregation.events import ACCEPTED, Verdict
from worldlm_ray.config import AggregationConfig
from worldlm_ray.errors import MessageError
from worldlm_ray.messages import Packed, Update, read_header
from worldlm_ray.params import rough_norm

LARGEST_NORM = 1e15
"""Of an update: its square, and sums of it over tokens and children, stay far inside fp32."""


def judge(
    update: Update,
    *,
    rules: AggregationConfig,
    last_seq: int | None,
    version: int,
    incarnation: int = 1,
    waiting: str | None = None,
    exhausted: bool = False,
) -> Verdict:
    """Decide about a well-formed update.

    Args:
        update: the update.
        rules: max_staleness and max_update_norm.
        last_seq: highest seq accepted from this sender; None if it is not a child.
        version: the node's version now.
        incarnation: the node's.
        waiting: name of the refusal if the sender's last update is not in a version yet, and none may join it there.
        exhausted: whether the sender's privacy budget holds no further update.
    """
    tau = version - update.base_version
    if update.base_incarnation < incarnation:
        # Versions that this node had published before it died and went back: they were never older than this one.
        tau = max(tau, 0)
    reason, detail = _standing(update, rules, last_seq, tau, waiting, exhausted)
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


def _standing(
    update: Update, rules: AggregationConfig, last_seq: int | None, tau: int, waiting: str | None, exhausted: bool
) -> tuple[str, str]:
    """Who sent it, whether it was seen before, and how old it is."""
    if last_seq is None:
        return "unknown_sender", f"there is no child {update.sender!r}"
    if update.seq <= last_seq:
        return "duplicate", f"seq {update.seq} after {last_seq}"
    if waiting is not None:
        return waiting, "an aggregation takes one update of each child"
    if exhausted:
        return "privacy_exhausted", f"the privacy budget of {update.sender} holds no further update"
    if tau < 0:
        return "future_version", f"from version {update.base_version}, this node is at {update.base_version + tau}"
    if rules.max_staleness is not None and tau > rules.max_staleness:
        return "stale", f"tau {tau} is above max_staleness {rules.max_staleness}: pull again"
    if update.tokens == 0:
        return "malformed", "tokens is 0, expected the tokens that the update was trained on"
    return ACCEPTED, ""


def _values(update: Update, rules: AggregationConfig) -> tuple[str, str]:
    """Finite, and not larger than allowed. One pass over the buffer."""
    norm = rough_norm(update.values)
    if not math.isfinite(norm):
        return "not_finite", "nan or infinity in the values"
    if norm > LARGEST_NORM:
        return "not_finite", f"norm {norm:.4g} is too large to be summed in fp32"
    if rules.max_update_norm is not None and norm > rules.max_update_norm:
        return "norm_exceeded", f"norm {norm:.4g} is above max_update_norm {rules.max_update_norm:g}"
    return ACCEPTED, ""


def refuse_malformed(packed: Packed, error: MessageError, *, version: int) -> Verdict:
    """The verdict about a message that could not be read, with whatever its header still says."""
    try:
        fields = read_header(packed.header)
    except MessageError:
        fields = {}
    seq, base = fields.get("seq"), fields.get("base_version")
    return Verdict(
        reason=error.reason,
        seq=seq if isinstance(seq, int) else 0,
        base_version=base if isinstance(base, int) else 0,
        version=version,
        tau=0,
        detail=error.detail,
    )
