"""What an inner node knows of its children: who is there, what they have sent, and what they may claim."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from worldlm_ray.aggregation.admission import check_incarnation
from worldlm_ray.aggregation.events import Covered, Joined
from worldlm_ray.aggregation.node_setup import NodePlace
from worldlm_ray.config.schema import LivenessConfig
from worldlm_ray.errors import MessageError
from worldlm_ray.exchange.messages import Update
from worldlm_ray.exchange.quota import Quota, Quotas
from worldlm_ray.exchange.replies import Welcome
from worldlm_ray.records import LifeRecord

GAPS = 16
"""Messages by which a child's rhythm is known."""


class Status(Enum):
    """Whether a node waits for a child. It does so for an active one alone."""

    EXPECTED = "expected"
    """It is optional, and has never joined."""
    ACTIVE = "active"
    SUSPECTED = "suspected"
    """Silent for longer than its own rhythm explains, until it speaks again."""
    DONE = "done"
    """It will train no more."""
    LEFT = "left"


@dataclass
class Child:
    """What a node remembers of one child."""

    status: Status = Status.ACTIVE
    """Changed by `Children.set_status` alone, which counts."""
    left_durable: bool = False
    """Whether a checkpoint knows that it has left: it may end."""
    incarnation: int = 0
    """The newest that has joined."""
    admission: int = 1
    """How often a border has let it in, as of that join."""
    last_seq: int = 0
    durable_seq: int = 0
    """Up to here checkpoints cover what was accepted."""
    judged_seq: int = 0
    """Highest seq of its updates that were accepted, or refused for what they held ..."""
    judged_tokens: int = 0
    """... and the tokens of all of these."""
    started_tokens: int = 0
    """Tokens of all local rounds begun below it, as far as its quota lets the node believe them."""
    doubted: bool = False
    """Whether a warning has said that it claims to have begun more than it can have."""
    heard_s: float | None = None
    """When it spoke last."""
    gaps: list[float] = field(default_factory=list)
    """Seconds between its last messages, heartbeats among them."""
    scores: list[float] = field(default_factory=list)
    """Scores of its key layers in its newest update, by the temperature."""

    @property
    def is_active(self) -> bool:
        """Whether the node waits for it."""
        return self.status is Status.ACTIVE

    @property
    def has_left(self) -> bool:
        """Whether it belongs to the node no more."""
        return self.status is Status.LEFT


_NOT_SAVED = ("durable_seq", "heard_s", "gaps", "left_durable")
"""All that is read back is durable, and the time in which no process listened is no silence."""


