"""The state machine of an inner node: one for the world and for every federation, at any depth.

`Node.handle(event)` returns commands for a shell to carry out. A node has no clock, does no input or output and
knows nothing of Ray: time comes in with the events, and both shells (actors on Ray, the simulator) drive the
same machine. The world is a node without a parent.

    event                                  what may come back
    Push(sender, packed)                   Answer(verdict), Note(records), Exchange, Serve, Wake
    Pull(child, started_tokens)            Serve(child), now or once the child may go on
    ParentModel(model)                     Serve, Exchange
    Done(child), Left(child), Joined(...)  Serve, Exchange, Finish
    Clock                                  as Push

Two things stand in memory besides the optimizer's state: the published model, which never changes in place (so
children, a push in flight and a checkpoint can share it), and one buffer into which updates are folded as they
arrive and which then *becomes* the next published model. A refused update touches neither.

In asynchronous triggers an update is folded at once. In synchronous mode updates are folded in the order of the
children, each as soon as those before it are in, so that the result does not depend on who was faster.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from worldlm_ray.aggregation.attention import OnlineAttention, attend, scores, with_prior
from worldlm_ray.aggregation.server_optimizer import ServerOptimizer
from worldlm_ray.aggregation.staleness import discount
from worldlm_ray.config import AggregationConfig, BudgetConfig
from worldlm_ray.errors import AggregationError, CheckpointError, MessageError
from worldlm_ray.messages import Model, Packed, Update, read_header, unpack_update
from worldlm_ray.params import Flat, Layout, add_scaled, frozen, lerp, squared_norm
from worldlm_ray.records import AggregationRecord, AttentionRecord, Record, VerdictRecord

ACCEPTED = "accepted"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a node decided about an update, and why."""

    reason: str
    """`accepted`, or: malformed, wrong_schema, wrong_layout, wrong_shape, unknown_sender, duplicate,
    future_version, stale, not_finite, norm_exceeded."""
    seq: int
    base_version: int
    version: int
    tau: int
    detail: str = ""

    @property
    def accepted(self) -> bool:
        """Whether the update was folded in (or is held for its turn)."""
        return self.reason == ACCEPTED


@dataclass(frozen=True, kw_only=True)
class Push:
    """An update arrived from `sender`."""

    sender: str
    packed: Packed
    now_s: float


@dataclass(frozen=True, kw_only=True)
class Pull:
    """A child asks for the model; `started_tokens` counts its local rounds including the one it is about to begin."""

    child: str
    started_tokens: int
    now_s: float


@dataclass(frozen=True, kw_only=True)
class ParentModel:
    """The parent's model arrived: the end of an exchange."""

    model: Model
    now_s: float


@dataclass(frozen=True, kw_only=True)
class Done:
    """A child will train no more in this run."""

    child: str
    now_s: float


@dataclass(frozen=True, kw_only=True)
class Left:
    """A child is gone; what it had pushed stays."""

    child: str
    now_s: float


