"""Settings of federated learning: what a node accepts, how it aggregates and merges, and what travels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from worldlm_ray.config.names import AGGREGATION_RULES, CODECS, ROBUST_RULES, SCORES, SERVER_OPTIMIZERS, STALENESS

Trigger = Literal["goal_achieved", "synchronous", "time_up"]
PrivacyUnit = Literal["none", "record", "client"]
RuleName = Annotated[str, AGGREGATION_RULES]
CodecName = Annotated[str, CODECS]
RobustRule = Annotated[str, ROBUST_RULES]
StalenessName = Annotated[str, STALENESS]
ScoreName = Annotated[str, SCORES]
ServerOptimizerName = Annotated[str, SERVER_OPTIMIZERS]


@dataclass(frozen=True, kw_only=True)
class StalenessConfig:
    """How much an update that is tau versions old still counts. Names and defaults of a and b: FedAsync, FedBuff."""

    fn: StalenessName = "constant"
    """Where updates come one by one, each is as many versions old as there are siblings: a discount shortens every
    step alike, and those of slow clients, whose text is worth as much, most. Measured in docs/results.md."""
    a: float | None = None
    """Polynomial 0.5, hinge 10, exponential 0.5, harmonic 1 unless given."""
    b: float = 4.0
    """Hinge: versions of delay that cost nothing."""


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """How key layers are blended: see worldlm_ray/aggregation/attention.py."""

    score: ScoreName = "cosine"
    temperature: float = 0.1
    personal: bool = False
    """Key layers are never taken from the parent: a client's stay its own (FedPer)."""


@dataclass(frozen=True, kw_only=True)
class ResidualsConfig:
    """Key layers that fit nowhere, and where they are sent: see worldlm_ray/aggregation/residuals.py."""

    per_round: int = 0
    """Key layers that may become residuals at one aggregation; 0 switches residual routing off."""
    threshold: float = 0.0
    """A key layer whose score is below this does not fit."""
    pool: int = 8
    """Residuals that a node keeps."""
    max_age: int = 8
    """Aggregations for which it keeps them."""
    offers: int = 2
    """Residuals that a pulling child is offered."""
    discount: StalenessConfig = field(default_factory=lambda: StalenessConfig(fn="polynomial"))
    """How much a residual that is so many aggregations old still counts."""


@dataclass(frozen=True, kw_only=True)
class ServerOptimizerConfig:
    """How an inner node applies the mean update to its backbone."""

    name: ServerOptimizerName = "sgd"
    lr: float | None = None
    """Unless given: sgd 1.0 (FedAvg), nesterov 0.7 (DiLoCo), delayed_nesterov 0.2 x delay (HALoS), adam 0.01
    (FedOpt), times the share of the node's children that are in the aggregation. In synchronous mode that share is
    1; where updates come one by one, a round of all children then moves the model as far as a synchronous one, and
    not as many times as far."""
    momentum: float = 0.9
    delay: int = 16
    """Delayed_nesterov: aggregations per step of the momentum (N)."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    eps: float = 1e-3


@dataclass(frozen=True, kw_only=True)
class RobustConfig:
    """Aggregation for nodes that do not trust their children."""

    rule: RobustRule = "none"
    """`trimmed_mean` or `median` of the updates, coordinate by coordinate; keeps one model per child in memory."""
    trim: float = 0.2
    """`trimmed_mean`: share of the children whose values are dropped at either end."""
    clip_norm: float | None = None
    """Updates (backbone change, and key layers as seen from the node's own) are shortened to this L2 norm."""


@dataclass(frozen=True, kw_only=True)
class AggregationConfig:
    """What an inner node accepts from its children, and when and how it aggregates."""

    trigger: Trigger = "goal_achieved"
    """`goal_achieved` (buffer_size updates), `synchronous` (all live children), `time_up` (time and quorum)."""
    buffer_size: int = 1
    """Updates per aggregation: 1 is FedAsync, more is FedBuff."""
    time_up_s: float = 30.0
    quorum: int = 1
    """`time_up`: updates that must have arrived before time counts."""
    staleness: StalenessConfig = field(default_factory=StalenessConfig)
    max_staleness: int | None = None
    """Updates older than this many versions are refused."""
    rule: RuleName = "mean"
    """How updates become the next model: `mean`, weighted by tokens, or a rule that you add (docs/extending.md).
    `robust` and `capped` are chosen by `robust.rule` and `max_share`, and go with no other."""
    max_update_norm: float | None = None
    """Updates with a larger L2 norm are refused."""
    max_share: float = 1.0
    """Largest share of the weight of one aggregation that a child may have, for the backbone and every key layer; 1
    switches it off. Keeps the updates of an aggregation in memory: see worldlm_ray/aggregation/capped_fold.py."""
    server_optimizer: ServerOptimizerConfig = field(default_factory=ServerOptimizerConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    residuals: ResidualsConfig = field(default_factory=ResidualsConfig)
    robust: RobustConfig = field(default_factory=RobustConfig)
    push_every: int = 1
    """Aggregations between two exchanges with the parent."""


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """How far a node moves to its parent on a pull: theta = (1 - m) own + m parent, for the backbone."""

    client: float | int | str = "validated"
    """A number from 0 to 1, or `validated` or `apart`. `validated`: a client trains its parent's model for its parent,
    and beside it its own model, which validation text chooses (worldlm_ray/client/own_model.py). `apart`: the same, but
    the own model takes nothing from the parent's: with `proximal`, Ditto."""
    federation: float = 1.0
    """A number from 0 to 1, for federations."""
    max_model_step: float | None = None
    """A parent's model is refused that lies further from the node's own than this: L2 distance over the L2 norm of the
    own model, of what an exchange carries. The node goes on with its own model. A newcomer takes any first model."""
    proximal: float = 0.0
    """Strength of a term that draws a client's own model to its parent's last one in every step: FedProx's mu, Ditto's
    and MR-MTL's lambda. See Proximal in worldlm_ray/training/trainer.py."""
    fine_tune: float = 0.0
    """Share of the budget, at its end, in which a client trains its parent's model at home and pushes no change:
    federated averaging, then fine-tuning."""
    mixture: float | None = None
    """APFL's alpha, with `client: apart`: a client's model is (1 - alpha) of the parent's model, which it trains, and
    alpha of a personal one. See worldlm_ray/training/mixed.py."""
    serve_parent: bool = False
    """At the end of the run a client's model becomes its parent's last one: for models that were trained alone and
    merged once. Not with `validated`, which chooses what it serves."""

    @property
    def has_base(self) -> bool:
        """Whether a client trains its parent's model for its parent, and its own beside it."""
        return self.client in ("validated", "apart")

    @property
    def client_m(self) -> float:
        """How far the model that a client trains for its parent moves to the parent's, 0 to 1."""
        return 1.0 if self.has_base else float(self.client)

    @property
    def models_per_token(self) -> int:
        """Models that a client may train with each token."""
        return 2 if self.has_base else 1


@dataclass(frozen=True, kw_only=True)
class ExchangeConfig:
    """How a node's updates travel to its parent: see worldlm_ray/exchange/compression.py."""

    codec: CodecName = "fp32"
    """`bf16` takes half of the bytes, `int8` a quarter, `int4` an eighth. What rounding loses goes with the next
    update."""
    overlap: bool = False
    """A client begins its next local round right after a push, and takes the parent's model when it is there; what was
    trained meanwhile is kept. For clients under asynchronous parents; inner nodes work so anyway."""
