"""How an inner node takes updates in: they are checked, judged, paid for, held for their turn, and folded.

In asynchronous triggers an update is folded at once. In synchronous mode updates are folded in the order of the
children, each as soon as those before it are in, so that the result does not depend on who was faster.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

from worldlm_ray.aggregation.admission import TRAINED, Sender, judge, refuse_malformed
from worldlm_ray.aggregation.budget import PrivacyBudget
from worldlm_ray.aggregation.children import Children
from worldlm_ray.aggregation.events import Answer, Command, Note, Push, Save, Wake
from worldlm_ray.aggregation.node_setup import NodeRules
from worldlm_ray.aggregation.private_fold import PrivateFold
from worldlm_ray.aggregation.published import Published
from worldlm_ray.aggregation.residuals import Pool, check_residuals
from worldlm_ray.aggregation.rules import AggregationRule, rule_of
from worldlm_ray.config.federated import Trigger
from worldlm_ray.config.values import unknown_name
from worldlm_ray.errors import AggregationError, CheckpointError, MessageError
from worldlm_ray.exchange.limits import header_bytes
from worldlm_ray.exchange.messages import Update, unpack_update
from worldlm_ray.exchange.outbox import buffers, fields, revived
from worldlm_ray.exchange.replies import Verdict
from worldlm_ray.records import AggregationRecord, AttentionRecord, Record, VerdictRecord
from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.tensors.layout import Layout


class Intake:
    """The updates of the aggregation that is being made.

    Args:
        rules: what to accept, when to aggregate and how.
        layout: the model's layout.
        published: the node's model.
        children: who sends updates.
        residuals: where key layers go that do not fit.
        privacy: what private clients may still contribute.
        origin: the run's initial key layers.
    """

    def __init__(
        self,
        rules: NodeRules,
        layout: Layout,
        *,
        published: Published,
        children: Children,
        residuals: Pool,
        privacy: PrivacyBudget,
        origin: Flat,
    ) -> None:
        self.rules, self.save_every, self.layout, self.origin = rules.aggregation, rules.save_every, layout, origin
        self.published, self.children, self.residuals, self.privacy = published, children, residuals, privacy
        self.path = children.path
        self.synchronous = rules.aggregation.trigger == "synchronous"
        self.accepted = 0
        self.refused: dict[str, int] = {}
        """By reason."""
        self.fold: AggregationRule | None = None
        """The sums so far; None where nothing is folded yet."""
        self._held: dict[str, tuple[Update, int]] = {}
        """Accepted updates that wait for their turn, with their staleness."""

    # ---- accepting -------------------------------------------------------------------------------------------

    def push(self, event: Push, *, here: int) -> list[Command]:
        """Take an update, or refuse it; `here` is the node's incarnation."""
        update, verdict = self._read(event, here=here)
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
            incarnation=here,
        )
        doubts: list[Command] = []
        if update is not None and verdict.accepted:
            doubts = self._accept(update, verdict.tau, event.now_s)
        else:
            self.refused[verdict.reason] = self.refused.get(verdict.reason, 0) + 1
            if update is not None and verdict.reason in TRAINED:
                self.children.settle(update)
        known = self.children.get(event.sender)
        verdict = replace(verdict, durable_seq=known.durable_seq if known is not None else 0)
        commands: list[Command] = [Answer(verdict=verdict), Note(record=record), *doubts]
        if verdict.accepted:
            commands = [*self.privacy.charge(event.sender, event.now_s), *commands, *self.wake()]
            if known is not None and known.last_seq - known.durable_seq >= self.save_every:
                commands.append(Save())
        return commands

    def _read(self, event: Push, *, here: int) -> tuple[Update | None, Verdict]:
        """The update, if it can be read, and what becomes of it."""
        quota = self.children.quota(event.sender)
        most = self.rules.residuals.per_round if quota is None else quota.residuals
        try:
            has_low = self.published.sums is not None
            update = unpack_update(event.packed, self.layout, residuals=most, has_low=has_low)
            if update.sender != event.sender:
                raise MessageError("unknown_sender", f"{event.sender!r} sent an update of {update.sender!r}")
            self.children.check(event.sender, event.incarnation, to=event.to, here=here)
            check_residuals(update, self.path, quota)
            return update, self._judge(update, here=here)
        except MessageError as error:
            limit, version = header_bytes(self.layout, most), self.published.version
            return None, refuse_malformed(event.packed, error, version=version, most_bytes=limit)

    def _judge(self, update: Update, *, here: int) -> Verdict:
        child = self.children.get(update.sender)
        sender = Sender(
            last_seq=None if child is None or child.has_left else child.last_seq,
            seen_seq=0 if child is None else child.judged_seq,
            waiting=self._waiting_room() if self.holds(update.sender) else None,
            exhausted=self.privacy.is_exhausted(update.sender),
            quota=self.children.quota(update.sender),
        )
        return judge(update, rules=self.rules, sender=sender, version=self.published.version, incarnation=here)

    def _waiting_room(self) -> str | None:
        """How a second update of a child for the same aggregation is refused, if it is."""
        if self.synchronous:
            return "out_of_turn"  # the child waits for the version, and pushes again
        # Twice in one sum, a private client would move it by twice what the noise covers.
        return "too_soon" if self.privacy.privacy is not None else None

    def _accept(self, update: Update, tau: int, now_s: float) -> list[Command]:
        self.children.settle(update)
        self.children[update.sender].last_seq = update.seq
        doubt = self.children.count_started(update.sender, update.started_tokens, now_s)
        self.accepted += 1
        if self.synchronous:
            self._held[update.sender] = (update, tau)
            self.fold_held(now_s)
        else:
            self._fold_in(update, tau, now_s)
        return [] if doubt is None else [Note(record=doubt)]

    def fold_held(self, now_s: float) -> None:
        """Synchronous mode: fold those held updates whose turn has come."""
        if not self._held:
            return
        for name, child in self.children.items():
            if name in self._held:
                self._fold_in(*self._held.pop(name), now_s)
            elif child.is_active and not (self.fold and name in self.fold.contributors):
                return

    def _fold_in(self, update: Update, tau: int, now_s: float) -> None:
        if self.fold is None:
            self.fold = self._new_fold(now_s)
        theta = self.published.theta
        scores = self.children[update.sender].scores = self.fold.add(update, tau, theta)
        self.residuals.folded(update, scores, theta)

    def _new_fold(self, first_s: float) -> AggregationRule:
        named: dict[str, Any] = {"origin": self.origin, "first_s": first_s, "buffer": self.published.buffer()}
        if self.privacy.privacy is not None:
            return PrivateFold(self.layout, self.rules, self.privacy.privacy, **named)
        if self.published.sums is not None:
            named["sums"] = self.published.sums
        return rule_of(self.rules)(self.layout, self.rules, **named)

    # ---- what is in it ---------------------------------------------------------------------------------------

    @property
    def is_empty(self) -> bool:
        """Whether no update waits to be aggregated."""
        return self.fold is None and not self._held

    @property
    def pending(self) -> list[str]:
        """Senders of the updates that wait to be aggregated."""
        return [*(self.fold.contributors if self.fold is not None else ()), *self._held]

    def holds(self, name: str) -> bool:
        """Whether a child's update waits in the aggregation that is being made."""
        return name in self._held or (self.fold is not None and name in self.fold.contributors)

    def drop(self) -> None:
        """Forget what waits."""
        self.fold, self._held = None, {}

    def pay_again(self) -> list[Command]:
        """After a restart, have private clients pay once more for what stands in the sum that was being made.

        The life before may have published it, under other noise. If one of them cannot pay, the sum is dropped.
        """
        if self.privacy.privacy is None:
            return []
        if any(self.privacy.is_exhausted(name) for name in self.pending):
            self.drop()
        return [command for name in self.pending for command in self.privacy.charge(name, 0.0)]

    def is_due(self, now_s: float) -> bool:
        """Whether the fold should become the next version now.

        Raises:
            ConfigError: there is no trigger of the name in `aggregation.trigger`.
        """
        fold, rules = self.fold, self.rules
        if fold is None:
            return False
        if self.synchronous or not self.children.any_active:
            heard = set(fold.contributors)
            return not self._held and all(name in heard for name, c in self.children.items() if c.is_active)
        if rules.trigger == "goal_achieved":
            return len(fold.contributors) >= rules.buffer_size
        if rules.trigger == "time_up":
            return len(fold.contributors) >= rules.quorum and now_s >= fold.first_s + rules.time_up_s
        raise unknown_name("aggregation.trigger", rules.trigger, get_args(Trigger))

    def wake(self) -> list[Command]:
        """A call for the time at which the fold that is open may be aggregated."""
        if self.rules.trigger != "time_up" or self.fold is None:
            return []
        return [Wake(at_s=self.fold.first_s + self.rules.time_up_s)]

    def close(self) -> AggregationRule:
        """Give the fold away, to be aggregated.

        Raises:
            AggregationError: there is none.
        """
        fold, self.fold = self.fold, None
        if fold is None:
            raise AggregationError(f"{self.path}: nothing to aggregate")
        return fold

    # ---- durability ------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Any], dict[str, Flat]]:
        """What a restart needs."""
        meta: dict[str, Any] = {"accepted": self.accepted, "refused": dict(self.refused), "held": {}}
        arrays: dict[str, Flat] = {}
        if self.fold is not None:
            arrays |= {f"{_FOLD}{name}": values for name, values in self.fold.arrays().items()}
            meta["fold"] = self.fold.state()
        for name, (update, tau) in self._held.items():
            arrays |= buffers(update, f"{_HELD}{name}")
            meta["held"][name] = {"update": fields(update), "tau": tau}
        return meta, arrays

    def restore(self, meta: dict[str, Any], arrays: dict[str, Flat]) -> None:
        """Become what `state` described; the children and the published model are restored before.

        Raises:
            CheckpointError: the fold is of another kind.
        """
        self.drop()
        self.accepted, self.refused = meta["accepted"], dict(meta["refused"])
        if "fold" in meta:
            self.fold = self._new_fold(0.0)
            buffers = {k.removeprefix(_FOLD): values for k, values in arrays.items() if k.startswith(_FOLD)}
            try:
                self.fold.restore(meta["fold"], buffers)
            except CheckpointError as error:
                raise CheckpointError(f"{self.path}: {error}") from error
        for name, entry in meta["held"].items():
            if name in self.children:
                self._held[name] = (revived(entry["update"], arrays, f"{_HELD}{name}"), entry["tau"])


_FOLD, _HELD = "fold.", "held."


def records_of(
    fold: AggregationRule, intake: Intake, norm: float, weights: list[list[float]], *, now_s: float
) -> list[Record]:
    """What tracking is told of the aggregation that `finish` has made.

    Args:
        fold: that has made the aggregation.
        intake: of the node.
        norm: of the backbone's step.
        weights: of attention [key layers, candidates].
        now_s: run time.
    """
    path, version, total_tokens = intake.path, intake.published.version, intake.published.tokens
    records: list[Record] = [
        AggregationRecord(
            node=path,
            now_s=now_s,
            version=version,
            tokens=fold.tokens,
            total_tokens=total_tokens,
            contributors=tuple(fold.contributors),
            step_norm=norm,
        )
    ]
    if weights:
        attention = AttentionRecord(
            node=path,
            now_s=now_s,
            version=version,
            direction="up",
            layers=tuple(layer.name for layer in intake.layout.key_layers),
            candidates=tuple(fold.attention.names),
            weights=tuple(tuple(row) for row in weights),
        )
        records.append(attention)
    return records
