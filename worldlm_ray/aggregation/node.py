"""The state machine of an inner node: one for the world and for every federation, at any depth.

`Node.handle(event)` returns commands for a backend to carry out. A node has no clock, does no input or output and
knows nothing of Ray: time comes in with the events, and both backends (actors on Ray, the simulator) drive the
same machine. The world is a node without a parent. Events and commands: worldlm_ray/aggregation/events.py.

    children.py          what it knows of its children
    intake.py            updates on their way into the next version
    serving.py           which children get the model, and with what
    published.py         the model, and the buffers that models and updates lie in
    residuals.py         key layers that fit elsewhere better
    parent_exchange.py   what it sends to its parent, and takes from it
    budget.py            what may still be trained
    node_checkpoint.py   all of this as plain values and buffers

It holds at least two buffers and the optimizer's state; node_memory.py knows what a federation and other rules hold.
The published model never changes in place, so that children, a push in flight and a checkpoint can share it. The other
buffer takes the folded updates and then *becomes* the next published model. A refused update touches neither.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from worldlm_ray.aggregation import node_checkpoint
from worldlm_ray.aggregation.admission import check_plain
from worldlm_ray.aggregation.budget import Budget, PrivacyBudget
from worldlm_ray.aggregation.children import Children, Status
from worldlm_ray.aggregation.events import (
    Admit,
    Answered,
    BackendEvent,
    ChildEvent,
    ChildMessage,
    Clock,
    Command,
    Covered,
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
    Saved,
    Saving,
    Send,
    Shared,
    Started,
    UpdateDue,
    UpdateSent,
    Welcomed,
)
from worldlm_ray.aggregation.intake import Intake, records_of
from worldlm_ray.aggregation.node_setup import NodePlace, NodeRules
from worldlm_ray.aggregation.parent_exchange import ParentExchange
from worldlm_ray.aggregation.private_fold import ClientPrivacy
from worldlm_ray.aggregation.published import Published
from worldlm_ray.aggregation.residuals import Pool
from worldlm_ray.aggregation.server_optimizer import ServerOptimizer
from worldlm_ray.aggregation.serving import Serving
from worldlm_ray.aggregation.sums import Sums
from worldlm_ray.errors import AggregationError
from worldlm_ray.exchange.messages import Update
from worldlm_ray.exchange.outbox import KeptUpdates
from worldlm_ray.exchange.quota import Quotas
from worldlm_ray.tensors.buffers import Flat, frozen
from worldlm_ray.tensors.layout import Layout


class Node:
    """An inner node of the tree.

    Args:
        place: where it stands.
        rules: how it works.
        layout: the model's layout.
        initial: the run's initial parameters [layout.size]; not copied, must not change.
        privacy: what the clients directly below are promised; None for nothing.
        contributions: how often each of them has contributed, by its ledger.
        quotas: what the node and its children may claim; no limits without.
    """

    def __init__(
        self,
        place: NodePlace,
        rules: NodeRules,
        layout: Layout,
        initial: Flat,
        *,
        privacy: ClientPrivacy | None = None,
        contributions: Mapping[str, int] | None = None,
        quotas: Quotas | None = None,
    ) -> None:
        self.path, self.rules, self.layout = place.path, rules, layout
        self.incarnation = 1
        """How often this node has been started."""
        sums = Sums(layout.size) if rules.aggregation.rule == "sums" else None
        self.published = Published(initial, sums=sums)
        self.children = Children(place, liveness=rules.liveness, quotas=quotas)
        self.privacy = PrivacyBudget(place.path, privacy, contributions)
        self.budget = Budget(rules.budget)
        self.optimizer = ServerOptimizer(rules.aggregation.server_optimizer, layout.backbone_size)
        origin, is_private = initial[layout.backbone_size :].copy(), privacy is not None
        self.residuals = Pool(place.path, rules.aggregation, layout, origin=origin, private=is_private)
        self.intake = Intake(
            rules,
            layout,
            published=self.published,
            children=self.children,
            residuals=self.residuals,
            privacy=self.privacy,
            origin=origin,
        )
        self.serving = Serving(
            place.min_clients,
            published=self.published,
            intake=self.intake,
            children=self.children,
            residuals=self.residuals,
            budget=self.budget,
            privacy=self.privacy,
        )
        self.parent: ParentExchange | None = None
        """None at the world."""
        if place.has_parent:
            quota = None if quotas is None else quotas.own
            self.parent = ParentExchange(place, rules, layout, initial, published=self.published, quota=quota)
        self.ended = False
        """Whether everything below has ended and nothing is left to pass on."""
        self.now_s = 0.0
        """Run time of its newest event. It never goes back: neither a budget nor a silence has a negative length."""

    # ---- what may be asked -----------------------------------------------------------------------------------

    @property
    def theta(self) -> Flat:
        """The published model. Never changed in place."""
        return self.published.theta

    @property
    def version(self) -> int:
        """Of the published model."""
        return self.published.version

    @property
    def synchronous(self) -> bool:
        """Whether its children wait for each other."""
        return self.intake.synchronous

    @property
    def started_tokens(self) -> int:
        """Tokens of all local rounds begun below this node."""
        return self.children.started_tokens

    @property
    def to_parent(self) -> ParentExchange:
        """The exchange of a node that has a parent.

        Raises:
            AggregationError: it has none.
        """
        if self.parent is None:
            raise AggregationError(f"{self.path} has no parent")
        return self.parent

    @property
    def seq(self) -> int:
        """Of its newest update for its parent."""
        return 0 if self.parent is None else self.parent.seq

    @property
    def outbox(self) -> KeptUpdates:
        """What its parent has not made durable yet."""
        return self.to_parent.outbox

    @property
    def in_flight(self) -> Update | None:
        """The update of an exchange that has not come back yet."""
        return None if self.parent is None else self.parent.in_flight

    @property
    def is_sent(self) -> bool:
        """Whether that update is on its way: the parent may have it."""
        return self.parent is not None and self.parent.in_flight is not None and self.parent.is_sent

    @property
    def wants_refresh(self) -> bool:
        """Whether its children wait until it has heard its parent."""
        return self.parent is not None and self.parent.wants_refresh

    @property
    def may_send(self) -> bool:
        """Whether a checkpoint knows the update in flight."""
        return self.parent is not None and self.parent.may_send

    @property
    def _awaits_model(self) -> bool:
        return self.parent is not None and self.parent.awaits_model

    # ---- events ----------------------------------------------------------------------------------------------

    def handle(self, event: Event) -> list[Command]:
        """Take one event and return the commands for the backend: the only way to change a node but `restore`.

        Raises:
            MessageError: malformed, unknown_sender, superseded, restarted or implausible_incarnation: the event
                changes nothing. (A push of which the header can be read is answered.)
            AggregationError: the event is of an exchange that this node does not have.
        """
        if isinstance(event, BackendEvent):
            return self._note(event)
        check_plain(event)
        if self.now_s < event.now_s < math.inf:
            self.now_s = event.now_s
        elif event.now_s != self.now_s:  # of a clock that is behind the one that this node's last life was told
            event = replace(event, now_s=self.now_s)
        if isinstance(event, ChildMessage):
            self.children.check(event.child, event.incarnation, to=event.to, here=self.incarnation)
        elif isinstance(event, Joined):
            self.children.check_join(event)
        commands = self._hear(event)
        if isinstance(event, Push):
            commands += self.intake.push(event, here=self.incarnation)
        elif isinstance(event, Clock):
            commands += [Note(record=record) for record in self.children.look_for_silence(event.now_s)]
        elif isinstance(event, Pull):
            self.serving.pull(event)
        elif isinstance(event, ParentModel):
            commands += self.to_parent.take(event, budget=self.budget)
        elif isinstance(event, Joined):
            commands += self._join(event)
        elif isinstance(event, Done | Left) and event.child in self.children:
            commands += self._end(event)
        return commands + self._advance(event.now_s)

    def _note(self, event: BackendEvent) -> list[Command]:
        """What the backend has done, or has heard of the parent. Nothing becomes due by it."""
        if isinstance(event, Started):
            self.incarnation = event.incarnation
            return self._resume()
        if isinstance(event, UpdateDue):
            return [Send(update=self.to_parent.begin(self.children, self.residuals))]
        if isinstance(event, UpdateSent):
            self.to_parent.sent()
        elif isinstance(event, Welcomed):
            self.to_parent.welcomed(event.welcome)
        elif isinstance(event, Answered):
            self.to_parent.answered(event.seq, event.verdict)
        elif isinstance(event, Saving):
            self.published.retire_buffer()
        elif isinstance(event, Saved):
            self.children.saved(event.covered)
            if self.parent is not None:
                self.parent.covered(event.covered.seq)
        elif isinstance(event, Shared):
            view = frozen(event.copy)
            if self.parent is not None:
                self.parent.use_shared_buffer(event.own, view)
            self.published.use_shared_copy(event.own, view)
        return []

    def _hear(self, event: ChildEvent) -> list[Command]:
        """A child lives, whatever it says."""
        if not isinstance(event, Push | Pull | Heartbeat | Joined):
            return []
        back = self.children.hear(event.sender if isinstance(event, Push) else event.child, event.now_s)
        if back is None:
            return []
        self.ended = False
        return [Note(record=back)]

    def _join(self, event: Joined) -> list[Command]:
        commands: list[Command] = []
        known = self.children.get(event.child)
        comes = known is None or known.status in (Status.EXPECTED, Status.LEFT)
        if comes and self.parent is not None and not self.children.any_active and not self._awaits_model:
            self.parent.wants_refresh = True  # while no child was here, the node has not asked its parent
            commands.append(Refresh())
        child, self.ended = self.children.join(event), False
        self.serving.forget(event.child)  # a life before this one asked, or this one will ask again
        forgot = event.seq < child.last_seq  # it comes from a checkpoint, and what it kept since is gone
        if forgot and child.durable_seq < child.last_seq:
            commands.append(Save())
        return [Admit(welcome=self.children.welcome(event.child, here=self.incarnation)), *commands]

    def _end(self, event: Done | Left) -> list[Command]:
        """A child will train no more, or has left."""
        has_left = isinstance(event, Left)
        self.children.set_status(event.child, Status.LEFT if has_left else Status.DONE)
        self.serving.forget(event.child)
        # A child that has left will not be there to say it again, or to send what is in memory alone.
        return [Save()] if has_left and not self.children[event.child].left_durable else []

    def _resume(self) -> list[Command]:
        """What is due before the first event.

        An update is sent again whose exchange had not come back: the parent drops duplicates.
        """
        commands = self.intake.pay_again()
        if self.parent is not None and self.parent.is_open:
            commands.append(Exchange())
        elif self.wants_refresh:
            commands.append(Refresh())
        return commands + self.intake.wake()

    # ---- moving on -------------------------------------------------------------------------------------------

    def _advance(self, now_s: float) -> list[Command]:
        """Whatever the last event has made due."""
        commands: list[Command] = []
        self.intake.fold_held(now_s)
        if self.intake.is_due(now_s):
            commands += self._aggregate(now_s)
        if self.parent is not None and self.parent.is_due(any_active=self.children.any_active):
            commands += [*self.parent.ask(now_s), Exchange()]
        exchanging = self.parent is not None and self.parent.is_open
        for name in self.serving.ready(exchanging=exchanging, wants_refresh=self.wants_refresh):
            if self.parent is None and not self.synchronous:
                # In synchronous mode this is settled once per version instead, so that all children hear the same.
                self._spend(now_s)
            commands += self.serving.serve(name, incarnation=self.incarnation, now_s=now_s)
        if self._all_ended() and not self.ended:
            self.ended = True
            commands.append(Finish())
        return commands

    def _aggregate(self, now_s: float) -> list[Command]:
        """Make the folded updates the next version."""
        fold, before = self.intake.close(), self.theta
        absent = self.children.absent(fold.contributors, scored=bool(self.layout.key_layers))
        flat, norm, weights = fold.finish(before, self.optimizer, absent=absent)
        self.published.publish(flat, keep_old=self.parent is not None and self.parent.anchor is before)
        self.residuals.settle()
        self.published.aggregated(fold.tokens, len(fold.contributors))
        if self.parent is None:
            self._spend(now_s)
        else:
            self.parent.aggregated(fold.tokens)
        return [Note(record=record) for record in records_of(fold, self.intake, norm, weights, now_s=now_s)]

    def _spend(self, now_s: float) -> None:
        self.budget.spend(tokens=self.published.tokens, started_tokens=self.started_tokens, now_s=now_s)

    def _all_ended(self) -> bool:
        passed_on = self.parent is None or not (self.parent.unpushed_aggregations or self.parent.awaits_model)
        return passed_on and self.intake.is_empty and not (self.children.any_active or self.children.any_expected)

    # ---- durability ------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Any], dict[str, Flat]]:
        """Everything that a restart needs: plain values, and buffers. Later events use them again: see Saving."""
        return node_checkpoint.state(self)

    def covers(self) -> Covered:
        """What a checkpoint of the state as it is now would know."""
        return self.children.covers(self.seq)

    def restore(self, meta: dict[str, Any], arrays: dict[str, Flat]) -> None:
        """Become what `state` described. A Started event comes next.

        Raises:
            CheckpointError: the checkpoint is of another model.
            PrivacyError: a ledger has lost what the checkpoint knows.
        """
        node_checkpoint.restore(self, meta, arrays)
