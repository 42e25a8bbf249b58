"""The state machine of an inner node: one for the world and for every federation, at any depth.

`Node.handle(event)` returns commands for a backend. A node has no clock, does no input or output and knows nothing
of Ray. Time comes in with the events. The world is a node without a parent. See worldlm_ray/aggregation/events.py.

Two things stand in memory besides the optimizer's state: the published model, which never changes in place (so
children, a push in flight and a checkpoint can share it), and one buffer into which updates are folded as they
arrive and which then *becomes* the next published model. A refused update touches neither.

In asynchronous triggers an update is folded at once. In synchronous mode updates are folded in the order of the
children, each as soon as those before it are in, so that the result does not depend on who was faster.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import numpy as np

from worldlm_ray.aggregation.admission import (
    TRAINED,
    Sender,
    check_incarnation,
    check_plain,
    check_residuals,
    judge,
    refuse_malformed,
)
from worldlm_ray.aggregation.events import (
    Answer,
    Charge,
    ChildMessage,
    Clock,
    Command,
    Done,
    Event,
    Exchange,
    Finish,
    Heartbeat,
    Joined,
    Left,
    Note,
    ParentModel,
    Pull,
    Push,
    Refresh,
    Save,
    Serve,
    Wake,
)
from worldlm_ray.aggregation.merge import Merger, Moved
from worldlm_ray.aggregation.private_fold import ClientPrivacy, PrivateFold
from worldlm_ray.aggregation.residuals import NO_RESIDUALS, Pool
from worldlm_ray.aggregation.rules import AggregationRule, rule_of
from worldlm_ray.aggregation.server_optimizer import ServerOptimizer
from worldlm_ray.config.federated import AggregationConfig, MergeConfig, Trigger
from worldlm_ray.config.schema import BudgetConfig, LivenessConfig
from worldlm_ray.config.values import unknown_name
from worldlm_ray.errors import AggregationError, CheckpointError, MessageError, PrivacyError
from worldlm_ray.exchange.compression import encode_update, memory
from worldlm_ray.exchange.limits import header_bytes
from worldlm_ray.exchange.messages import Model, Update, unpack_update
from worldlm_ray.exchange.outbox import Outbox, fields, limited, revived
from worldlm_ray.exchange.parent import Gate
from worldlm_ray.exchange.quota import Quota, Quotas
from worldlm_ray.exchange.replies import Verdict, Welcome
from worldlm_ray.records import AggregationRecord, AttentionRecord, LifeRecord, PrivacyRecord, VerdictRecord
from worldlm_ray.tensors.buffers import Flat, difference, frozen
from worldlm_ray.tensors.layout import Layout

GAPS = 16
"""Signs of life by which a child's rhythm is known."""


@dataclass
class Child:
    """What a node remembers of one child."""

    incarnation: int = 0
    """The newest that has joined."""
    last_seq: int = 0
    durable_seq: int = 0
    """Up to here checkpoints cover what was accepted."""
    started_tokens: int = 0
    """Tokens of all local rounds begun below it, as far as its quota lets the node believe them."""
    doubted: bool = False
    """Whether a warning has said that it claims to have begun more than it can have."""
    active: bool = True
    """False once the child is done or has left."""
    left: bool = False
    gone: bool = False
    """Whether a checkpoint knows that it has left: it may end."""
    awaited: bool = False
    """True of one that has never been there, and may still come: nobody waits for it."""
    lost: bool = False
    """Silent for longer than its own rhythm explains: nobody waits for it, until it speaks again."""
    heard_s: float | None = None
    """When it spoke last."""
    gaps: list[float] = field(default_factory=list)
    """Seconds between its last signs of life."""
    fit: list[float] = field(default_factory=list)
    """Scores of its key layers when it was last heard, by the temperature."""
    share: float = 0.0
    """How much of its work since its last pull has been aggregated here, in multiples of one update; of this ..."""
    pushed: float = 0.0
    """... what has been passed on to the parent, as much of it as came back."""


@dataclass(frozen=True)
class Covered:
    """What of a node a checkpoint knows."""

    seqs: Mapping[str, int]
    """Highest accepted seq of every child."""
    left: Collection[str] = ()
    """Children that have left."""
    seq: int = 0
    """The node's own: its newest update for its parent."""