class Children(Mapping[str, Child]):
    """The children of one node by name, in the order of the tree; newcomers are last.

    Args:
        place: the node's place.
        liveness: when a silent child is given up; None for never.
        quotas: what the children may claim; no limits without.
    """

    def __init__(self, place: NodePlace, *, liveness: LivenessConfig | None, quotas: Quotas | None) -> None:
        self.path, self.liveness = place.path, liveness
        self.quotas: dict[str, Quota] = {} if quotas is None else dict(quotas.children)
        """By child; that of one that the plan does not know comes when it joins."""
        expected = {True: Status.EXPECTED, False: Status.ACTIVE}
        self._children = {name: Child(status=expected[name in place.optional]) for name in place.children}
        self._recount()

    def __getitem__(self, name: str) -> Child:
        return self._children[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._children)

    def __len__(self) -> int:
        return len(self._children)

    # ---- who is there ----------------------------------------------------------------------------------------

    def _recount(self) -> None:
        """Count them; `set_status` keeps the counts true. A node may have very many children."""
        self._number = Counter(child.status for child in self._children.values())

    def set_status(self, name: str, status: Status) -> None:
        """Change whether the node waits for a child."""
        child = self._children[name]
        self._number[child.status] -= 1
        self._number[status] += 1
        child.status = status

    @property
    def any_active(self) -> bool:
        """Whether the node waits for any child."""
        return self._number[Status.ACTIVE] > 0

    @property
    def any_expected(self) -> bool:
        """Whether any child has never been there, and may still come."""
        return self._number[Status.EXPECTED] > 0

    @property
    def have_never_joined(self) -> bool:
        """Whether all children are optional and no child has been there."""
        return self._number[Status.EXPECTED] == len(self)

    @property
    def joined(self) -> int:
        """Children that have joined this life of the node, or one of its lives before."""
        return sum(child.incarnation > 0 for child in self._children.values())

    def check(self, name: str, incarnation: int, *, to: int, here: int) -> None:
        """Check that this life of a child may speak, and knows which life of the node it speaks to.

        Raises:
            MessageError: superseded or restarted.
        """
        _check_newest(name, incarnation, known=0 if name not in self else self[name].incarnation)
        if to != here:
            raise MessageError("restarted", f"{self.path} is at incarnation {here} by now: join again")

    def check_join(self, event: Joined) -> None:
        """Check that this life of a child may join: it is neither an old one, nor so new that no later one could.

        Raises:
            MessageError: superseded or implausible_incarnation.
        """
        child = self.get(event.child)
        known = 0 if child is None or event.admission > child.admission else child.incarnation
        _check_newest(event.child, event.incarnation, known=known)
        check_incarnation(event.child, event.incarnation, known=known)

    def hear(self, name: str, now_s: float) -> LifeRecord | None:
        """Note that a child has spoken; returns what tracking is told of one that had been given up."""
        child = self.get(name)
        if child is None:
            return None
        if child.heard_s is not None:
            child.gaps = [*child.gaps[1 - GAPS :], now_s - child.heard_s]
        child.heard_s = now_s
        if child.status is not Status.SUSPECTED:
            return None
        self.set_status(name, Status.ACTIVE)
        return LifeRecord(node=f"{self.path}/{name}", now_s=now_s, event="training", detail="is back")

    def look_for_silence(self, now_s: float) -> list[LifeRecord]:
        """Give up children that are silent for longer than their own rhythm explains."""
        records: list[LifeRecord] = []
        for name, child in self._children.items():
            if self.liveness is None or not child.is_active or not child.incarnation:
                continue
            if child.heard_s is None:  # not since this node was started again: its time to come back begins now
                child.heard_s = now_s
            silent_s = now_s - child.heard_s
            if silent_s > patience_s(child.gaps, self.liveness):
                self.set_status(name, Status.SUSPECTED)
                said = f"silent for {silent_s:.0f} s: no node waits for it"
                records.append(LifeRecord(node=f"{self.path}/{name}", now_s=now_s, event="lost", detail=said))
        return records

    def join(self, event: Joined) -> Child:
        """A child is there: a new one, or one that has been there before."""
        name = event.child
        if event.quota is not None:
            self.quotas[name] = event.quota
        if name not in self._children:
            self._children[name] = Child()
            self._number[Status.ACTIVE] += 1
        child = self._children[name]
        self.set_status(name, Status.ACTIVE)
        child.left_durable, child.incarnation = False, event.incarnation
        child.admission = max(child.admission, event.admission)
        return child

    def welcome(self, name: str, *, here: int) -> Welcome:
        """What a child that has joined must know; `here` is the node's incarnation."""
        child = self._children[name]
        return Welcome(incarnation=here, last_seq=child.last_seq, durable_seq=child.durable_seq)

    # ---- what they claim -------------------------------------------------------------------------------------

    @property
    def started_tokens(self) -> int:
        """Tokens of all local rounds begun below the node."""
        return sum(child.started_tokens for child in self._children.values())

    def quota(self, name: str) -> Quota | None:
        """What a child may claim. One that the plan does not know has the largest quota of its siblings."""
        if not self.quotas:
            return None
        return self.quotas.get(name) or max(self.quotas.values(), key=lambda quota: quota.update_tokens)

    def settle(self, update: Update) -> None:
        """Count the tokens of an update as spent, whatever became of it; of one that comes twice, once."""
        child = self._children[update.sender]
        if update.seq > child.judged_seq:
            child.judged_seq, child.judged_tokens = update.seq, child.judged_tokens + update.tokens

    def count_started(self, name: str, claimed: int, now_s: float) -> LifeRecord | None:
        """Believe what a child says of the rounds begun below it, as far as its quota goes; returns a first doubt."""
        child, quota = self._children[name], self.quota(name)
        if quota is None:
            child.started_tokens = max(child.started_tokens, claimed)
            return None
        settled = child.judged_tokens
        counted = quota.counted(claimed, settled=settled)
        child.started_tokens = max(child.started_tokens, counted)
        if child.doubted or quota.is_plausible(claimed, settled=settled):
            return None
        child.doubted = True
        said = f"says that {claimed} tokens are begun, and updates of {settled} have come: {counted} are counted"
        return LifeRecord(node=f"{self.path}/{name}", now_s=now_s, event="warning", detail=said)

    # ---- who is in an aggregation --------------------------------------------------------------------------------

    def absent(self, contributors: Sequence[str], *, scored: bool) -> list[list[float]]:
        """The newest scores of each child that belongs to the node and is not in an aggregation.

        Args:
            contributors: senders of the aggregation's updates.
            scored: whether there are key layers to be scored. Without, only their number counts.
        """
        heard = set(contributors)
        if scored:
            return [c.scores for name, c in self._children.items() if not c.has_left and name not in heard]
        here = sum(name in self._children and not self._children[name].has_left for name in heard)
        return [[]] * (len(self) - self._number[Status.LEFT] - here)

    # ---- durability ------------------------------------------------------------------------------------------

    def covers(self, seq: int) -> Covered:
        """What a checkpoint of the children as they are now would know; `seq` is that of the node itself."""
        return Covered(
            seqs={name: child.last_seq for name, child in self._children.items()},
            left={name for name, child in self._children.items() if child.has_left},
            seq=seq,
        )

    def saved(self, covered: Covered) -> None:
        """A checkpoint is on disk: children need not keep what it covers, and those that left may end."""
        for name, seq in covered.seqs.items():
            self._children[name].durable_seq = max(self._children[name].durable_seq, seq)
        for name in covered.left:
            self._children[name].left_durable = self._children[name].has_left

    def state(self) -> dict[str, Any]:
        """What a restart needs, by child."""
        found: dict[str, Any] = {}
        for name, child in self._children.items():
            found[name] = {key: value for key, value in vars(child).items() if key not in _NOT_SAVED}
            found[name]["status"] = child.status.value
        return found

    def restore(self, saved: Mapping[str, dict[str, Any]], *, known_only: bool) -> None:
        """Become what `state` described; with `known_only`, leave out children that the plan does not know."""
        for name, entry in saved.items():
            if known_only and name not in self._children:
                continue
            child = Child(**(entry | {"status": Status(entry["status"]), "durable_seq": entry["last_seq"]}))
            child.left_durable = child.has_left
            self._children[name] = child
        self._recount()


def _check_newest(name: str, incarnation: int, *, known: int) -> None:
    if incarnation < known:
        raise MessageError(
            "superseded", f"this is incarnation {incarnation}, and there is incarnation {known} of {name}"
        )


def patience_s(gaps: Sequence[float], rules: LivenessConfig) -> float:
    """How long a child may be silent: the median of its last gaps and k times their spread, and never too short.

    The spread is the median absolute deviation, which one long gap does not move.
    """
    if len(gaps) < GAPS // 4:
        return rules.grace_s
    middle = statistics.median(gaps)
    spread = statistics.median(abs(gap - middle) for gap in gaps)
    return max(middle + rules.k * spread, rules.grace_s)
