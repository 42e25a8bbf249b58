"""A node's exchange with its parent: what it sends, what it takes, and what of either is still under way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from worldlm_ray.aggregation.budget import Budget
from worldlm_ray.aggregation.children import Children
from worldlm_ray.aggregation.events import Command, Note, ParentModel
from worldlm_ray.aggregation.merge import Merger
from worldlm_ray.aggregation.node_setup import NodePlace, NodeRules
from worldlm_ray.aggregation.own_part import OwnPart
from worldlm_ray.aggregation.published import Published
from worldlm_ray.aggregation.residuals import Pool
from worldlm_ray.errors import AggregationError
from worldlm_ray.exchange.link import ParentLink
from worldlm_ray.exchange.messages import Model, Update
from worldlm_ray.exchange.quota import Quota
from worldlm_ray.exchange.replies import Verdict, Welcome
from worldlm_ray.records import LifeRecord, MergeRecord
from worldlm_ray.tensors.buffers import Flat, frozen
from worldlm_ray.tensors.layout import Layout


class ParentExchange(ParentLink):
    """The link of an inner node to its parent: when an exchange is due, and how the parent's model is merged.

    Args:
        place: the node's place.
        rules: how it merges, and its codec.
        layout: the model's layout.
        initial: the run's initial parameters.
        published: the node's model.
        quota: what the node may claim; None without a limit.
    """

    def __init__(
        self,
        place: NodePlace,
        rules: NodeRules,
        layout: Layout,
        initial: Flat,
        *,
        published: Published,
        quota: Quota | None,
    ) -> None:
        max_step = rules.merge.max_model_step
        super().__init__(place.path, layout, codec=rules.codec, max_step=max_step, anchor=published.theta)
        self.place, self.rules, self.published, self.quota = place, rules, published, quota
        self.own_part = None if published.sums is None else OwnPart(layout.size)
        """What the parent's sums hold of this node, where both keep sums."""
        self.merger = Merger(path=place.path, layout=layout, rules=rules.aggregation, initial=initial)
        self.unpushed_aggregations = 0
        self.unpushed_tokens = 0
        self.is_sent = False
        """Whether the update in flight is on its way: the parent may have it."""
        self._covered_seq = 0
        """The newest of its updates that a checkpoint knows."""
        self._is_asked = False
        """Whether a command has asked for an exchange that has not begun."""
        self.wants_refresh = False
        """Whether the children wait until the node has heard its parent: the first of them to be there has come."""

    # ---- when ------------------------------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """Whether an exchange is under way, from the command on."""
        return self._is_asked or self.in_flight is not None

    @property
    def awaits_model(self) -> bool:
        """Whether the parent's model is on its way."""
        return self.is_open or self.wants_refresh

    def aggregated(self, tokens: int) -> None:
        """Count an aggregation for the next update."""
        self.unpushed_aggregations += 1
        self.unpushed_tokens += tokens

    def is_due(self, *, any_active: bool) -> bool:
        """Whether an exchange should begin; without active children nothing more will gather."""
        if self.awaits_model or not self.unpushed_aggregations:
            return False
        return not any_active or self.unpushed_aggregations >= self.rules.aggregation.push_every

    def ask(self, now_s: float) -> list[Command]:
        """Note that an exchange is asked for; warn where the next update cannot claim all tokens that have gathered."""
        self._is_asked = True
        if self.quota is None or self.unpushed_tokens <= self.quota.update_tokens:
            return []
        most, gathered = self.quota.update_tokens, self.unpushed_tokens
        said = f"{gathered} tokens have gathered for one update, which may claim {most}: the rest goes with the next"
        return [Note(record=LifeRecord(node=self.place.path, now_s=now_s, event="warning", detail=said))]

    # ---- up --------------------------------------------------------------------------------------------------

    def begin(self, children: Children, residuals: Pool) -> Update:
        """Begin the exchange that was asked for: the update holds all work since the last one.

        After a restart that lost the answer it is the same update again.

        Args:
            children: they say how many tokens have been begun.
            residuals: those that fitted no child go along.
        """
        self._is_asked = False
        if self.in_flight is not None:
            return self.in_flight
        self.is_sent = False
        theta, gathered = self.published.theta, self.unpushed_tokens
        tokens = gathered if self.quota is None else min(gathered, self.quota.update_tokens)
        if self.own_part is not None:
            self.in_flight = self._change_of_part(self.own_part, tokens=tokens, started=children.started_tokens)
        else:
            self.in_flight = self.make_update(
                theta,
                out=self.published.update_buffer(),
                tokens=tokens,
                started_tokens=children.started_tokens,
                residuals=residuals.rise(),
            )
        self.anchor = theta  # the next update measures from here
        self.unpushed_aggregations, self.unpushed_tokens = 0, gathered - tokens
        return self.in_flight

    def _change_of_part(self, part: OwnPart, *, tokens: int, started: int) -> Update:
        """The update by which the parent's sums come to hold what this node's do."""
        sums, out = self.published.sums, self.published.update_buffer()
        assert sums is not None, "a node without sums has no part in its parent's"
        fields = part.change(sums.total, sums.newest_weight, out=out)
        return part.sent(self.update_of(out, tokens=tokens, started_tokens=started, **fields))

    def welcomed(self, welcome: Welcome) -> None:
        """See ParentLink."""
        super().welcomed(welcome)
        if self.own_part is not None:
            self.own_part.welcomed(welcome.last_seq)

    def answered(self, seq: int, verdict: Verdict) -> None:
        """See ParentLink."""
        super().answered(seq, verdict)
        if self.own_part is not None:
            self.own_part.answered(seq, verdict)

    @property
    def may_send(self) -> bool:
        """Whether a checkpoint knows the update in flight.

        Not before may the parent have it: a node that dies and does not know what it has sent would take its children's
        updates, which they send again, for new, and send them on a second time.
        """
        return self.in_flight is not None and self._covered_seq >= self.in_flight.seq

    def sent(self) -> None:
        """The update in flight is sent now.

        Raises:
            AggregationError: there is none.
        """
        if self.in_flight is None:
            raise AggregationError(f"{self.place.path}: there is no update to send")
        self.is_sent = True
        self.keep(self.in_flight)

    def covered(self, seq: int) -> None:
        """A checkpoint knows the updates up to this one."""
        self._covered_seq = max(self._covered_seq, seq)

    def use_shared_buffer(self, own: Flat, shared: Flat) -> None:
        """Use another buffer with the same values in place of one of the node's own."""
        if self.anchor is own:
            self.anchor = shared
        if self.in_flight is not None and self.in_flight.values is own:
            self.use_shared_copy(replace(self.in_flight, values=shared))

    # ---- down ------------------------------------------------------------------------------------------------

    def take(self, event: ParentModel, *, budget: Budget) -> list[Command]:
        """Move to the parent and keep whatever the children did meanwhile.

        A model that is refused ends the exchange all the same: the node goes on with its own, and asks again after the
        next aggregation. What was pushed is measured from, as always.
        """
        is_newcomer = self.wants_refresh and self.published.version == 0
        own = None if is_newcomer else self.published.theta
        model, doubts = self.look_at(event.model, own=own, now_s=event.now_s)
        notes: list[Command] = [Note(record=doubt) for doubt in doubts]
        pushed, self.wants_refresh = self.end_exchange(), False
        notes += self._count_on(self.gate.last_seq, event.now_s)
        if model is None:
            budget.finished = event.model.finished if isinstance(event.model, Model) else budget.finished
            if pushed is not None:
                self.refused()
            return notes
        budget.progress, budget.finished = model.progress, model.finished
        self.heard(model)
        if model.version == 0:
            return notes  # the parent has aggregated nothing yet: it has nothing to say
        if self.own_part is not None and self.published.sums is not None:
            # The model stays the mean of this node's children: what lies beyond is passed on beside it.
            self.published.sums.heard(*self.own_part.rest(model, beyond=True))
            return notes
        if is_newcomer:
            self._begin_from(model)
            return notes
        return notes + self._merge(model, now_s=event.now_s)

    def _merge(self, model: Model, *, now_s: float) -> list[Command]:
        m = self.rules.merge.federation
        theta, merged = self.published.theta, self.published.buffer()
        anchor = self.merger.backbone(m, theta, self.anchor, model, out=merged)
        own_tokens = self.published.mean_tokens
        record = self.merger.keys(theta, self.anchor, model, own_tokens=own_tokens, now_s=now_s, out=merged)
        self.published.publish(merged, keep_old=True)
        self.anchor = self.published.theta if anchor is None else frozen(anchor)
        followed = MergeRecord(node=self.place.path, now_s=now_s, version=model.version, m=float(m))
        notes: list[Command] = [Note(record=followed)]
        return notes if record is None else [*notes, Note(record=record)]

    def _count_on(self, last_seq: int, now_s: float) -> list[Command]:
        """Count on from what the parent knows, though its model be refused: it drops the numbers that it has seen."""
        forgotten = last_seq - self.seq
        if forgotten <= 0:
            return []
        self.seq = last_seq
        # They were sent without a checkpoint.
        said = f"has forgotten {forgotten} of its updates: what its children send again counts twice above it"
        return [Note(record=LifeRecord(node=self.place.path, now_s=now_s, event="warning", detail=said))]

    def _begin_from(self, model: Model) -> None:
        """A newcomer has nothing of its own to keep. The parent's model is its first version: its children take it."""
        values = self.published.buffer()
        np.copyto(values, model.values)
        self.published.publish(values, keep_old=True)
        self.anchor = self.published.theta
        self.published.version = 1

    # ---- durability ------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Any], dict[str, Flat]]:
        """What a restart needs."""
        meta, arrays = super().state()
        meta |= {name: getattr(self, name) for name in _STATE}
        if self.own_part is not None:
            meta["own_part"], found = self.own_part.state()
            arrays |= found
        if self.anchor is self.published.theta:
            del arrays["anchor"]
        return meta, arrays

    def restore(self, meta: dict[str, Any], arrays: dict[str, Flat], *, most_tokens: int | None = None) -> None:
        """Become what `state` described; the published model is restored before."""
        quota = most_tokens if self.quota is None else self.quota.update_tokens
        super().restore(meta, arrays, most_tokens=quota)
        for name in _STATE:
            setattr(self, name, meta[name])
        if self.own_part is not None:
            self.own_part.restore(meta["own_part"], arrays)
        self.anchor = frozen(arrays["anchor"]) if "anchor" in arrays else self.published.theta
        self.is_sent, self._covered_seq = False, self.seq


_STATE = ("unpushed_aggregations", "unpushed_tokens", "wants_refresh")
