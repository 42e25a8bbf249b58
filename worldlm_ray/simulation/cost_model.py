"""A cost model in place of the model, for `worldlm simulate` of very large worlds (`simulation.train: false`).

Nothing is trained and no text is read: a client is a few counters, and a local round is the time that it takes. All
else is that of a simulated run: the same state machine decides at every inner node, on buffers of a few elements; links
carry as many bytes as the real model has. So versions, staleness, who is accepted, who waits, bytes and tokens per
second are those of the run with training, event by event (a test compares the two). What depends on values is absent:
losses, attention and residuals; no update is too large.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from worldlm_ray.aggregation.node import Node
from worldlm_ray.config.schema import NodeSettings
from worldlm_ray.exchange.compression import nbytes
from worldlm_ray.exchange.messages import Model, Update
from worldlm_ray.exchange.outbox import Outbox
from worldlm_ray.exchange.replies import Verdict, Welcome
from worldlm_ray.plan import build
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.tree import NodeSpec
from worldlm_ray.privacy.contributions import Contributions
from worldlm_ray.records import Measure, ProgressRecord, Record, RoundRecord, StartRecord
from worldlm_ray.tensors.buffers import Flat, frozen
from worldlm_ray.tensors.layout import Layout, make_layout

LAYOUT = make_layout([("cost", (4,))], [], layers=1)
"""What stands for the model."""
NOTHING = frozen(np.zeros(LAYOUT.size, np.float32))


@dataclass(frozen=True, kw_only=True)
class CostPlan(Plan):
    """A plan whose model has a few elements and counts as many bytes as the real one."""

    real: Layout

    def up_bytes(self, spec: NodeSpec) -> int:
        """Of the buffer of a node's update."""
        return nbytes(spec.settings.exchange.codec, self.real.size)


def cost_plan(plan: Plan) -> CostPlan:
    """The plan with a cost model in place of its model."""
    return CostPlan(config=plan.config, root=plan.root, shape=plan.shape, layout=LAYOUT, real=plan.layout)


def initial(plan: Plan) -> Flat:
    """The initial parameters of a simulated run: the model that stands for all models where there is a cost model."""
    return NOTHING if isinstance(plan, CostPlan) else build.initial(plan)


def inner_node(
    plan: Plan, spec: NodeSpec, initial: Flat, contributions: Contributions | None = None, *, watch: bool = True
) -> Node:
    """The state machine of an inner node; without what depends on values where there is a cost model."""
    if isinstance(plan, CostPlan):
        spec = replace(spec, settings=_plain(spec.settings))
    return build.inner_node(plan, spec, initial, contributions, watch=watch)


def _plain(settings: NodeSettings) -> NodeSettings:
    rules = settings.aggregation
    return replace(
        settings,
        aggregation=replace(rules, residuals=replace(rules.residuals, per_round=0)),
        exchange=replace(settings.exchange, codec="fp32"),
    )


class _NothingKept(Outbox):
    """What all clients share where no parent can die."""

    def add(self, update: Update) -> None:
        """Keep nothing."""


_NOTHING_KEPT = _NothingKept()


