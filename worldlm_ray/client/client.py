"""A leaf of the tree: a text, a model, the local rounds that train it, and the exchange with the parent.

A client does not know what drives it: its life (worldlm_ray/protocol/life.py) calls, in turn, `begin` (merge the
parent's model), `train`, `measure` and `update` (what to push).

    measure.py         the text, the model, and what the model is worth
    rounds.py          local rounds
    best.py            the model of the best round
    own_model.py       the choice of the own model, of a client of two models
    two_models.py      what becomes of the two when the parent's model comes
    experts.py         a client that mixes adapters of others with its own
    following.py       a client that is paused
    received.py        what a client of a smaller rank takes of a parent's model
    above.py           when it measures the models of the nodes above
    shared.py          many clients in one process
    client.py          the exchange with the parent
    checkpointing.py   what of all that a checkpoint holds

Where exchange and training overlap (`exchange.overlap`), a round after the first starts with `begin_ahead`, from the
client's own model, while the last update is on its way up and the parent's model on its way down. That model is taken
by `merge` between two steps of the round, and what has been trained since the push is kept, as at an inner node
(worldlm_ray/aggregation/merge.py): `anchor` is the model that was pushed, moved with the parent since.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from worldlm_ray.aggregation.merge import Merger
from worldlm_ray.client import checkpointing, following, received, two_models
from worldlm_ray.client.experts import ClientExperts
from worldlm_ray.client.own_model import OwnModel
from worldlm_ray.client.rounds import LocalRounds
from worldlm_ray.data import Dataset
from worldlm_ray.errors import MessageError
from worldlm_ray.exchange.link import ParentLink
from worldlm_ray.exchange.messages import Model, Pulled, Update
from worldlm_ray.exchange.outbox import Outbox
from worldlm_ray.exchange.replies import Verdict, Welcome
from worldlm_ray.plan import build
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.tree import NodeSpec
from worldlm_ray.privacy.account import Account
from worldlm_ray.records import MergeRecord, Record
from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.training.trainer import Trainer


class Client(LocalRounds):
    """One client.

    Args:
        plan: the run.
        spec: this client's node.
        initial: the run's initial parameters [layout.size]; not copied, must not change. Computed or read unless given.
        dataset: its text; read and cached on this machine unless given.
        make_trainer: makes what trains the model, given the client's account; one in this process unless given.
    """

    def __init__(
        self,
        plan: Plan,
        spec: NodeSpec,
        *,
        initial: Flat | None = None,
        dataset: Dataset | None = None,
        make_trainer: Callable[[Account | None], Trainer] | None = None,
    ) -> None:
        super().__init__(plan, spec, dataset=dataset, make_trainer=make_trainer)
        initial = build.initial(plan) if initial is None else initial
        self.rank = plan.smaller_rank(spec)
        """Of its adapters, where it is smaller than the run's; no model that it holds has anything beyond it."""
        initial = initial if self.rank is None else self.rank.within(initial)
        self.link = ParentLink(
            spec.path,
            plan.layout,
            codec=spec.settings.exchange.codec,
            max_step=spec.settings.merge.max_model_step,
            anchor=np.array(initial),
        )
        """What it knows of the link to its parent. `anchor` is the merged model that the current local round began
        from. Where a round begins ahead of an exchange: the model that was pushed, moved with the parent since."""
        self.trainer.write(initial)
        experts = plan.config.model.lora.experts
        self.experts = None if experts == "none" else ClientExperts(self, experts)
        """What exchanges its own adapter for those of others; None of a client of one adapter."""
        chooses = spec.settings.merge.client == "validated" and self.has_validation
        self.own_model = OwnModel(self._loss_to_serve_by, screen=self._loss_to_choose_by) if chooses else None
        """What chooses its own model; None of a client that has one model, and of one that promises privacy."""
        self.merger = Merger(path=spec.path, layout=plan.layout, rules=spec.settings.aggregation, initial=initial)
        self.incarnation = 1
        """How often this client has been started: for the backend to set."""
        self.start_over = False
        """Whether the next pull replaces the model and the optimizer's state."""
        self.at_home = False
        """Whether the round under way is one of fine-tuning, which nothing is pushed of (`merge.fine_tune`)."""

    @property
    def seq(self) -> int:
        """Of its newest update."""
        return self.link.seq

    @property
    def outbox(self) -> Outbox:
        """What the parent has not made durable yet."""
        return self.link.outbox

    @property
    def in_flight(self) -> Update | None:
        """The update of an exchange that a round has begun ahead of; None once it has come back."""
        return self.link.in_flight

    @property
    def base_version(self) -> int:
        """The parent's version at the last merge."""
        return self.link.base_version

    @property
    def overlaps(self) -> bool:
        """Whether rounds begin before the exchange of the one before has come back."""
        return self.spec.settings.exchange.overlap

    def _loss_to_serve_by(self, values: Flat) -> float:
        return self.validate(self.plan.config.evaluation.validation_tokens, parameters=values)

    def _loss_to_choose_by(self, values: Flat) -> float:
        return self.validate(self.plan.config.evaluation.round_validation_tokens, parameters=values)

    def welcomed(self, welcome: Welcome) -> None:
        """The parent is there, perhaps again.

        Rounds that the parent has accepted since the checkpoint that this client came back from are counted. Every
        push is one round. Without this a restarted client would train and push them again, and they would count twice.
        """
        missed = welcome.last_seq - self.seq
        if missed > 0:
            self.round += missed - self.is_whole  # one that only waited for its exchange is counted already
            self.began, self.step = False, 0
            self.link.seq, self.link.in_flight = welcome.last_seq, None
            self.steps = self.round * self.training.local_steps
            self.tokens = self.round * self.round_tokens
        self.link.welcomed(welcome)
        if self.experts is not None:
            self.experts.own_part.welcomed(welcome.last_seq)

    def answered(self, seq: int, verdict: Verdict) -> None:
        """The parent's verdict on an update. A model that has diverged is given up for the parent's."""
        self.link.answered(seq, verdict)
        if self.experts is not None:
            self.experts.own_part.answered(seq, verdict)
        self.start_over = self.start_over or verdict.reason in ("not_finite", "norm_exceeded")

    def begin(self, model: Pulled, *, now_s: float) -> list[Record]:
        """Merge the parent's model and begin a local round from the result.

        A model that is refused or could not be read changes nothing: the round begins from the client's own.

        A private client pays for the round first. If its budget does not hold it, since another client with the same
        text has spent it meanwhile, no round begins and `began` stays False.

        Returns:
            What tracking is told: how far the client followed, and the attention weights of the key layers.

        Raises:
            PrivacyError: the ledger is damaged or cannot be written.
        """
        if not self._pay():
            return []
        self.paused = False
        if self.own_model is not None:
            self.own_model.served = None
        taken, records = self._let_in(model, now_s=now_s)
        if taken is None:
            self._keep_own()
            return records
        records += self._take(taken, now_s=now_s)
        self._start()
        return records

    def _let_in(self, model: Pulled, *, now_s: float) -> tuple[Model | None, list[Record]]:
        """The parent's model, unless it is refused, and what tracking is told of that."""
        newcomer = self.start_over or self.round == 0
        own = None if newcomer or self.link.gate.max_step is None else self.trainer.read()
        taken, warnings = self.link.look_at(received.of_rank(model, self.rank), own=own, now_s=now_s)
        return taken, [*warnings]

    def _keep_own(self) -> None:
        """Begin a round from the client's own model, of which all that an update could carry is in an update."""
        if self.link.end_exchange() is None:
            self._read_pushed(self.link.anchor)
        self.link.refused()
        self._start()

    def _read_pushed(self, out: Flat | None = None) -> Flat:
        """The model whose change is pushed: a copy, into `out` if given."""
        beside = self.link.unchanged() if self.at_home else self.trainer.beside()
        if beside is None:
            return self.trainer.read(out)
        if out is None:
            return beside
        np.copyto(out, beside)
        return out

    def begin_ahead(self) -> None:
        """Begin a local round from the client's own model, while its last update is in flight.

        A private client pays first, as in `begin`, and with its errors.
        """
        if self._pay():
            self.progress += self._world_progress(self.training.local_steps)  # the parent spoke of the round before
            self._start()

    def merge(self, model: Pulled, *, now_s: float) -> list[Record]:
        """Take the model that an exchange has brought, between two steps of a round (or after the last).

        A model that is refused changes nothing, as in `begin`.

        If the update was refused because the model has diverged, so has what was trained since: the round is given up,
        and `began` is False.

        Returns:
            What tracking is told, as by `begin`.
        """
        if self.start_over:
            self._give_up()
        taken, records = self._let_in(model, now_s=now_s)
        if taken is None:
            self.link.end_exchange()
            self.link.refused()
            return records
        records += self._take(taken, now_s=now_s)
        self.progress -= self._world_progress(self.step)  # the parent speaks of now, `_rate` counts from the first step
        return records

    def _take(self, model: Model, *, now_s: float) -> list[Record]:
        """Merge the parent's model, and keep what was trained since the push."""
        records: list[Record] = []
        pushed = self.link.end_exchange()
        self.progress = model.progress
        if self.experts is not None:
            model = self.experts.take(model)
        if self.start_over or (model.version > 0 and self.round == 0):
            # A newcomer has nothing of its own to keep, and one that has diverged nothing worth keeping.
            self.link.anchor[:] = model.values
            self.trainer.write(self.link.anchor)
            if self.start_over:
                self.trainer.forget()
                self.start_over = False
        elif model.version > 0:
            records = self._blend(model, pushed, now_s=now_s)
        elif pushed is None:
            self._read_pushed(self.link.anchor)
        self.link.heard(model)
        merge = self.spec.settings.merge
        # Before a client's models are apart, the round trains both in one: its base must be drawn to nothing.
        is_base = merge.client == "apart" and model.version == 0
        if merge.proximal and not is_base:
            self.center = model.values
        # Where noise is added above, what a client sees in its own model is covered by none.
        return records if self.spec.settings.privacy.unit != "client" else []

    def follow(self, model: Pulled, *, now_s: float) -> list[Record]:
        """Move a paused client's model to its parent's, by its merge rule (see following.py).

        Returns:
            What tracking is told, as by `begin`; nothing where the parent has no newer model.
        """
        if isinstance(model, Model) and (model.version == 0 or self.link.knows(model)):
            self.link.outbox.durable(model.durable_seq)
            return []
        taken, doubts = self._let_in(model, now_s=now_s)
        if taken is None:
            return doubts
        return [*doubts, *following.follow(self, taken, now_s=now_s)]

    def _blend(self, model: Model, pushed: Update | None, *, now_s: float) -> list[Record]:
        """Move to the parent's model, or keep the client's own and train the parent's beside it, if so configured."""
        stays, self.at_home = self.at_home, self._is_fine_tuning
        if stays:
            return two_models.stay(self, model, now_s=now_s)
        if self.own_model is not None or self.spec.settings.merge.client == "apart":
            return two_models.merge(self, self.own_model, model, pushed, now_s=now_s)
        own, anchor, m = self.trainer.read(), self.link.anchor, self.spec.settings.merge.client_m
        followed = MergeRecord(node=self.spec.path, now_s=now_s, version=model.version, m=m)
        # Before the first step after a push there is no progress to keep: the plain rule, to the bit.
        if pushed is None or not self.began or self.step == 0:
            self.merger.backbone(m, own, own, model, out=anchor)
            return [followed, *self._merge_keys(own, own, model, now_s=now_s, merged=anchor)]
        merged = np.empty_like(own)
        moved_anchor = self.merger.backbone(m, own, anchor, model, out=merged)
        assert moved_anchor is not None, "the anchor and the model are two buffers"
        self.link.anchor = moved_anchor
        return [followed, *self._merge_keys(own, anchor, model, now_s=now_s, merged=merged)]

    def serve(self, model: Model | MessageError, *, now_s: float) -> None:
        """The run is over: the client's model becomes what it serves, by its parent's last model.

        Args:
            model: the parent's last one. One that is refused changes nothing.
            now_s: run time.
        """
        taken, _ = self._let_in(model, now_s=now_s)
        if taken is not None and self.experts is not None:
            self.experts.mix(taken)
        elif taken is not None and taken.version > 0:
            two_models.serve(self, taken.values)

    def _merge_keys(self, own: Flat, keys_from: Flat, model: Model, *, now_s: float, merged: Flat) -> list[Record]:
        """Merge the key layers beside a backbone that is merged already, and go on from the result."""
        tokens = float(self.round_tokens)
        weights = self.merger.keys(own, keys_from, model, own_tokens=tokens, now_s=now_s, out=merged)
        self.trainer.write(merged)
        return [] if weights is None else [weights]

    def update(self) -> Update:
        """The finished round as an update; the round is over."""
        tokens, started_tokens = self.step * self.step_tokens, self.round * self.round_tokens
        if self.experts is not None:
            update = self.experts.update(tokens=tokens, started_tokens=started_tokens)
        else:
            theta = self._read_pushed()
            update = self.link.make_update(theta, out=theta, tokens=tokens, started_tokens=started_tokens)
        self.began = False
        self.link.keep(update)
        if self.overlaps:
            self.link.in_flight = update
            self._read_pushed(self.link.anchor)
        return update

    def use_shared_copy(self, shared: Update) -> None:
        """Keep this copy of an update, of which a buffer lies in shared memory, in place of the client's own."""
        self.link.use_shared_copy(shared)

    def state(self) -> tuple[dict[str, Any], dict[str, Flat]]:
        """Everything that a restart needs, down to the step within a round: of this moment, whatever comes next.

        Buffers that training or the next pull change in place are copied.
        """
        return checkpointing.state_of(self)

    def restore(self, meta: dict[str, Any], arrays: dict[str, Flat]) -> None:
        """Become what `state` described.

        Raises:
            CheckpointError: the checkpoint is of another model.
            PrivacyError: the ledger has lost charges that the checkpoint knows.
        """
        checkpointing.restore(self, meta, arrays)
