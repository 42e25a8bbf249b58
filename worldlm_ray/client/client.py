"""A leaf of the tree: text of its own, a model of its own, and the local rounds that train it.

A client knows nothing of who drives it: an actor on Ray and the simulator call the same four things in turn,
`begin` (merge the parent's model), `train`, `update` (what to push) and `measure`.

Where exchange and training overlap (`exchange.overlap`), a round after the first starts with `begin_ahead`, from the
client's own model, while the last update is on its way up and the parent's model on its way down. That model is taken
by `merge` between two steps of the round, and what has been trained since the push is kept, as at an inner node
(worldlm_ray/aggregation/merge.py): `base` is the model that was pushed, moved with the parent since.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np

from worldlm_ray.aggregation.merge import Merger, Moved
from worldlm_ray.data import Dataset, prepare
from worldlm_ray.errors import CheckpointError, PrivacyError
from worldlm_ray.exchange.compression import lossy, memory
from worldlm_ray.exchange.messages import Model, Update
from worldlm_ray.exchange.outbox import Outbox, fields, limited, revived
from worldlm_ray.exchange.parent import Gate
from worldlm_ray.exchange.replies import Verdict, Welcome
from worldlm_ray.plan.accounts import open_account
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.tree import NodeSpec
from worldlm_ray.privacy.account import Account, weak_delta
from worldlm_ray.records import Measure, OwnModelRecord, ProgressRecord, Record, RoundRecord, StartRecord, perplexity
from worldlm_ray.seeds import derive
from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.training.making import trainer_of
from worldlm_ray.training.sampling import sample
from worldlm_ray.training.schedule import learning_rate
from worldlm_ray.training.trainer import Batch, Trainer


class Client:
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
        self.plan, self.spec, self.training = plan, spec, spec.settings.training
        self.context = plan.shape.context
        self.dataset = dataset or prepare(
            spec.settings.data, context=self.context, key=f"{spec.key}.data", order=spec.path
        )
        self.account = open_account(plan, spec, self.dataset)
        """What the client may spend of its text's privacy; None without such a promise."""
        self.warning = ""
        """What an operator should know before the client begins; empty if nothing."""
        if self.account is not None:
            records = self.dataset.records(context=self.context)
            self.warning = weak_delta(spec.settings.privacy, records, named=self.reports)
        self.trainer = make_trainer(self.account) if make_trainer else self._make_trainer()
        initial = plan.initial() if initial is None else initial
        self.base = np.array(initial)
        """The merged model that the current local round began from. Where a round begins ahead of an exchange: the
        model that was pushed, moved with the parent since."""
        self.in_flight: Update | None = None
        """The update of an exchange that a round has begun ahead of; None once it has come back."""
        self.trainer.write(self.base)
        self.parent_keys = self.base[plan.layout.backbone_size :].copy()
        """What an update's key layers are measured from: the parent's, as this client last heard them. Where its
        model has been refused since, the client's own, as they were last sent."""
        self.lost = memory(spec.settings.exchange.codec, plan.layout.backbone_size)
        """What the codec has lost of the updates so far; None of one that loses nothing."""
        self.merger = Merger(
            path=spec.path,
            layout=plan.layout,
            rules=spec.settings.aggregation,
            m=spec.settings.merge.client,
            agreement=spec.settings.merge.agreement,
            initial=initial,
        )
        self.gate = Gate(spec.path, plan.layout, max_step=spec.settings.merge.max_model_step)
        """Which models of the parent it takes."""
        self.round = 0
        """Finished local rounds."""
        self.step = 0
        """Steps done of the round that is under way."""
        self.steps = self.tokens = 0
        self.loss_sum = 0.0
        """Sum of step losses of the round that is under way (or has just ended)."""
        self.incarnation = self.base_incarnation = 1
        """How often this client has been started (for the backend to set); the same of its parent, at the last pull."""
        self.outbox = Outbox()
        """What the parent has not made durable yet."""
        self.seq = self.base_version = 0
        self.progress = self.learning_rate = 0.0
        self.began = False
        """Whether a round is under way: begun and not yet turned into an update."""
        self.start_over = False
        """Whether the next pull replaces the model and the optimizer's state."""
        self.paused = False
        """Whether it trains no more, since its privacy budget is spent, and only follows its parent."""
        self.followed: float | None = None
        """How far a paused client moves to its parent at every pull, once that is settled."""
        self._stretch_steps = 0
        """Steps that this process has done of the round."""

    def _make_trainer(self) -> Trainer:
        noise = None if self.account is None else self.account.noise
        return trainer_of(self.plan.shape, self.plan.layout, self.spec.settings, noise=noise)

    # ---- the cycle -------------------------------------------------------------------------------------------

    @property
    def reports(self) -> bool:
        """Whether losses on its text may leave the client: epsilon does not cover them."""
        privacy = self.spec.settings.privacy
        return privacy.unit == "none" or privacy.report_metrics

    @property
    def left_out(self) -> tuple[str, ...]:
        """What of its text is not read or not kept. Of clients that share a text out, the first says it."""
        is_first = self.spec.settings.data.shard is None or self.spec.settings.data.shard.startswith("1/")
        return self.dataset.left_out if self.reports and is_first else ()

    @property
    def round_tokens(self) -> int:
        """Tokens of one local round."""
        return self.plan.round_tokens(self.spec)

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimizer step."""
        return self.plan.step_tokens(self.spec)

    @property
    def overlaps(self) -> bool:
        """Whether rounds begin before the exchange of the one before has come back."""
        return self.spec.settings.exchange.overlap

    @property
    def is_whole(self) -> bool:
        """Whether every step of the round under way is done."""
        return self.began and self.step == self.training.local_steps

    @property
    def begun(self) -> int:
        """Local rounds that have begun."""
        return self.round + (self.began and not self.is_whole)

    @property
    def started_tokens(self) -> int:
        """Tokens of all rounds so far, with the next one (or the one under way) counted in full."""
        return (self.begun if self.began else self.round + (not self.paused)) * self.round_tokens

    @property
    def is_done(self) -> bool:
        """Whether a budget given in rounds, or that of its text's privacy, is spent."""
        return self._has_all_rounds or self.is_exhausted

    @property
    def _has_all_rounds(self) -> bool:
        rounds = self.plan.config.budget.rounds
        return rounds is not None and self.round >= rounds

    @property
    def is_exhausted(self) -> bool:
        """Whether one more round would break the privacy budget."""
        return self.account is not None and self.account.is_exhausted

    @property
    def may_pause(self) -> bool:
        """Whether it stays, now that its privacy budget is spent, and takes its parent's model from time to time."""
        pauses = self.spec.settings.privacy.on_exhausted == "pause"
        return pauses and self.is_exhausted and not self._has_all_rounds

    @property
    def last_word(self) -> str:
        """Why the client ends before the others do, if it does."""
        return "its privacy budget is spent" if self.is_exhausted else ""

    def welcomed(self, welcome: Welcome) -> None:
        """The parent is there, perhaps again.

        Rounds that the parent has accepted since the checkpoint that this client came back from are counted. Every
        push is one round. Without this a restarted client would train and push them again, and they would count twice.
        """
        missed = welcome.last_seq - self.seq
        if missed > 0:
            self.round += missed - self.is_whole  # one that only waited for its exchange is counted already
            self.seq, self.began, self.step = welcome.last_seq, False, 0
            self.in_flight = None
            self.steps = self.round * self.training.local_steps
            self.tokens = self.round * self.round_tokens
        self.outbox.durable(welcome.durable_seq)

    def answered(self, verdict: Verdict) -> None:
        """The parent's word about an update. A model that has diverged is given up for the parent's."""
        self.outbox.heed(verdict)
        self.start_over = self.start_over or verdict.reason in ("not_finite", "norm_exceeded")

    def begin(self, model: Model | None, *, now_s: float) -> list[Record]:
        """Merge the parent's model and begin a local round from the result.

        A model that is refused (or None: what came was none) changes nothing: the round begins from the client's own.

        A private client pays for the round first. If its budget does not hold it, since another client with the same
        text has spent it meanwhile, no round begins and `began` stays False.

        Returns:
            What tracking is told: how far the client followed, and the attention weights of the key layers.

        Raises:
            PrivacyError: the ledger is damaged or cannot be written.
        """
        if not self._pay():
            return []
        self.paused, self.followed = False, None
        taken, records = self._let_in(model, now_s=now_s)
        if taken is None:
            self._keep_own()
            return records
        records += self._take(taken, now_s=now_s)
        self._start()
        return records

    def _let_in(self, model: Model | None, *, now_s: float) -> tuple[Model | None, list[Record]]:
        """The parent's model, unless it is refused, and what tracking is told of that."""
        newcomer = self.start_over or self.round == 0
        own = None if newcomer or self.gate.max_step is None else self.trainer.read()
        record = self.gate.refusal(model, seq=self.seq, own=own, now_s=now_s)
        return (None if self.gate.shut else model), [] if record is None else [record]

    def _keep_own(self) -> None:
        """Begin a round from the client's own model, of which all that an update could carry is in an update."""
        pushed, self.in_flight = self.in_flight, None
        if pushed is None:
            self._read_pushed(self.base)
        # An update carries all key layers. The next one must not carry the same change of them again.
        self.parent_keys[:] = self.base[self.plan.layout.backbone_size :]
        self._start()

    def _read_pushed(self, out: Flat | None = None) -> Flat:
        """The model whose change is pushed: a copy, into `out` if given."""
        beside = self.trainer.beside()
        if beside is None:
            return self.trainer.read(out)
        if out is None:
            return beside
        np.copyto(out, beside)
        return out

    def begin_ahead(self) -> None:
        """Begin a local round from the client's own model, while its last update is in flight.

        A private client pays first, as in `begin`.
        """
        if self._pay():
            self.progress += self._world_progress(self.training.local_steps)  # the parent spoke of the round before
            self._start()

    def merge(self, model: Model | None, *, now_s: float) -> list[Record]:
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
            self.in_flight = None
            self.parent_keys[:] = self.base[self.plan.layout.backbone_size :]
            return records
        records += self._take(taken, now_s=now_s)
        self.progress -= self._world_progress(self.step)  # the parent speaks of now, `_rate` counts from the first step
        return records

    def _pay(self) -> bool:
        return self.account is None or self.account.charge(self.round + 1)

    def _start(self) -> None:
        self.step, self.loss_sum, self.began, self._stretch_steps = 0, 0.0, True, 0

    def _give_up(self) -> None:
        """Drop the round under way, as if it had not begun."""
        self.steps -= self.step
        self.tokens -= self.step * self.step_tokens
        self.round -= self.is_whole
        self.step, self.began = 0, False

    def _take(self, model: Model, *, now_s: float) -> list[Record]:
        """Merge the parent's model, and keep what was trained since the push."""
        records: list[Record] = []
        pushed, self.in_flight = self.in_flight, None
        if self.start_over or (model.version > 0 and self.round == 0):
            # A newcomer has nothing of its own to keep, and one that has diverged nothing worth keeping.
            self.merger.judge(model, None, now_s=now_s)
            self.base[:] = model.values
            self.trainer.write(self.base)
            if self.start_over:
                self.trainer.forget()
                self.start_over = False
        elif model.version > 0:
            records = self._blend(model, pushed, now_s=now_s)
        elif pushed is None:
            self.trainer.read(self.base)
        self._heard(model)
        # Where noise is added above, what a client sees in its own model is covered by none.
        return records if self.spec.settings.privacy.unit != "client" else []

    def follow(self, model: Model, *, now_s: float) -> list[Record]:
        """Move a paused client's model to its parent's, by its merge rule; what it has learned itself stays in it.

        A client that does not train has no movement of its own by which `adaptive` could judge. Its last round decides
        once more, and that stands: who went with the others goes on following, who had parted keeps its model.

        Costs no privacy: nothing is read but what was paid for and what the parent publishes.

        Returns:
            What tracking is told, as by `begin`; nothing where the parent has no newer model.
        """
        if model.version == 0 or (model.version, model.incarnation) == (self.base_version, self.base_incarnation):
            self.outbox.durable(model.durable_seq)
            return []
        taken, doubts = self._let_in(model, now_s=now_s)
        if taken is None:
            return doubts
        own, pushed = self.trainer.read(), self.in_flight
        self.in_flight = None
        moved = Moved(now=own, since=self.base) if pushed is None else Moved(now=own, change=pushed.values)
        m, judged = self.merger.judge(model, moved if self.round else None, now_s=now_s)
        if self.followed is None:
            self.followed = m if self.round else 1.0
        else:
            judged = replace(judged, m=self.followed, agreement=None)
        self.merger.backbone(self.followed, own, own, model, out=self.base)
        weights = self._merge_keys(self.followed, own, own, model, now_s=now_s, merged=self.base)
        self._heard(model)
        return [*doubts, judged, *weights]

    def _heard(self, model: Model) -> None:
        """What a client remembers of the parent's model that it took."""
        self.parent_keys[:] = model.values[self.plan.layout.backbone_size :]
        self.base_version, self.progress = model.version, model.progress
        self.base_incarnation = model.incarnation
        self.outbox.durable(model.durable_seq)
        self.seq = max(self.seq, model.last_seq)

    def _blend(self, model: Model, pushed: Update | None, *, now_s: float) -> list[Record]:
        """Move to the parent's model, or keep the client's own and train the parent's beside it, if so configured."""
        own = self.trainer.read()
        moved = Moved(now=own, since=self.base) if pushed is None else Moved(now=self.base, change=pushed.values)
        if (beside := self.trainer.beside()) is not None:
            moved = Moved(now=own, change=beside - self.base)
        m, judged = self.merger.judge(model, moved, now_s=now_s)
        if m == 0.0 and self.trainer.train_beside(model.values):
            self.base[:] = model.values
            return [judged]
        # Before the first step after a push there is no progress to keep: the plain rule, to the bit.
        ahead = pushed is not None and self.began and self.step > 0
        keys_from = own
        if not ahead:
            merged = self.base
            self.merger.backbone(m, own, own, model, out=merged)
        else:
            merged = np.empty_like(own)
            keys_from = self.base
            anchor = self.merger.backbone(m, own, self.base, model, out=merged)
            assert anchor is not None, "the base is a buffer of its own"
            self.base = anchor
        return [judged, *self._merge_keys(m, own, keys_from, model, now_s=now_s, merged=merged)]

    def _merge_keys(
        self, m: float, own: Flat, keys_from: Flat, model: Model, *, now_s: float, merged: Flat
    ) -> list[Record]:
        """Merge the key layers beside a backbone that is merged already, and go on from the result."""
        tokens = float(self.round_tokens)
        weights = self.merger.keys(m, own, keys_from, model, own_tokens=tokens, now_s=now_s, out=merged)
        self.trainer.write(merged)
        return [] if weights is None else [weights]

    def train(self, should_stop: Any = lambda: False) -> float:
        """Train the round that is under way, or the rest of it.

        Args:
            should_stop: asked before every step; True leaves the round unfinished, to be continued.

        Returns:
            Seconds of training.
        """
        settings, first = self.training, self.step

        def rate(step: int) -> float:
            return self._rate(first + step)

        result = self.trainer.run(self._batches(first), rate, should_stop=should_stop)
        self._stretch_steps += result.steps
        self.step += result.steps
        self.steps += result.steps
        # What was configured: how many records a private step took is nobody's business.
        self.tokens += result.steps * self.step_tokens
        if self.reports:
            self.loss_sum += result.loss_sum
        self.learning_rate = result.learning_rate
        if self.step == settings.local_steps:
            self.round += 1
        return result.train_s

    def _batches(self, first: int) -> Iterator[Batch]:
        """The batches of the round from a step on; a private client's are drawn anew every time, and by chance."""
        steps, context = self.training.local_steps, self.context
        if self.account is not None:
            generator = np.random.Generator(np.random.PCG64(int.from_bytes(os.urandom(16), "little")))
            return self.dataset.poisson_batches(generator, steps=steps - first, rate=self.account.rate, context=context)
        batches = self.dataset.batches(
            self.plan.config.seed, self.round, steps=steps, batch_size=self.training.batch_size, context=context
        )
        return islice(batches, first, None)

    def _rate(self, step: int) -> float:
        """Learning rate of a step of the round, taken in its middle: a warm-up's first step trains too."""
        budget, settings, middle = self.plan.config.budget, self.training, step + 0.5
        rounds = self.round + middle / settings.local_steps
        if budget.rounds is not None:
            progress = rounds / budget.rounds
        elif budget.tokens is not None:
            progress = self.progress + self._world_progress(middle)
        else:
            # Time within a round is not known beforehand: the first round is the warm-up at least.
            progress = max(self.progress, settings.warmup_fraction * min(rounds, 1.0))
        return learning_rate(settings, progress)

    def _world_progress(self, steps: float) -> float:
        """Share of a budget in tokens that is spent while this client takes so many steps, if all are as fast."""
        tokens = self.plan.config.budget.tokens
        return 0.0 if tokens is None else steps * (self.step_tokens * len(self.plan.root.clients)) / tokens

    @property
    def train_loss(self) -> float:
        """Mean training loss of the round, nats per token."""
        return self.loss_sum / max(self.step, 1)

    def update(self) -> Update:
        """The finished round as an update; the round is over."""
        split = self.plan.layout.backbone_size
        values = self._read_pushed()
        values[:split] -= self.base[:split]
        values[split:] -= self.parent_keys
        codec = self.spec.settings.exchange.codec
        values = lossy(codec, values, self.lost)
        self.seq += 1
        self.began = False
        update = Update(
            sender=self.spec.name,
            seq=self.seq,
            base_version=self.base_version,
            tokens=self.step * self.step_tokens,
            started_tokens=self.round * self.round_tokens,
            values=values,
            codec=codec,
            base_incarnation=self.base_incarnation,
        )
        self.outbox.add(update)
        if self.overlaps:
            self.in_flight = update
            self.trainer.read(self.base)
        return update

    def use_shared_copy(self, own: Flat, shared: Flat) -> None:
        """Keep another buffer with the values of an update in place of the given one."""
        self.outbox.use_shared_copy(own, shared)
        if self.in_flight is not None and self.in_flight.values is own:
            self.in_flight = replace(self.in_flight, values=shared)

    def round_record(
        self, *, now_s: float, train_s: float, busy_fraction: float, measure: Measure | None
    ) -> RoundRecord:
        """What tracking is told about the round that has just ended.

        Args:
            now_s: run time.
            train_s: seconds that the round's training took.
            busy_fraction: share of the client's life spent on training and measuring.
            measure: held-out quality after the round, where it was measured.
        """
        tokens = self._stretch_steps * self.step_tokens
        return RoundRecord(
            node=self.spec.path,
            now_s=now_s,
            round=self.round,
            steps=self.steps,
            tokens=self.tokens,
            train_loss=self.train_loss if self.reports else None,
            loss=measure.loss if measure else None,
            perplexity_per_token=measure.perplexity_per_token if measure else None,
            learning_rate=self.learning_rate,
            tokens_per_s=tokens / train_s if train_s > 0 else 0.0,
            busy_fraction=busy_fraction,
            epsilon=self.account.epsilon() if self.account is not None else None,
        )

    @property
    def measure_is_due(self) -> bool:
        """Whether the round that has just ended is one to be measured."""
        every = self.plan.config.evaluation.every_rounds
        return self.reports and every > 0 and self.round % every == 0

    # ---- quality ---------------------------------------------------------------------------------------------

    def measure(self, tokens: int, *, parameters: Flat | None = None) -> Measure:
        """Held-out loss of the client's own model, or of the given parameters.

        Args:
            tokens: held-out tokens to predict, at most.
            parameters: another model, such as the world's.
        """
        windows = self.dataset.heldout_windows(tokens, context=self.context, batch_size=self.training.batch_size)
        nats, count = self.trainer.evaluate(windows, parameters=parameters)
        per_token, is_bytes = nats / count, self.spec.settings.data.tokenizer == "bytes"
        return Measure(
            loss=per_token / self.dataset.heldout_bytes_per_token(),
            heldout_bytes=self.dataset.heldout_bytes,
            perplexity_per_token=None if is_bytes else perplexity(per_token),
        )

    def report(self, tokens: int, *, parameters: Flat | None = None) -> Measure | None:
        """What `measure` gives, if that may leave the client."""
        return self.measure(tokens, parameters=parameters) if self.reports else None

    def measure_above(self, path: str, values: Flat, *, version: int, now_s: float) -> OwnModelRecord | None:
        """Measure the model of a node above on this client's held-out text; None of a client that reports no losses.

        Args:
            path: of the node.
            values: its published model.
            version: of the model.
            now_s: run time.
        """
        measure = self.report(self.plan.config.evaluation.tokens, parameters=values)
        if measure is None:
            return None
        return OwnModelRecord(
            node=path,
            now_s=now_s,
            by=self.spec.path,
            version=version,
            loss=measure.loss,
            perplexity_per_token=measure.perplexity_per_token,
            heldout_bytes=measure.heldout_bytes,
        )

    def progress_record(self, *, now_s: float) -> ProgressRecord:
        """How far this client is."""
        return ProgressRecord(node=self.spec.path, now_s=now_s, round=self.round, steps=self.steps, tokens=self.tokens)

    def start_record(self, *, now_s: float) -> StartRecord:
        """Measure the model before the first round."""
        measure = self.report(self.plan.config.evaluation.final_tokens)
        if measure is None:
            return StartRecord(
                node=self.spec.path, now_s=now_s, loss=None, perplexity_per_token=None, heldout_bytes=0, private=True
            )
        return StartRecord(
            node=self.spec.path,
            now_s=now_s,
            loss=measure.loss,
            perplexity_per_token=measure.perplexity_per_token,
            heldout_bytes=measure.heldout_bytes,
        )

    def sample(self, *, prompt: str = "", tokens: int = 80, temperature: float = 0.8) -> str:
        """Text from the client's model, or the continuation of a prompt; none where no noise covers the model."""
        if self.spec.settings.privacy.unit == "client" and not self.reports:
            return ""
        seed = derive(self.plan.config.seed, self.spec.path, "sample")
        return sample(
            self.trainer,
            self.dataset.tokenizer,
            prompt,
            tokens=tokens,
            temperature=temperature,
            seed=seed,
            opening=self.dataset.heldout[:1],
        )

    # ---- durability ------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Any], dict[str, Flat]]:
        """Everything that a restart needs, down to the step within a round: of this moment, whatever comes next.

        Buffers that training or the next pull change in place are copied.
        """
        meta = {name: getattr(self, name) for name in _STATE}
        meta["layout"] = self.plan.layout.hash
        meta["followed"] = self.followed
        meta["charges"] = 0 if self.account is None else len(self.account.ledger.entries())
        arrays = {"theta": self.trainer.read(), "base": self.base.copy(), "parent_keys": self.parent_keys.copy()}
        if self.merger.heard is not None:
            arrays["heard"] = self.merger.heard
        if self.lost is not None:
            arrays["lost"] = self.lost.copy()
        arrays |= {f"optimizer.{name}": values for name, values in self.trainer.optimizer_state().items()}
        meta["outbox"], kept = self.outbox.state()
        arrays |= kept
        if self.in_flight is not None:
            meta["in_flight"], meta["whole"] = fields(self.in_flight), self.is_whole
            if all(values is not self.in_flight.values for values in kept.values()):
                arrays["in_flight"] = self.in_flight.values
        return meta, arrays

    def restore(self, meta: dict[str, Any], arrays: dict[str, Flat]) -> None:
        """Become what `state` described.

        Raises:
            CheckpointError: the checkpoint is of another model.
        """
        if meta["layout"] != self.plan.layout.hash:
            raise CheckpointError(
                f"{self.spec.path}: the checkpoint is of another model or another choice of key layers"
            )
        for name in _STATE:
            setattr(self, name, meta[name])
        self.followed = meta.get("followed")
        if meta.get("whole", False):
            self.step = self.training.local_steps  # it waits for the exchange, to be pushed
        elif self.began:
            # A round may have been shortened by a change of local_steps: it ends with one more step.
            self.step = min(self.step, self.training.local_steps - 1)
        if self.account is not None:
            self._pay_again(meta["charges"])
        self.base, self.parent_keys = np.array(arrays["base"]), np.array(arrays["parent_keys"])
        if self.lost is not None and "lost" in arrays:
            self.lost[:] = arrays["lost"]
        if self.merger.heard is not None and "heard" in arrays:
            self.merger.heard = arrays["heard"]
        self.trainer.write(arrays["theta"])
        self.outbox.restore(meta["outbox"], arrays)
        self.outbox.limit_tokens(self.round_tokens)
        if "in_flight" in meta:
            kept = self.outbox.after(meta["in_flight"]["seq"] - 1)  # it is the newest, if it is there
            update = kept[0] if kept else revived(meta["in_flight"], arrays["in_flight"])
            self.in_flight = limited(update, self.round_tokens)
        prefix = "optimizer."
        self.trainer.load_optimizer_state(
            {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
        )

    def _pay_again(self, charges: int) -> None:
        """Pay for the rest of the round: the life before, or another one from this checkpoint, may have trained it."""
        assert self.account is not None
        found = len(self.account.ledger.entries())
        if found < charges:
            raise PrivacyError(
                f"{self.account.ledger.path}: holds {found} of the {charges} charges that {self.spec.path} has made; "
                "restore the file from a copy: without it nobody knows what was spent"
            )
        left = self.training.local_steps - self.step
        if self.began and left and not self.account.charge(self.round + 1, steps=left):
            self.began, self.step = False, 0


_STATE = (
    "round",
    "step",
    "steps",
    "tokens",
    "loss_sum",
    "seq",
    "base_version",
    "base_incarnation",
    "progress",
    "learning_rate",
    "began",
    "start_over",
)