class CostClient:
    """A client that costs time and bytes and learns nothing; for the simulator it is a `Client`.

    Args:
        plan: the run.
        spec: this client's node.
        initial: the model that stands for all models; of no use to a client without a model.
        dataset: there is no text.
    """

    __slots__ = (
        "base_incarnation",
        "base_version",
        "began",
        "dataset",
        "incarnation",
        "is_whole",
        "outbox",
        "paused",
        "plan",
        "round",
        "round_tokens",
        "seq",
        "spec",
    )
    warning: ClassVar[str] = ""

    measure_is_due = may_pause = overlaps = serves = False
    in_flight = experts = None
    last_word = ""
    left_out = ()

    def __init__(self, plan: Plan, spec: NodeSpec, *, initial: Flat, dataset: None = None) -> None:
        self.plan, self.spec, self.dataset = plan, spec, dataset
        self.round_tokens = plan.round_tokens(spec)
        self.outbox = Outbox() if plan.config.faults else _NOTHING_KEPT
        self.round = self.seq = self.base_version = 0
        self.incarnation = self.base_incarnation = 1
        self.began = self.is_whole = self.paused = False

    @property
    def steps(self) -> int:
        """Steps of all rounds so far."""
        return self.round * self.spec.settings.training.local_steps

    @property
    def step(self) -> int:
        """Steps done of the round under way: all or none."""
        return self.spec.settings.training.local_steps if self.is_whole else 0

    @property
    def started_tokens(self) -> int:
        """Tokens of all rounds so far, with the next one (or the one under way) counted in full."""
        return (self.round + 1) * self.round_tokens

    @property
    def begun(self) -> int:
        """Local rounds that have begun."""
        return self.round + (self.began and not self.is_whole)

    @property
    def is_done(self) -> bool:
        """Whether a budget given in rounds is spent."""
        rounds = self.plan.config.budget.rounds
        return rounds is not None and self.round >= rounds

    def welcomed(self, welcome: Welcome) -> None:
        """The parent is there, perhaps again: rounds that it has accepted since the checkpoint are counted."""
        missed = welcome.last_seq - self.seq
        if missed > 0:
            self.seq, self.began, self.is_whole = welcome.last_seq, False, False
            self.round += missed
        self.outbox.durable(welcome.durable_seq)

    def answered(self, seq: int, verdict: Verdict) -> None:
        """The parent's verdict on an update."""
        self.outbox.apply(seq, verdict)

    def begin(self, model: Model, *, now_s: float) -> list[Record]:
        """Begin a local round."""
        self.base_version, self.base_incarnation = model.version, model.incarnation
        self.outbox.durable(model.durable_seq)
        self.seq = max(self.seq, model.last_seq)
        self.began, self.is_whole = True, False
        return []

    def train(self, should_stop: Any = None) -> float:
        """Count a round."""
        self.round += 1
        self.is_whole = True
        return 0.0

    def update(self) -> Update:
        """The finished round as an update."""
        self.seq += 1
        self.began = self.is_whole = False
        update = Update(
            sender=self.spec.name,
            seq=self.seq,
            base_version=self.base_version,
            tokens=self.round_tokens,
            started_tokens=self.round * self.round_tokens,
            values=NOTHING,
            base_incarnation=self.base_incarnation,
        )
        self.outbox.add(update)
        return update

    def use_shared_copy(self, shared: Update) -> None:
        """No buffer moves."""

    def progress_record(self, *, now_s: float) -> ProgressRecord:
        """How far this client is."""
        tokens = self.round * self.round_tokens
        return ProgressRecord(node=self.spec.path, now_s=now_s, round=self.round, steps=self.steps, tokens=tokens)

    def start_record(self, *, now_s: float) -> StartRecord:
        """What tracking is told before the first round: nothing was measured."""
        return StartRecord(node=self.spec.path, now_s=now_s, loss=None, perplexity_per_token=None, heldout_bytes=0)

    def round_record(
        self, *, now_s: float, train_s: float, busy_fraction: float, measure: Measure | None
    ) -> RoundRecord:
        """What tracking is told about the round that has just ended."""
        return RoundRecord(
            node=self.spec.path,
            now_s=now_s,
            round=self.round,
            steps=self.steps,
            tokens=self.round * self.round_tokens,
            train_loss=None,
            loss=None,
            perplexity_per_token=None,
            learning_rate=None,
            tokens_per_s=self.round_tokens / train_s,
            busy_fraction=busy_fraction,
        )

    def report(self, tokens: int, *, parameters: Flat | None = None) -> None:
        """Nothing can be measured."""

    def measure(self, tokens: int) -> None:
        """Nothing can be measured."""

    def sample(self) -> str:
        """No model, no text."""
        return ""

    def state(self) -> tuple[dict[str, Any], dict[str, Flat]]:
        """Everything that a restart needs."""
        meta = {name: getattr(self, name) for name in _STATE}
        meta["outbox"], kept = self.outbox.state()
        return meta, kept

    def restore(self, meta: dict[str, Any], arrays: dict[str, Flat]) -> None:
        """Become what `state` described."""
        for name in _STATE:
            setattr(self, name, meta[name])
        self.outbox.restore(meta["outbox"], arrays)


_STATE = ("round", "seq", "base_version", "base_incarnation", "began")