@dataclass(frozen=True, kw_only=True)
class Joined:
    """A child is here: a new one, or one that had left or was done."""

    child: str
    now_s: float


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Time has passed: asked for by a Wake command."""

    now_s: float


Event = Push | Pull | ParentModel | Done | Left | Joined | Clock


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Tell a child what became of its update."""

    child: str
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Send this model to a child that pulled."""

    child: str
    model: Model


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """Push what `Node.begin_exchange` gives to the parent, then pull, and bring the model back as a ParentModel.

    The update is not in the command: a shell may move the published model to shared memory first, so that the two
    never stand in private memory together.
    """


@dataclass(frozen=True, kw_only=True)
class Wake:
    """Send a Clock event at this time."""

    at_s: float


@dataclass(frozen=True, kw_only=True)
class Finish:
    """Everything below has ended and nothing is left to pass on."""


@dataclass(frozen=True, kw_only=True)
class Note:
    """For tracking."""

    record: Record


Command = Answer | Serve | Exchange | Wake | Finish | Note


@dataclass
class Child:
    """What a node remembers of one child."""

    last_seq: int = 0
    started_tokens: int = 0
    active: bool = True
    """False once the child is done or has left."""
    left: bool = False


@dataclass
class Fold:
    """Updates on their way to becoming the next model."""

    flat: Flat
    """[sum of tokens * s(tau) * backbone change | unnormalised blend of key layers]."""
    attention: OnlineAttention
    tokens: int = 0
    """Undiscounted weight."""
    contributors: list[str] = field(default_factory=list)
    first_s: float = 0.0


class Node:
    """An inner node of the tree.

    Args:
        path: the node's path, such as `world/europe`.
        children: names of the children, in the order of the tree.
        aggregation: what to accept, when to aggregate and how.
        merge: m in theta = (1 - m) own + m parent, for the backbone.
        has_parent: False for the world.
        layout: the model's layout.
        initial: the run's initial parameters [layout.size]; not copied, must not change.
        budget: the run's budget; used by the world alone.
    """

    def __init__(
        self,
        *,
        path: str,
        children: tuple[str, ...],
        aggregation: AggregationConfig,
        merge: float,
        has_parent: bool,
        layout: Layout,
        initial: Flat,
        budget: BudgetConfig,
    ) -> None:
        self.path, self.aggregation, self.merge, self.layout, self.budget = path, aggregation, merge, layout, budget
        self.has_parent = has_parent
        self.synchronous = aggregation.trigger == "synchronous"
        self.optimizer = ServerOptimizer(aggregation.server_optimizer, layout.backbone_size)
        self.origin = initial[layout.backbone_size :].copy()
        """The run's initial key layers: scores measure displacements from here."""
        self.theta = frozen(initial)
        """The published model. Never changed in place."""
        self.anchor = self.theta
        """What the next update to the parent is measured from: work before it has been pushed."""
        self.children = {name: Child() for name in children}
        self.version = 0
        self.base_version = 0
        """The parent's version at the last merge."""
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
        self.in_flight: Update | None = None
        """The update of an exchange that has not come back yet."""
        self.accepted = 0
        self.refused: dict[str, int] = {}
        self._fold: Fold | None = None
        self._held: dict[str, tuple[Update, int]] = {}
        self._waiting: dict[str, int] = {}

    # ---- events ----------------------------------------------------------------------------------------------

    def handle(self, event: Event) -> list[Command]:
        """Take one event and say what is to be done. The only way to change a node."""
        commands: list[Command] = []
        if isinstance(event, Push):
            commands += self._push(event)
        elif isinstance(event, Pull):
            if event.child not in self.children:
                raise MessageError("unknown_sender", f"{self.path} has no child {event.child!r}")
            self._waiting[event.child] = event.started_tokens
        elif isinstance(event, ParentModel):
            commands += self._merge(event)
        elif isinstance(event, Joined):
            child = self.children.setdefault(event.child, Child())
            child.active, child.left, self.ended = True, False, False
        elif isinstance(event, Done | Left):
            if event.child in self.children:
                child = self.children[event.child]
                child.active, child.left = False, isinstance(event, Left)
                self._waiting.pop(event.child, None)
        commands += self._advance(event.now_s)
        return commands

    def use_shared_copy(self, own: Flat, shared: Flat) -> Flat:
        """Use another buffer with the same values in place of one of the node's own.

        A shell that has put the published model, or the update in flight, into shared memory hands the shared
        copy back here, so that the node does not hold a second one.

        Returns:
            The buffer that the node uses from now on.
        """
        view = frozen(shared)
        if self.anchor is own:
            self.anchor = view
        if self.theta is own:
            self.theta = view
        if self.in_flight is not None and self.in_flight.values is own:
            self.in_flight = replace(self.in_flight, values=view)
        return view

    # ---- accepting updates -----------------------------------------------------------------------------------

    def _push(self, event: Push) -> list[Command]:
        try:
            update = unpack_update(event.packed, self.layout)
            if update.sender != event.sender:
                raise MessageError("unknown_sender", f"{event.sender!r} sent an update of {update.sender!r}")
            verdict = self._judge(update)
        except MessageError as error:
            update, verdict = None, self._malformed(event.packed, error)
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
        )
        if update is None or not verdict.accepted:
            self.refused[verdict.reason] = self.refused.get(verdict.reason, 0) + 1
        else:
            self._accept(update, verdict.tau, event.now_s)
        commands: list[Command] = [Answer(child=event.sender, verdict=verdict), Note(record=record)]
        if verdict.accepted and self.aggregation.trigger == "time_up" and self._fold is not None:
            commands.append(Wake(at_s=self._fold.first_s + self.aggregation.time_up_s))
        return commands

    def _judge(self, update: Update) -> Verdict:
        """Decide about a well-formed update, changing nothing."""
        tau = self.version - update.base_version
        child = self.children.get(update.sender)
        rules = self.aggregation
        reason, detail = ACCEPTED, ""
        if child is None or child.left:
            reason, detail = "unknown_sender", f"{self.path} has no child {update.sender!r}"
        elif update.seq <= child.last_seq:
            reason, detail = "duplicate", f"seq {update.seq} after {child.last_seq}"
        elif tau < 0:
            reason, detail = "future_version", f"from version {update.base_version}, this node is at {self.version}"
        elif rules.max_staleness is not None and tau > rules.max_staleness:
            reason, detail = "stale", f"tau {tau} is above max_staleness {rules.max_staleness}: pull again"
        elif update.tokens == 0:
            reason, detail = "malformed", "tokens is 0, expected the tokens that the update was trained on"
        else:
            split = self.layout.backbone_size
            change = squared_norm(update.values[:split])
            if not np.isfinite(change + squared_norm(update.values[split:])):
                reason, detail = "not_finite", "nan or infinity in the values"
            elif rules.max_update_norm is not None and change > rules.max_update_norm**2:
                norm = float(np.sqrt(change))
                reason, detail = "norm_exceeded", f"norm {norm:.4g} is above max_update_norm {rules.max_update_norm:g}"
        return Verdict(
            reason=reason,
            seq=update.seq,
            base_version=update.base_version,
            version=self.version,
            tau=max(tau, 0),
            detail=detail,
        )

    def _malformed(self, packed: Packed, error: MessageError) -> Verdict:
        try:
            fields = read_header(packed.header)
        except MessageError:
            fields = {}
        seq, base = fields.get("seq"), fields.get("base_version")
        return Verdict(
            reason=error.reason,
            seq=seq if isinstance(seq, int) else 0,
            base_version=base if isinstance(base, int) else 0,
            version=self.version,
            tau=0,
            detail=error.detail,
        )

    def _accept(self, update: Update, tau: int, now_s: float) -> None:
        child = self.children[update.sender]
        child.last_seq = update.seq
        child.started_tokens = max(child.started_tokens, update.started_tokens)
        self.accepted += 1
        if not self.synchronous:
            self._fold_in(update, tau, now_s)
            return
        self._held[update.sender] = (update, tau)
        self._fold_held(now_s)

    def _fold_held(self, now_s: float) -> None:
        """Synchronous mode: fold those held updates whose turn has come."""
        for name, child in self.children.items():
            if name in self._held:
                self._fold_in(*self._held.pop(name), now_s)
            elif child.active and not (self._fold and name in self._fold.contributors):
                return

    def _fold_in(self, update: Update, tau: int, now_s: float) -> None:
        if self._fold is None:
            flat = np.zeros(self.layout.size, np.float32)
            keys = OnlineAttention(self.layout.key_layers, flat[self.layout.backbone_size :])
            self._fold = Fold(flat, keys, first_s=now_s)
        fold, split = self._fold, self.layout.backbone_size
        weight = update.tokens * discount(self.aggregation.staleness, tau)
        add_scaled(fold.flat[:split], update.values[:split], weight)
        if self.layout.key_layers:
            keys, layers = update.values[split:], self.layout.key_layers
            fit = scores(self.aggregation.attention, layers, self.theta[split:], keys, self.origin)
            fold.attention.fold(update.sender, keys, with_prior(fit, weight))
        fold.tokens += update.tokens
        fold.contributors.append(update.sender)

    # ---- moving on -------------------------------------------------------------------------------------------

    def _advance(self, now_s: float) -> list[Command]:
        """Whatever the last event has made due."""
        commands: list[Command] = []
        if self._held:
            self._fold_held(now_s)
        if self._due(now_s):
            commands += self._aggregate(now_s)
        if self._exchange_due():
            commands.append(Exchange())
        for name in [name for name in self._waiting if self._may_serve(name)]:
            commands.append(Serve(child=name, model=self._serve(name, now_s)))
        if self._all_ended() and not self.ended:
            self.ended = True
            commands.append(Finish())
        return commands

    def _due(self, now_s: float) -> bool:
        fold, rules = self._fold, self.aggregation
        if fold is None:
            return False
        active = [name for name, child in self.children.items() if child.active]
        if self.synchronous or not active:
            return not self._held and all(name in fold.contributors for name in active)
        if rules.trigger == "goal_achieved":
            return len(fold.contributors) >= rules.buffer_size
        return len(fold.contributors) >= rules.quorum and now_s >= fold.first_s + rules.time_up_s

    def _aggregate(self, now_s: float) -> list[Command]:
        """Make the folded updates the next version (design: sections 4.3 and 4.4)."""
        fold, split = self._fold, self.layout.backbone_size
        if fold is None or fold.tokens <= 0:
            raise AggregationError(f"{self.path}: nothing to aggregate")
        members = sum(not child.left for child in self.children.values())
        absent = max(members - len(set(fold.contributors)), 0)
        weights = self._finish_keys(fold, split, absent)
        # Dividing by the undiscounted weight lets stale updates shorten the step (FedBuff, algorithm 1).
        scale = 1.0 / fold.tokens
        if self.aggregation.server_optimizer.lr is None:
            # Updates that come one by one would otherwise add up to a step as many times too long.
            scale *= 1.0 - absent / max(members, 1)
        norm = self.optimizer.apply(fold.flat[:split], self.theta[:split], scale=scale)
        self.theta, self._fold = frozen(fold.flat), None
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
            commands.append(Note(record=self._attention_record("up", now_s, fold.attention.names, weights)))
        return commands

    def _finish_keys(self, fold: Fold, split: int, absent: int) -> list[list[float]]:
        """Add the node's own key layers as a candidate and normalise; returns the attention weights.

        The node's own key layers stand for the children that are not in this aggregation, with as much weight
        as each of them would have had: alone in a full synchronous round they count for nothing (the blend of
        equal children is their plain mean), and with a buffer of one they keep the others' share.
        """
        if not self.layout.key_layers:
            return []
        mass = fold.tokens / len(fold.contributors) * (absent + self.aggregation.attention.self_weight)
        own = self.theta[split:]
        fit = scores(self.aggregation.attention, self.layout.key_layers, own, own, self.origin)
        fold.attention.fold("(own)", own, with_prior(fit, mass))
        weights = fold.attention.weights()
        fold.attention.result()
        return weights

    def _attention_record(
        self, direction: str, now_s: float, names: list[str], weights: list[list[float]]
    ) -> AttentionRecord:
        return AttentionRecord(
            node=self.path,
            now_s=now_s,
            version=self.version,
            direction=direction,
            layers=tuple(layer.name for layer in self.layout.key_layers),
            candidates=tuple(names),
            weights=tuple(tuple(row) for row in weights),
        )

    # ---- the parent ------------------------------------------------------------------------------------------

    @property
    def exchanging(self) -> bool:
        """Whether an exchange with the parent is under way."""
        return self.in_flight is not None

    def resume(self) -> list[Command]:
        """After `restore`: send an update again whose exchange had not come back (the parent drops duplicates)."""
        return [Exchange()] if self.exchanging else []

    def _exchange_due(self) -> bool:
        if not self.has_parent or self.exchanging or not self.unpushed_aggregations:
            return False
        drained = not any(child.active for child in self.children.values())
        return drained or self.unpushed_aggregations >= self.aggregation.push_every

    def begin_exchange(self) -> Update:
        """The update that an Exchange command asks to send; to be called before the next event.

        Holds all work since the last one. After a restart that lost the answer it is the same update again.
        """
        if self.in_flight is not None:
            return self.in_flight
        split = self.layout.backbone_size
        values = np.empty(self.layout.size, np.float32)
        np.subtract(self.theta[:split], self.anchor[:split], out=values[:split])
        values[split:] = self.theta[split:]
        self.seq += 1
        self.in_flight = Update(
            sender=self.path.rsplit("/", 1)[-1],
            seq=self.seq,
            base_version=self.base_version,
            tokens=self.unpushed_tokens,
            started_tokens=self.started_tokens,
            values=frozen(values),
        )
        self.anchor = self.theta
        self.unpushed_aggregations, self.unpushed_tokens = 0, 0
        return self.in_flight

    def _merge(self, event: ParentModel) -> list[Command]:
        """Move to the parent and keep whatever the children did meanwhile (design: section 4.5)."""
        model, split = event.model, self.layout.backbone_size
        self.in_flight = None
        self.base_version, self.progress = model.version, model.progress
        self.finished = self.finished or model.finished
        self.seq = max(self.seq, model.last_seq)
        if model.version == 0:
            return []  # the parent has aggregated nothing yet: it has nothing to say
        merged = np.zeros(self.layout.size, np.float32)
        if self.anchor is self.theta:
            lerp(self.theta[:split], model.values[:split], self.merge, out=merged[:split])
            anchor = None
        else:
            # theta has moved on since the push: shift it, and what it is measured from, by the same amount.
            anchor = self.anchor.copy()
            lerp(self.anchor[:split], model.values[:split], self.merge, out=anchor[:split])
            np.subtract(anchor[:split], self.anchor[:split], out=merged[:split])
            np.add(merged[:split], self.theta[:split], out=merged[:split])
        commands: list[Command] = []
        if self.layout.key_layers:
            own = self.theta[split:]
            candidates = [("(own)", own, self.mean_tokens), ("(parent)", model.values[split:], model.tokens)]
            rules = self.aggregation.attention
            blend = attend(rules, self.layout.key_layers, own, candidates, self.origin, out=merged[split:])
            weights = blend.weights()
            blend.result()
            commands.append(Note(record=self._attention_record("down", event.now_s, blend.names, weights)))
        self.theta = frozen(merged)
        self.anchor = self.theta if anchor is None else frozen(anchor)
        return commands

    # ---- the children ----------------------------------------------------------------------------------------

    @property
    def started_tokens(self) -> int:
        """Tokens of all local rounds begun below this node."""
        return sum(child.started_tokens for child in self.children.values())

    def _may_serve(self, name: str) -> bool:
        """Synchronous children wait until their last update is in a version and that version is exchanged."""
        if not self.synchronous:
            return True
        contributed = name in self._held or (self._fold is not None and name in self._fold.contributors)
        return not contributed and not self.exchanging

    def _serve(self, name: str, now_s: float) -> Model:
        child, started = self.children[name], self._waiting.pop(name)
        if not self.has_parent and not self.synchronous:
            # In synchronous mode this is settled once per version instead, so that all children hear the same.
            self._spend(now_s)
        if not self.finished:
            child.started_tokens = max(child.started_tokens, started)
        return self.model(name)

    def model(self, child: str) -> Model:
        """The published model as this child would get it."""
        known = self.children.get(child, Child())
        return Model(
            version=self.version,
            progress=self.progress,
            finished=self.finished,
            tokens=self.mean_tokens,
            last_seq=known.last_seq,
            values=self.theta,
        )

    def _spend(self, now_s: float) -> None:
        """The world alone: how much of the budget is spent, and whether new rounds may begin."""
        if self.budget.tokens is not None:
            self.progress = min(self.tokens / self.budget.tokens, 1.0)
            self.finished = self.started_tokens >= self.budget.tokens
        elif self.budget.seconds is not None:
            self.progress = min(now_s / self.budget.seconds, 1.0)
            self.finished = now_s >= self.budget.seconds

    def _all_ended(self) -> bool:
        idle = self._fold is None and not self._held and not self.exchanging
        passed_on = not self.has_parent or not self.unpushed_aggregations
        return idle and passed_on and not any(child.active for child in self.children.values())

    # ---- durability ------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Any], dict[str, Flat]]:
        """Everything that a restart needs: plain values, and buffers that must be written before the next event."""
        arrays = {"theta": self.theta, **{f"optimizer.{k}": v for k, v in self.optimizer.buffers.items()}}
        if self.anchor is not self.theta:
            arrays["anchor"] = self.anchor
        meta: dict[str, Any] = {name: getattr(self, name) for name in _STATE}
        meta["children"] = {name: vars(child).copy() for name, child in self.children.items()}
        meta["layout"] = self.layout.hash
        if self._fold is not None:
            arrays["fold"] = self._fold.flat
            meta["fold"] = {
                "tokens": self._fold.tokens,
                "contributors": list(self._fold.contributors),
                "first_s": self._fold.first_s,
                "maximum": list(self._fold.attention.maximum),
                "total": list(self._fold.attention.total),
                "names": list(self._fold.attention.names),
                "logits": [list(row) for row in self._fold.attention.logits],
            }
        meta["held"] = {}
        for name, (update, tau) in self._held.items():
            arrays[f"held.{name}"] = update.values
            meta["held"][name] = {"update": _fields(update), "tau": tau}
        if self.in_flight is not None:
            arrays["in_flight"], meta["in_flight"] = self.in_flight.values, _fields(self.in_flight)
        return meta, arrays

    def restore(self, meta: dict[str, Any], arrays: dict[str, Flat]) -> None:
        """Become what `state` described. Call `resume` next.

        Raises:
            CheckpointError: the checkpoint is of another model.
        """
        if meta["layout"] != self.layout.hash:
            raise CheckpointError(f"{self.path}: the checkpoint is of another model or another choice of key layers")
        for name in _STATE:
            setattr(self, name, meta[name])
        self.ended = False
        for name, fields in meta["children"].items():
            self.children[name] = Child(**fields)
        self.theta = frozen(arrays["theta"])
        self.anchor = frozen(arrays["anchor"]) if "anchor" in arrays else self.theta
        for name in self.optimizer.buffers:
            self.optimizer.buffers[name] = np.array(arrays[f"optimizer.{name}"])
        self._fold, self._held, self._waiting, self.in_flight = None, {}, {}, None
        if "in_flight" in meta:
            self.in_flight = Update(**meta["in_flight"], values=arrays["in_flight"])
        if "fold" in meta:
            saved, flat = meta["fold"], np.array(arrays["fold"])
            keys = OnlineAttention(self.layout.key_layers, flat[self.layout.backbone_size :])
            keys.maximum, keys.total = saved["maximum"], saved["total"]
            keys.names, keys.logits = saved["names"], saved["logits"]
            self._fold = Fold(flat, keys, saved["tokens"], saved["contributors"], saved["first_s"])
        for name, entry in meta["held"].items():
            self._held[name] = (Update(**entry["update"], values=arrays[f"held.{name}"]), entry["tau"])


_STATE = (
    "version",
    "base_version",
    "seq",
    "tokens",
    "mean_tokens",
    "unpushed_aggregations",
    "unpushed_tokens",
    "progress",
    "finished",
    "accepted",
    "refused",
)


def _fields(update: Update) -> dict[str, Any]:
    return {key: value for key, value in vars(update).items() if key != "values"}
