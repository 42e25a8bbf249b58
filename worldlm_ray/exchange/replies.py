"""What a parent answers: a welcome to a child that joins, a verdict about an update. Both are checked on arrival."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from worldlm_ray.errors import MessageError
from worldlm_ray.exchange.limits import MOST_SKIPPED, checked

ACCEPTED = "accepted"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a node decided about an update, and why."""

    reason: str
    """`accepted`, or: malformed, header_too_large, wrong_schema, wrong_layout, wrong_shape,
    wrong_origin, unknown_sender, superseded, restarted, duplicate, implausible_seq, too_many_tokens, out_of_turn,
    too_soon, future_version, stale, not_finite, norm_exceeded, privacy_exhausted."""
    seq: int
    base_version: int
    version: int
    tau: int
    detail: str = ""
    durable_seq: int = 0
    """Highest seq of this sender that checkpoints cover: what it need not keep any more."""

    @property
    def accepted(self) -> bool:
        """Whether the update was folded in (or is held for its turn)."""
        return self.reason == ACCEPTED


@dataclass(frozen=True)
class Welcome:
    """What a parent says to a child that joins."""

    incarnation: int
    """The parent's: how often it has been started."""
    last_seq: int
    """Highest seq that it has accepted from this child."""
    durable_seq: int
    """Highest seq that its checkpoints cover."""


def believed(welcome: Welcome, *, seq: int) -> tuple[Welcome, str]:
    """What a child believes of its parent's welcome: no number by which it would skip rounds or drop updates unbounded.

    Args:
        welcome: the parent's.
        seq: of the last update that the child knows it has made.

    Returns:
        The welcome with what cannot be replaced by what the child knows, and what was wrong; empty if nothing was.

    Raises:
        MessageError: malformed: it does not even say which life of the parent it comes from.
    """
    if not isinstance(welcome, Welcome):
        raise MessageError("malformed", f"the welcome is of type {type(welcome).__name__}")
    if not checked("welcome.incarnation", welcome.incarnation, int):
        raise MessageError("malformed", "welcome.incarnation is 0, expected at least 1")
    try:
        last = checked("last_seq", welcome.last_seq, int, most=seq + MOST_SKIPPED)
        checked("durable_seq", welcome.durable_seq, int, most=last)
    except MessageError as error:
        return Welcome(incarnation=welcome.incarnation, last_seq=seq, durable_seq=0), error.detail
    return welcome, ""


def checked_verdict(verdict: Any) -> Verdict:
    """A parent's word about an update, of which every field that a child uses is what it should be.

    Raises:
        MessageError: malformed.
    """
    if not isinstance(verdict, Verdict):
        raise MessageError("malformed", f"the verdict is of type {type(verdict).__name__}")
    if not isinstance(verdict.reason, str) or not isinstance(verdict.detail, str):
        raise MessageError("malformed", "the reason or the detail of the verdict is no text")
    checked("verdict.seq", verdict.seq, int)
    checked("verdict.durable_seq", verdict.durable_seq, int)
    return verdict