class Node:
    """An inner node of the tree.

    Args:
        path: the node's path, such as `world/europe`.
        children: names of the children, in the order of the tree.
        aggregation: what to accept, when to aggregate and how.
        merge: how to move to the parent's model.
        has_parent: False for the world.
        layout: the model's layout.
        initial: the run's initial parameters [layout.size]; not copied, must not change.
        budget: the run's budget; used by the world alone.
        privacy: what the clients directly below are promised; None for nothing.
        contributions: how often each of them has contributed, by its ledger.
        save_every: a child should keep no more updates than this for the case that the node dies.
        awaited: children that nobody waits for until they join: clients of an elastic federation, or that come late,
            and federations that have none but such.
        min_clients: of these, so many must have joined before any of them is served.
        liveness: when a silent child is given up; None for never.
        codec: how updates travel to the parent.
        quotas: what the node and its children may claim; no limits without.
    """

    def __init__(
        self,
        *,
        path: str,
        children: tuple[str, ...],
        aggregation: AggregationConfig,
        merge: MergeConfig,
        has_parent: bool,
        layout: Layout,
        initial: Flat,
        budget: BudgetConfig,
        privacy: ClientPrivacy | None = None,
        contributions: Mapping[str, int] | None = None,
        save_every: int = 4,
        awaited: Collection[str] = (),
        min_clients: int = 0,
        liveness: LivenessConfig | None = None,
        codec: str = "fp32",
        quotas: Quotas | None = None,
    ) -> None:
        self.incarnation = 1
        """How often this node has been started: for the backend to set."""
        self.liveness = liveness
        self.save_every, self.min_clients = save_every, min_clients
        self.privacy = privacy
        self.quota = None if quotas is None else quotas.own
        self.quotas: dict[str, Quota] = {} if quotas is None else dict(quotas.children)
        """By child; a backend adds that of one that has come since the plan was made."""
        self.contributions = dict(contributions or {})
        """Updates of clients that their ledgers have paid for."""
        self.path, self.aggregation, self.layout = path, aggregation, layout
        self.budget, self.has_parent = budget, has_parent
        self.synchronous = aggregation.trigger == "synchronous"
        self.optimizer = ServerOptimizer(aggregation.server_optimizer, layout.backbone_size)
        self.merger = Merger(
            path=path,
            layout=layout,
            rules=aggregation,
            m=merge.federation if has_parent else 0.0,
            agreement=merge.agreement,
            initial=initial,
        )
        self.gate = Gate(path, layout, max_step=merge.max_model_step)
        """Which models of the parent it takes."""
        self.residuals = Pool(
            path=path,
            config=aggregation.residuals,
            attention=aggregation.attention,
            layers=layout.key_layers,
            origin=self.merger.origin,
        )
        self.theta = frozen(initial)
        """The published model. Never changed in place."""
        self.anchor = self.theta
        """The model as it was last pushed, moved with the parent since: where the backbone's next update begins."""
        self.parent_keys = self.merger.origin
        """What its key layers are measured from: the parent's, as this node last heard them. Where its model has been
        refused since, this node's own, as they were last pushed."""
        self.children = {name: Child(active=name not in awaited, awaited=name in awaited) for name in children}
        self._count_children()
        self.version = 0
        self.base_version = 0
        """The parent's version at the last merge."""
        self.base_incarnation = 1
        """The parent's incarnation then."""
        self.seq = 0
        self.tokens = 0
        """Tokens of all updates that were aggregated."""
        self.mean_tokens = 0.0
        self.unpushed_aggregations = 0
        self.unpushed_tokens = 0
        self.progress = 0.0
        self.finished = False
        """No new local round should begin."""
        self.ended = False
        self.now_s = 0.0
        """Run time of its newest event. It never goes back: neither a budget nor a silence has a negative length."""
        self.began_s: float | None = None
        """When the first child began: a budget of seconds counts from here."""
        self.codec, self.lost = codec, memory(codec, layout.backbone_size)
        """How updates travel to the parent, and what was lost of them by that so far."""
        self.in_flight: Update | None = None
        """The update of an exchange that has not come back yet."""
        self.is_sent = False
        """Whether it is on its way: the parent may have it."""
        self._covered_seq = 0
        """The newest of its updates that a checkpoint knows."""
        self.outbox = Outbox()
        """What the parent has not made durable yet."""
        self._exchange_asked = False
        self.wants_news = False
        """Whether its children wait until it has heard its parent: the first of them to be there has come."""
        self.accepted = 0
        self.refused: dict[str, int] = {}
        self.arrived: dict[str, tuple[int, int]] = {}
        """By child, of its updates that were accepted, or refused for what they held: highest seq, and all tokens."""
        self._fold: AggregationRule | None = None
        self._made: Flat | None = None
        """The buffer that the published model lies in, if an aggregation has made it."""
        self._spare: list[Flat] = []
        """Buffers for the next aggregations: the models that lay there lie in shared memory, or nobody saw them."""
        self._sent: Flat | None = None
        """The buffer in which the update in flight was made, as long as it lies there."""
        self._lent = True
        """Whether somebody may still read the buffer in which the model lies."""
        self._held: dict[str, tuple[Update, int]] = {}
        self._waiting: dict[str, int] = {}
        """Children that wait for the model: their started tokens."""

    # ---- events ----------------------------------------------------------------------------------------------

    def handle(self, event: Event) -> list[Command]:
        """Take one event and return the commands for the backend.

        Exchanges with the parent and checkpoints change a node too: `begin_exchange`, `send`, `answered`, `welcomed`,
        `saved` and `use_shared_copy` are calls, not events.

        Raises:
            MessageError: malformed, unknown_sender, superseded, restarted or implausible_incarnation: the event
                changes nothing. (A push of which the header can be read is answered.)
        """
        commands: list[Command] = []
        check_plain(event)
        if self.now_s < event.now_s < math.inf:
            self.now_s = event.now_s
        elif event.now_s != self.now_s:  # of a clock that is behind the one that this node's last life was told
            event = replace(event, now_s=self.now_s)
        if isinstance(event, ChildMessage):
            self._check(event.child, event.incarnation, to=event.to)
        elif isinstance(event, Joined):
            self._check(event.child, event.incarnation, to=self.incarnation)
            known = self.children.get(event.child, Child()).incarnation
            check_incarnation(event.child, event.incarnation, known=known)
        if isinstance(event, Push | Pull | Heartbeat | Joined):
            commands += self._hear(event.sender if isinstance(event, Push) else event.child, event.now_s)
        if isinstance(event, Push):
            commands += self._push(event)
        elif isinstance(event, Clock):
            commands += self._look_for_silence(event.now_s)
        elif isinstance(event, Pull):
            if event.child not in self.children:
                raise MessageError("unknown_sender", f"{self.path} has no child {event.child!r}")
            self.began_s = event.now_s if self.began_s is None else self.began_s
            self._waiting[event.child] = event.started_tokens
        elif isinstance(event, ParentModel):
            commands += self._merge(event)
        elif isinstance(event, Joined):
            commands += self._join(event)
        elif isinstance(event, Done | Left) and event.child in self.children:
            # No longer lost either: else its next sign of life would make it one that is waited for.
            self._set(event.child, active=False, left=isinstance(event, Left), awaited=False, lost=False)
            child = self.children[event.child]
            self._waiting.pop(event.child, None)
            if child.left and not child.gone:
                commands.append(Save())  # it will not be there to say it again, or to send what is in memory alone
        commands += self._advance(event.now_s)
        return commands

    def _check(self, name: str, incarnation: int, *, to: int) -> None:
        """Whether this life of a child may speak, and whether it knows which life of this node it speaks to."""
        child = self.children.get(name)
        if child is not None and incarnation < child.incarnation:
            known = f"there is incarnation {child.incarnation} of {name}"
            raise MessageError("superseded", f"this is incarnation {incarnation}, and {known}")
        if to != self.incarnation:
            raise MessageError("restarted", f"{self.path} is at incarnation {self.incarnation} by now: join again")

    def _hear(self, name: str, now_s: float) -> list[Command]:
        """A sign of life."""
        child = self.children.get(name)
        if child is None:
            return []
        if child.heard_s is not None:
            child.gaps = [*child.gaps[1 - GAPS :], now_s - child.heard_s]
        child.heard_s = now_s
        if not child.lost:
            return []
        child.lost, self.ended = False, False
        self._set(name, active=True)
        return [Note(record=LifeRecord(node=f"{self.path}/{name}", now_s=now_s, event="training", detail="is back"))]

    def _look_for_silence(self, now_s: float) -> list[Command]:
        """Give up children that are silent for longer than their own rhythm explains."""
        commands: list[Command] = []
        for name, child in self.children.items():
            if self.liveness is None or not child.active or not child.incarnation:
                continue
            if child.heard_s is None:  # not since this node was started again: its time to come back begins now
                child.heard_s = now_s
            silent_s = now_s - child.heard_s
            if silent_s > patience_s(child.gaps, self.liveness):
                child.lost = True
                self._set(name, active=False)
                said = f"silent for {silent_s:.0f} s: nobody waits for it"
                record = LifeRecord(node=f"{self.path}/{name}", now_s=now_s, event="lost", detail=said)
                commands.append(Note(record=record))
        return commands

    @property
    def is_deserted(self) -> bool:
        """Whether no child has ever been there. Such a node does not join its parent, which would wait for it."""
        return self._awaited == len(self.children)

    def _join(self, event: Joined) -> list[Command]:
        commands: list[Command] = []
        known = self.children.get(event.child)
        comes = known is None or known.awaited or known.left
        if comes and not self._active and self.has_parent and not self._hears_its_parent:
            self.wants_news = True  # while nobody was here, nobody asked the parent
            commands.append(Refresh())
        if event.child not in self.children:
            self.children[event.child] = Child()
            self._count_children()
        child, self.ended = self.children[event.child], False
        self._set(event.child, active=True, left=False, gone=False, awaited=False)
        child.incarnation = event.incarnation
        self._waiting.pop(event.child, None)  # whoever asked is gone, or will ask again
        forgot = event.seq < child.last_seq  # it comes from a checkpoint, and what it kept since is gone
        if forgot and child.durable_seq < child.last_seq:
            commands.append(Save())
        return commands

    def _count_children(self) -> None:
        """Count them; `_set` keeps the counts true. A node may have very many."""
        children = self.children.values()
        self._active = sum(child.active for child in children)
        self._awaited = sum(child.awaited for child in children)
        self._left = sum(child.left for child in children)

    def _set(self, name: str, **standing: bool) -> None:
        """Change whether a child is active, awaited or has left."""
        child = self.children[name]
        before = (child.active, child.awaited, child.left)
        vars(child).update(standing)
        self._active += child.active - before[0]
        self._awaited += child.awaited - before[1]
        self._left += child.left - before[2]

    def welcome(self, child: str) -> Welcome:
        """What a child that has joined must know."""
        known = self.children[child]
        return Welcome(incarnation=self.incarnation, last_seq=known.last_seq, durable_seq=known.durable_seq)

    def welcomed(self, welcome: Welcome) -> None:
        """The parent is there, perhaps again."""
        self.outbox.durable(welcome.durable_seq)

    def answered(self, verdict: Verdict) -> None:
        """The parent's word about an update of this node."""
        self.outbox.apply(verdict)

    def use_shared_copy(self, own: Flat, shared: Flat) -> Flat:
        """Use another buffer with the same values in place of one of the node's own.

        A backend that has put the published model, or the update in flight, into shared memory hands the shared
        copy back here, so that the node does not hold a second one.

        Returns:
            The buffer that the node uses from now on.
        """
        view = frozen(shared)
        if self.anchor is own:
            self.anchor = view
        if self.theta is own:
            self.theta = view
            if self._made is not None and own.base is self._made:
                self._spare.append(own.base)
            self._made = None
        if self.in_flight is not None and self.in_flight.values is own:
            self.in_flight = replace(self.in_flight, values=view)
            if self._sent is not None and own.base is self._sent and own is not shared:
                self._spare.append(own.base)
            self._sent = None
        self.outbox.use_shared_copy(own, view)
        return view

    # ---- accepting updates -----------------------------------------------------------------------------------

    def _push(self, event: Push) -> list[Command]:
        quota = self._quota(event.sender)
        most = self.aggregation.residuals.per_round if quota is None else quota.residuals
        try:
            update = unpack_update(event.packed, self.layout, residuals=most)
            if update.sender != event.sender:
                raise MessageError("unknown_sender", f"{event.sender!r} sent an update of {update.sender!r}")
            self._check(event.sender, event.incarnation, to=event.to)
            check_residuals(update, self.path, quota)
            verdict = self._judge(update)
        except MessageError as error:
            limit = header_bytes(self.layout, most)
            update, verdict = None, refuse_malformed(event.packed, error, version=self.version, most_bytes=limit)
        record = VerdictRecord(
            node=self.path,
            now_s=event.now_s,
            sender=event.sender,
            seq=verdict.seq,
            base_version=verdict.base_version,
            version=verdict.version,
            tau=verdict.tau,
            verdict=verdict.reason,
            bytes=event.packed.nbytes,
            detail=verdict.detail,
            incarnation=self.incarnation,
        )
        doubts: list[Command] = []
        if update is not None and verdict.accepted:
            doubts = self._accept(update, verdict.tau, event.now_s)
        else:
            self.refused[verdict.reason] = self.refused.get(verdict.reason, 0) + 1
            if update is not None and verdict.reason in TRAINED:
                self._settle(update)
        known = self.children.get(event.sender)
        verdict = replace(verdict, durable_seq=known.durable_seq if known is not None else 0)
        commands: list[Command] = [Answer(verdict=verdict), Note(record=record), *doubts]
        if verdict.accepted:
            commands = [*self._charge(event.sender, event.now_s), *commands, *self._wake()]
            if known is not None and known.last_seq - known.durable_seq >= self.save_every:
                commands.append(Save())
        return commands

    def _charge(self, sender: str, now_s: float) -> list[Command]:
        """Have a private client's contribution written down, before anything that it has touched is published."""
        if self.privacy is None or sender in self.privacy.federations:
            return []
        count = self.contributions[sender] = self.contributions.get(sender, 0) + 1
        epsilon = self.privacy.epsilon(sender, count)
        record = PrivacyRecord(node=f"{self.path}/{sender}", now_s=now_s, epsilon=epsilon)
        return [Charge(child=sender), Note(record=record)]

    def _is_exhausted(self, sender: str) -> bool:
        """Whether a private client may contribute no more."""
        if self.privacy is None or sender not in self.privacy.limits:
            return False
        return self.contributions.get(sender, 0) >= self.privacy.limits[sender]

    def _wake(self) -> list[Command]:
        """A call for the time at which the fold that is open may be aggregated."""
        if self.aggregation.trigger != "time_up" or self._fold is None:
            return []
        return [Wake(at_s=self._fold.first_s + self.aggregation.time_up_s)]

    def _judge(self, update: Update) -> Verdict:
        child = self.children.get(update.sender)
        sender = Sender(
            last_seq=None if child is None or child.left else child.last_seq,
            seen_seq=self.arrived.get(update.sender, (0, 0))[0],
            waiting=self._waiting_room() if self._contributed(update.sender) else None,
            exhausted=self._is_exhausted(update.sender),
            quota=self._quota(update.sender),
        )
        return judge(update, rules=self.aggregation, sender=sender, version=self.version, incarnation=self.incarnation)

    def _quota(self, child: str) -> Quota | None:
        """What a child may claim. One that the plan does not know has the largest quota of its siblings."""
        if not self.quotas:
            return None
        return self.quotas.get(child) or max(self.quotas.values(), key=lambda quota: quota.update_tokens)

    def _settle(self, update: Update) -> None:
        """Its tokens are spent, whatever became of them; of an update that comes twice, once."""
        seq, tokens = self.arrived.get(update.sender, (0, 0))
        if update.seq > seq:
            self.arrived[update.sender] = (update.seq, tokens + update.tokens)

    def _count_started(self, name: str, claimed: int, now_s: float) -> list[Command]:
        """Believe a child's word about the rounds begun below it as far as its quota goes."""
        child, quota = self.children[name], self._quota(name)
        if quota is None:
            child.started_tokens = max(child.started_tokens, claimed)
            return []
        settled = self.arrived.get(name, (0, 0))[1]
        counted = quota.counted(claimed, settled=settled)
        child.started_tokens = max(child.started_tokens, counted)
        if child.doubted or quota.is_plausible(claimed, settled=settled):
            return []
        child.doubted = True
        said = f"says that {claimed} tokens are begun, and updates of {settled} have come: {counted} are counted"
        record = LifeRecord(node=f"{self.path}/{name}", now_s=now_s, event="warning", detail=said)
        return [Note(record=record)]

    def _waiting_room(self) -> str | None:
        """How a second update of a child for the same aggregation is refused, if it is."""
        if self.synchronous:
            return "out_of_turn"  # the child waits for the version, and pushes again
        # Twice in one sum, a private client would move it by twice what the noise covers.
        return "too_soon" if self.privacy is not None else None

    def _accept(self, update: Update, tau: int, now_s: float) -> list[Command]:
        self._settle(update)
        self.children[update.sender].last_seq = update.seq
        doubts = self._count_started(update.sender, update.started_tokens, now_s)
        self.accepted += 1
        if not self.synchronous:
            self._fold_in(update, tau, now_s)
            return doubts
        self._held[update.sender] = (update, tau)
        self._fold_held(now_s)
        return doubts

    def _fold_held(self, now_s: float) -> None:
        """Synchronous mode: fold those held updates whose turn has come."""
        for name, child in self.children.items():
            if name in self._held:
                self._fold_in(*self._held.pop(name), now_s)
            elif child.active and not (self._fold and name in self._fold.contributors):
                return

    def _fold_in(self, update: Update, tau: int, now_s: float) -> None:
        if self._fold is None:
            self._fold = self._new_fold(now_s)
        fit = self.children[update.sender].fit = self._fold.add(update, tau, self.theta)
        if self.residuals.on and self.privacy is None:  # a residual is one client's key layer: no noise would cover it
            keys = self.theta[self.layout.backbone_size :] + update.values[self.layout.backbone_size :]
            self.residuals.look(update.sender, keys, fit, tokens=update.tokens, passed=update.residuals)

    def _new_fold(self, first_s: float) -> AggregationRule:
        named: dict[str, Any] = {"origin": self.merger.origin, "first_s": first_s, "buffer": self._buffer()}
        if self.privacy is not None:
            return PrivateFold(self.layout, self.aggregation, self.privacy, **named)
        return rule_of(self.aggregation)(self.layout, self.aggregation, **named)

    def _buffer(self) -> Flat:
        """A buffer as large as the model, whatever it holds."""
        return self._spare.pop() if self._spare else np.empty(self.layout.size, np.float32)

    # ---- moving on -------------------------------------------------------------------------------------------

    def _advance(self, now_s: float) -> list[Command]:
        """Whatever the last event has made due."""
        commands: list[Command] = []
        if self._held:
            self._fold_held(now_s)
        if self._due(now_s):
            commands += self._aggregate(now_s)
        if self._exchange_due():
            self._exchange_asked = True
            commands += [*self._left_over(now_s), Exchange()]
        for name in [name for name in self._waiting if self._may_serve(name)]:
            commands += self._serve(name, now_s)
        if self._all_ended() and not self.ended:
            self.ended = True
            commands.append(Finish())
        return commands

    def _due(self, now_s: float) -> bool:
        fold, rules = self._fold, self.aggregation
        if fold is None:
            return False
        if self.synchronous or not self._active:
            heard = set(fold.contributors)
            return not self._held and all(name in heard for name, child in self.children.items() if child.active)
        if rules.trigger == "goal_achieved":
            return len(fold.contributors) >= rules.buffer_size
        if rules.trigger == "time_up":
            return len(fold.contributors) >= rules.quorum and now_s >= fold.first_s + rules.time_up_s
        raise unknown_name("aggregation.trigger", rules.trigger, get_args(Trigger))

    def _aggregate(self, now_s: float) -> list[Command]:
        """Make the folded updates the next version."""
        fold, self._fold = self._fold, None
        if fold is None:
            raise AggregationError(f"{self.path}: nothing to aggregate")
        heard = set(fold.contributors)
        absent: list[list[float]] = []
        if self.layout.key_layers:
            absent = [c.fit for name, c in self.children.items() if not c.left and name not in heard]
        else:  # without scores, their number is all that matters
            here = sum(name in self.children and not self.children[name].left for name in heard)
            absent = [[]] * (len(self.children) - self._left - here)
        flat, norm, weights = fold.finish(self.theta, self.optimizer, absent=absent)
        if self._made is not None and not self._lent and (not self.has_parent or self.anchor is not self.theta):
            self._spare.append(self._made)  # several updates came before any child pulled
        self.theta, self._made, self._lent = frozen(flat), flat, False
        for name, share in fold.shares.items():
            if name in self.children:
                self.children[name].share += share * self.optimizer.rate
        self.residuals.settle()
        self.version += 1
        self.tokens += fold.tokens
        self.mean_tokens = fold.tokens / len(fold.contributors)
        self.unpushed_aggregations += 1
        self.unpushed_tokens += fold.tokens
        if not self.has_parent:
            self.anchor = self.theta  # nobody measures from it, and an old model must not be kept alive
            self._spend(now_s)
        record = AggregationRecord(
            node=self.path,
            now_s=now_s,
            version=self.version,
            tokens=fold.tokens,
            total_tokens=self.tokens,
            contributors=tuple(fold.contributors),
            step_norm=norm,
        )
        commands: list[Command] = [Note(record=record)]
        if weights:
            attention = AttentionRecord(
                node=self.path,
                now_s=now_s,
                version=self.version,
                direction="up",
                layers=tuple(layer.name for layer in self.layout.key_layers),
                candidates=tuple(fold.attention.names),
                weights=tuple(tuple(row) for row in weights),
            )
            commands.append(Note(record=attention))
        return commands

    # ---- the parent ------------------------------------------------------------------------------------------

    @property
    def exchanging(self) -> bool:
        """Whether an exchange with the parent is under way, from the command on."""
        return self._exchange_asked or self.in_flight is not None

    @property
    def _hears_its_parent(self) -> bool:
        """Whether the parent's model is on its way."""
        return self.exchanging or self.wants_news

    def resume(self) -> list[Command]:
        """After `restore`: what is due before the first event.

        An update is sent again whose exchange had not come back (the parent drops duplicates). Private clients pay once
        more for what stands in the sum that was being made: the life before may have published it, under other noise.
        """
        commands: list[Command] = []
        if self.privacy is not None:
            pending = [*(self._fold.contributors if self._fold is not None else ()), *self._held]
            if any(self._is_exhausted(name) for name in pending):
                self._fold, self._held = None, {}
            else:
                for name in pending:
                    commands += self._charge(name, 0.0)
        if self.exchanging:
            commands.append(Exchange())
        elif self.wants_news:
            commands.append(Refresh())
        return commands + self._wake()

    def _exchange_due(self) -> bool:
        if not self.has_parent or self._hears_its_parent or not self.unpushed_aggregations:
            return False
        return not self._active or self.unpushed_aggregations >= self.aggregation.push_every

    def _left_over(self, now_s: float) -> list[Command]:
        """A warning where the next update cannot claim all tokens that have gathered for it."""
        if self.quota is None or self.unpushed_tokens <= self.quota.update_tokens:
            return []
        most, gathered = self.quota.update_tokens, self.unpushed_tokens
        said = f"{gathered} tokens have gathered for one update, which may claim {most}: the rest goes with the next"
        return [Note(record=LifeRecord(node=self.path, now_s=now_s, event="warning", detail=said))]

    def begin_exchange(self) -> Update:
        """The update that an Exchange command asks to send; to be called before the next event.

        Holds all work since the last one. After a restart that lost the answer it is the same update again.
        """
        self._exchange_asked = False
        if self.in_flight is not None:
            return self.in_flight
        self.is_sent = False
        split = self.layout.backbone_size
        self._sent = values = self._buffer()
        difference(self.theta[:split], self.anchor[:split], out=values[:split])
        np.subtract(self.theta[split:], self.parent_keys, out=values[split:])
        encoded, values = encode_update(self.codec, values, self.lost)
        self.seq += 1
        tokens = self.unpushed_tokens if self.quota is None else min(self.unpushed_tokens, self.quota.update_tokens)
        self.in_flight = Update(
            sender=self.path.rsplit("/", 1)[-1],
            seq=self.seq,
            base_version=self.base_version,
            tokens=tokens,
            started_tokens=self.started_tokens,
            values=frozen(values),
            residuals=self.residuals.rise(),
            codec=self.codec,
            encoded=encoded,
            base_incarnation=self.base_incarnation,
        )
        self.anchor = self.theta  # the next update measures from here
        for child in self.children.values():
            child.pushed, child.share = child.pushed + child.share, 0.0
        self.unpushed_aggregations, self.unpushed_tokens = 0, self.unpushed_tokens - tokens
        return self.in_flight

    @property
    def may_send(self) -> bool:
        """Whether a checkpoint knows the update in flight.

        Not before may the parent have it: a node that dies and does not know what it has sent would take its children's
        updates, which they send again, for new, and send them on a second time.
        """
        return self.in_flight is not None and self._covered_seq >= self.in_flight.seq

    def send(self) -> Update:
        """The update in flight, which is sent now, and kept until the parent cannot lose it any more."""
        update = self.in_flight
        if update is None:
            raise AggregationError(f"{self.path}: there is no update to send")
        self.is_sent = True
        self.outbox.add(update)
        return update

    def _merge(self, event: ParentModel) -> list[Command]:
        """Move to the parent and keep whatever the children did meanwhile.

        A model that is refused ends the exchange all the same: the node goes on with its own, and asks again after the
        next aggregation. What was pushed is measured from, as always.
        """
        own = None if self.wants_news and self.version == 0 else self.theta
        doubt = self.gate.refusal(event.model, seq=self.seq, own=own, now_s=event.now_s)
        notes: list[Command] = [] if doubt is None else [Note(record=doubt)]
        model, pushed = event.model, self.in_flight
        waited, self.wants_news, self.in_flight = self.wants_news, False, None
        notes += self._count_on(self.gate.last_seq, event.now_s)
        if model is None or self.gate.shut:
            self.finished = model.finished if model is not None else self.finished
            if pushed is not None:  # the next update must not carry the same change of the key layers again
                self.parent_keys = frozen(self.anchor[self.layout.backbone_size :].copy())
            return notes
        self.base_version, self.progress = model.version, model.progress
        self.base_incarnation, self.finished = model.incarnation, model.finished
        self.outbox.durable(model.durable_seq)
        self.parent_keys = frozen(model.values[self.layout.backbone_size :].copy())
        if model.version == 0:
            return notes  # the parent has aggregated nothing yet: it has nothing to say
        if waited and self.version == 0:
            self._begin_from(model, now_s=event.now_s)
            return notes
        moved = Moved(now=self.anchor, change=pushed.values) if pushed is not None else None
        m, judged = self.merger.judge(model, moved, now_s=event.now_s)
        merged = self._buffer()
        anchor = self.merger.backbone(m, self.theta, self.anchor, model, out=merged)
        record = self.merger.keys(
            m, self.theta, self.anchor, model, own_tokens=self.mean_tokens, now_s=event.now_s, out=merged
        )
        for child in self.children.values():
            child.pushed *= 1.0 - m + m * model.share
        self.theta, self._made, self._lent = frozen(merged), merged, False
        self.anchor = self.theta if anchor is None else frozen(anchor)
        notes.append(Note(record=judged))
        if record is not None:
            notes.append(Note(record=record))
        return notes

    def _count_on(self, last_seq: int, now_s: float) -> list[Command]:
        """Count on from what the parent knows, though its model be refused: it drops the numbers that it has seen."""
        forgotten = range(self.seq + 1, last_seq + 1)
        if not forgotten:
            return []
        self.seq = last_seq
        # They were sent without a checkpoint.
        said = f"has forgotten {len(forgotten)} of its updates: what its children send again counts twice above it"
        return [Note(record=LifeRecord(node=self.path, now_s=now_s, event="warning", detail=said))]

    def _begin_from(self, model: Model, *, now_s: float) -> None:
        """A newcomer has nothing of its own to keep. What it has heard is its first version: children shall take it."""
        self.merger.judge(model, None, now_s=now_s)
        values = self._buffer()
        np.copyto(values, model.values)
        self.theta = self.anchor = frozen(values)
        self._made, self._lent = values, False
        self.version = 1

    # ---- the children ----------------------------------------------------------------------------------------

    @property
    def started_tokens(self) -> int:
        """Tokens of all local rounds begun below this node."""
        return sum(child.started_tokens for child in self.children.values())

    def _may_serve(self, name: str) -> bool:
        """Synchronous children wait until their last update is in a version and that version is exchanged."""
        if self.wants_news or (
            self.min_clients
            and not self.accepted
            and sum(child.incarnation > 0 for child in self.children.values()) < self.min_clients
        ):
            return False
        if not self.synchronous:
            return True
        return not self._contributed(name) and not self.exchanging

    def _contributed(self, name: str) -> bool:
        """Whether a child's update waits in the aggregation that is being made."""
        return name in self._held or (self._fold is not None and name in self._fold.contributors)

    def _serve(self, name: str, now_s: float) -> list[Command]:
        doubts: list[Command] = []
        child, started = self.children[name], self._waiting.pop(name)
        if not self.has_parent and not self.synchronous:
            # In synchronous mode this is settled once per version instead, so that all children hear the same.
            self._spend(now_s)
        if not self.finished:
            doubts = self._count_started(name, started, now_s)
        model = self.model(name)
        child.share = child.pushed = 0.0
        return [*doubts, Serve(child=name, model=model)]

    def model(self, child: str) -> Model:
        """The published model, as this child would get it."""
        self._lent = True
        known = self.children.get(child, Child())
        return Model(
            version=self.version,
            progress=self.progress,
            finished=self.finished or self._is_exhausted(child),
            tokens=self.mean_tokens,
            last_seq=known.last_seq,
            share=known.share + known.pushed,
            incarnation=self.incarnation,
            durable_seq=known.durable_seq,
            residuals=self.residuals.offer(child),
            values=self.theta,
        )

    def _spend(self, now_s: float) -> None:
        """The world alone: how much of the budget is spent, and whether new rounds may begin."""
        if self.budget.tokens is not None:
            self.progress = min(self.tokens / self.budget.tokens, 1.0)
            self.finished = self.started_tokens >= self.budget.tokens
        elif self.budget.seconds is not None:
            trained_s = now_s - (now_s if self.began_s is None else self.began_s)
            self.progress = min(trained_s / self.budget.seconds, 1.0)
            self.finished = trained_s >= self.budget.seconds

    def _all_ended(self) -> bool:
        idle = self._fold is None and not self._held and not self._hears_its_parent
        passed_on = not self.has_parent or not self.unpushed_aggregations
        return idle and passed_on and not self._active and not self._awaited

    # ---- durability ------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Any], dict[str, Flat]]:
        """Everything that a restart needs: plain values, and buffers.

        Those whose name `changes` says so change with the next event; the others never do.
        """
        self._made = None  # whoever writes the model down may take a while
        arrays = {"theta": self.theta, **{f"optimizer.{k}": v for k, v in self.optimizer.buffers.items()}}
        if self.anchor is not self.theta:
            arrays["anchor"] = self.anchor
        if self.has_parent and self.layout.key_layers:
            arrays["parent_keys"] = self.parent_keys
        if self.lost is not None:
            arrays["lost"] = self.lost
        if self.merger.heard is not None:
            arrays["heard"] = self.merger.heard
        meta: dict[str, Any] = {name: copy(getattr(self, name)) for name in _STATE}
        meta["children"] = {name: vars(child).copy() for name, child in self.children.items()}
        for child in meta["children"].values():
            # All that is read back is durable, and the time in which nobody listened is no silence.
            del child["durable_seq"], child["heard_s"], child["gaps"], child["gone"]
        meta["layout"], meta["optimizer_steps"] = self.layout.hash, self.optimizer.steps
        meta["arrived"] = dict(self.arrived)
        meta["contributions"], meta["wants_news"] = dict(self.contributions), self.wants_news
        if self._fold is not None:
            arrays |= {f"fold.{name}": values for name, values in self._fold.arrays().items()}
            meta["fold"] = self._fold.state()
        meta["residuals"], residuals = self.residuals.state()
        arrays |= residuals
        meta["held"] = {}
        for name, (update, tau) in self._held.items():
            arrays[f"held.{name}"] = update.values
            meta["held"][name] = {"update": fields(update), "tau": tau}
        meta["outbox"], kept = self.outbox.state()
        arrays |= kept
        if self.in_flight is not None:
            meta["in_flight"] = fields(self.in_flight)
            if all(values is not self.in_flight.values for values in kept.values()):
                arrays["in_flight"] = self.in_flight.values
        return meta, arrays

    @staticmethod
    def changes(name: str) -> bool:
        """Whether a buffer of the state changes in place."""
        if name == "fold.first" or name.startswith("fold.kept."):  # updates as they came
            return False
        return name == "lost" or name.startswith(("fold.", "optimizer."))

    def covers(self) -> Covered:
        """What a checkpoint of the state as it is now would know."""
        return Covered(
            seqs={name: child.last_seq for name, child in self.children.items()},
            left={name for name, child in self.children.items() if child.left},
            seq=self.seq,
        )

    def saved(self, covered: Covered) -> None:
        """A checkpoint is on disk: children need not keep what it covers, and those that left may end."""
        for name, seq in covered.seqs.items():
            self.children[name].durable_seq = max(self.children[name].durable_seq, seq)
        for name in covered.left:
            self.children[name].gone = self.children[name].left
        self._covered_seq = max(self._covered_seq, covered.seq)

    def restore(self, meta: dict[str, Any], arrays: dict[str, Flat]) -> None:
        """Become what `state` described. Call `resume` next.

        Raises:
            CheckpointError: the checkpoint is of another model.
        """
        if meta["layout"] != self.layout.hash:
            raise CheckpointError(f"{self.path}: the checkpoint is of another model or another choice of key layers")
        for name, count in meta["contributions"].items():
            if self.privacy is not None and self.contributions.get(name, count) < count:
                raise PrivacyError(
                    f"{self.path}/{name}: its ledger holds {self.contributions[name]} of {count} contributions; "
                    "restore the file from a copy"
                )
        for name in _STATE:
            setattr(self, name, meta[name])
        self.now_s = max(
            self.now_s, self.began_s or 0.0, meta.get("now_s", 0.0)
        )  # where its backend has written it down
        self.ended, self.wants_news = False, meta.get("wants_news", False)
        # A private sum takes only those whom the plan knows: of others nobody says how they are to be clipped.
        mine = {n: c for n, c in meta["children"].items() if self.privacy is None or n in self.children}
        for name, child in mine.items():
            self.children[name] = Child(**(child | {"durable_seq": child["last_seq"], "gone": child["left"]}))
        before = {name: (child.last_seq, child.started_tokens) for name, child in self.children.items()}
        self.arrived = {name: (seq, tokens) for name, (seq, tokens) in meta.get("arrived", before).items()}
        self._count_children()
        # The budget may be larger than it was: a federation hears from its parent, the world counts again.
        self.finished = False
        if self.budget.tokens is not None and not self.has_parent:
            self._spend(0.0)
        self.theta = frozen(arrays["theta"])
        self.anchor = frozen(arrays["anchor"]) if "anchor" in arrays else self.theta
        self.parent_keys = frozen(arrays.get("parent_keys", self.parent_keys))
        if self.lost is not None and "lost" in arrays:
            self.lost[:] = arrays["lost"]
        if self.merger.heard is not None and "heard" in arrays:
            self.merger.heard = frozen(arrays["heard"])
        self.optimizer.steps = meta["optimizer_steps"]
        for name in self.optimizer.buffers:
            self.optimizer.buffers[name] = np.array(arrays[f"optimizer.{name}"])
        self.residuals.restore(meta.get("residuals", NO_RESIDUALS), arrays)
        self._fold, self._held, self._waiting, self.in_flight = None, {}, {}, None
        self.is_sent, self._covered_seq = False, self.seq
        self.outbox.restore(meta["outbox"], arrays)
        if self.quota is not None:
            self.outbox.limit_tokens(self.quota.update_tokens)
        if "in_flight" in meta:
            kept = self.outbox.after(meta["in_flight"]["seq"] - 1)  # it is the newest, if it is there
            self.in_flight = kept[0] if kept else revived(meta["in_flight"], arrays["in_flight"])
            if self.quota is not None:
                self.in_flight = limited(self.in_flight, self.quota.update_tokens)
        if "fold" in meta:
            self._fold = self._new_fold(0.0)
            buffers = {k.removeprefix("fold."): values for k, values in arrays.items() if k.startswith("fold.")}
            try:
                self._fold.restore(meta["fold"], buffers)
            except CheckpointError as error:
                raise CheckpointError(f"{self.path}: {error}") from error
        for name, entry in meta["held"].items():
            if name not in self.children:
                continue
            self._held[name] = (revived(entry["update"], arrays[f"held.{name}"]), entry["tau"])


def patience_s(gaps: Sequence[float], rules: LivenessConfig) -> float:
    """How long a child may be silent: the median of its last gaps and k times their spread, and never too short.

    The spread is the median absolute deviation, which one long gap does not move.
    """
    if len(gaps) < GAPS // 4:
        return rules.grace_s
    middle = statistics.median(gaps)
    spread = statistics.median(abs(gap - middle) for gap in gaps)
    return max(middle + rules.k * spread, rules.grace_s)


_STATE = (
    "version",
    "base_version",
    "base_incarnation",
    "seq",
    "tokens",
    "mean_tokens",
    "unpushed_aggregations",
    "unpushed_tokens",
    "progress",
    "finished",
    "began_s",
    "accepted",
    "refused",
)
