"""A client's local rounds: how many there are, and the training of the one under way. Nothing here knows a parent."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import Any

import numpy as np

from worldlm_ray.client.above import FORWARD
from worldlm_ray.client.best import Best, is_better
from worldlm_ray.client.measure import MeasuredModel
from worldlm_ray.data import Dataset
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.tree import NodeSpec
from worldlm_ray.privacy.account import Account
from worldlm_ray.records import Measure, ProgressRecord, RoundRecord
from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.training.schedule import learning_rate
from worldlm_ray.training.trainer import Batch, Proximal, Trainer


class LocalRounds(MeasuredModel):
    """The local rounds of one client.

    Args:
        plan: the run.
        spec: this client's node.
        dataset: as for `MeasuredModel`.
        make_trainer: as for `MeasuredModel`.
    """

    def __init__(
        self,
        plan: Plan,
        spec: NodeSpec,
        *,
        dataset: Dataset | None = None,
        make_trainer: Callable[[Account | None], Trainer] | None = None,
    ) -> None:
        super().__init__(plan, spec, dataset=dataset, make_trainer=make_trainer)
        self.round = 0
        """Finished local rounds."""
        self.step = 0
        """Steps done of the round that is under way."""
        self.steps = self.tokens = 0
        self.loss_sum = 0.0
        """Sum of step losses of the round that is under way (or has just ended)."""
        self.progress = 0.0
        """Share of the run's budget that is spent, 0 to 1, by the parent's last model."""
        self.learning_rate = 0.0
        self.began = False
        """Whether a round is under way: begun and not yet turned into an update."""
        self.paused = False
        """Whether it trains no more, since its privacy budget is spent, and only follows its parent."""
        self.best: Best | None = None
        """The model of the best round so far, where it is kept."""
        self.center: Flat | None = None
        """The parent's last model, where the own model is drawn to it (`merge.proximal`)."""
        self._stretch_steps = 0
        """Steps that this process has done of the round."""

    @property
    def round_tokens(self) -> int:
        """Tokens of one local round."""
        return self.plan.round_tokens(self.spec)

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimizer step."""
        return self.plan.step_tokens(self.spec)

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
        goes_on = not (self.paused or self.is_done)
        return (self.begun if self.began else self.round + goes_on) * self.round_tokens

    @property
    def is_done(self) -> bool:
        """Whether a budget given in rounds, or that of its text's privacy, is spent."""
        return self._has_all_rounds or self.is_exhausted

    @property
    def _has_all_rounds(self) -> bool:
        rounds = self.plan.config.budget.rounds
        return rounds is not None and self.round >= rounds

    @property
    def _is_fine_tuning(self) -> bool:
        """Whether the round that begins is one of those that fine-tune (`merge.fine_tune`)."""
        share, rounds = self.spec.settings.merge.fine_tune, self.plan.config.budget.rounds
        progress = self.progress if rounds is None else self.round / rounds
        return share > 0.0 and progress >= 1.0 - share - 1e-9

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

    def _pay(self) -> bool:
        return self.account is None or self.account.charge(self.round + 1)

    def _start(self) -> None:
        if self.best is None:
            self._keep_if_best()
        self.step, self.loss_sum, self.began, self._stretch_steps = 0, 0.0, True, 0

    def _give_up(self) -> None:
        """Drop the round under way, as if it had not begun."""
        self.steps -= self.step
        self.tokens -= self.step * self.step_tokens
        self.round -= self.is_whole
        self.step, self.began = 0, False

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

        batches, proximal = self._batches(first), self._proximal
        result = self.trainer.run(batches, rate, first=first, should_stop=should_stop, proximal=proximal)
        self._stretch_steps += result.steps
        self.step += result.steps
        self.steps += result.steps
        # What was configured: how many records a private step took is private.
        self.tokens += result.steps * self.step_tokens
        if self.reports:
            self.loss_sum += result.loss_sum
        self.learning_rate = result.learning_rate
        if self.step == settings.local_steps:
            self.round += 1
            if self._is_validated_round:
                self._keep_if_best()
        return result.train_s

    @property
    def serves(self) -> bool:
        """Whether at the end its model becomes a blend or a mixture with its parent's last one, or that one itself."""
        merge, mixes = self.spec.settings.merge, self.plan.config.model.lora.experts != "none"
        return merge.client == "validated" or merge.serve_parent or mixes

    def _keep_if_best(self) -> None:
        """Keep the client's present model if it is the best so far, by its validation text.

        A client that `serves` has another model at its end.
        """
        evaluation = self.plan.config.evaluation
        if evaluation.keep_best and self.has_validation and not self.serves:
            loss = self.validate(evaluation.round_validation_tokens)
            if is_better(loss, self.best):
                self.best = Best(round=self.round, loss=loss, values=self.trainer.read())

    def report(self, tokens: int, *, parameters: Flat | None = None) -> Measure | None:
        """What the client's model is worth, or the given parameters, if that may leave the client.

        The client's model is that of its best round, where that is kept.
        """
        if parameters is None and self.best is not None:
            parameters = self.best.values
        return super().report(tokens, parameters=parameters)

    @property
    def _proximal(self) -> Proximal | None:
        strength = self.spec.settings.merge.proximal
        return None if self.center is None else Proximal(center=self.center, strength=strength)

    def _batches(self, first: int) -> Iterator[Batch]:
        """The batches of the round from a step on; a private client's are drawn anew every time, and by chance."""
        steps, context = self.training.local_steps, self.context
        if self.account is not None:
            generator = np.random.Generator(np.random.PCG64(int.from_bytes(os.urandom(16), "little")))
            return self.dataset.poisson_batches(generator, steps=steps - first, rate=self.account.rate, context=context)
        seed, batch_size, each = self.plan.config.seed, self.training.batch_size, self.training.draw_steps or steps
        draws = math.ceil(steps / each)
        drawn = (
            self.dataset.batches(
                seed,
                self.round * draws + draw,
                steps=min(each, steps - draw * each),
                batch_size=batch_size,
                context=context,
            )
            for draw in range(draws)
        )
        return islice(chain.from_iterable(drawn), first, None)

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
            best_round=self.best.round if self.best is not None and self.reports else None,
        )

    @property
    def measure_is_due(self) -> bool:
        """Whether the round that has just ended is one to be measured: the last one is, if it is known."""
        if not (self.reports and self._is_validated_round):
            return False
        evaluation = self.plan.config.evaluation
        rounds = evaluation.tokens / (FORWARD * evaluation.share * self.round_tokens)
        # The fewest rounds, in multiples of those that are configured, by which measuring keeps to its share.
        every = evaluation.every_rounds * math.ceil(rounds / evaluation.every_rounds)
        return self.round % every == 0 or self._has_all_rounds

    @property
    def _is_validated_round(self) -> bool:
        every = self.plan.config.evaluation.every_rounds
        return every > 0 and self.round % every == 0

    def progress_record(self, *, now_s: float) -> ProgressRecord:
        """How far this client is."""
        return ProgressRecord(node=self.spec.path, now_s=now_s, round=self.round, steps=self.steps, tokens=self.tokens)
