"""What happened, as plain frozen values: the only thing that backends hand to tracking.

Nodes are named by their path in the tree, such as `world/europe/italy`. `now_s` is seconds since the run
started: wall seconds on Ray, virtual seconds in simulation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field


def perplexity(loss: float) -> float:
    """exp(loss), per byte of a loss in nats per byte; infinite where that is too large for a float."""
    return math.exp(loss) if loss < 700.0 or math.isnan(loss) else math.inf


@dataclass(frozen=True, kw_only=True)
class RoundRecord:
    """A client finished one local round."""

    node: str
    now_s: float
    round: int
    """Local rounds finished by this client, counting this one."""
    steps: int
    """Optimizer steps by this client since the run began."""
    tokens: int
    """Tokens trained on by this client since the run began."""
    train_loss: float | None
    """Mean training loss of the round, nats per token; None of a client that keeps it private."""
    loss: float | None
    """Held-out loss after the round, nats per byte; None where it was not measured."""
    perplexity_per_token: float | None
    """None where a token is a byte, too: perplexity per byte is exp(loss)."""
    learning_rate: float | None
    """None where nothing is trained."""
    tokens_per_s: float
    """Training speed of the round: tokens over training seconds."""
    busy_fraction: float
    """Share of its life so far that the client spent training or evaluating."""
    epsilon: float | None = None
    """Spent on the client's text, this round included; None without differential privacy."""
    best_round: int | None = None
    """The round with the lowest loss on validation text so far; None where none is kept, or losses are private."""


@dataclass(frozen=True, kw_only=True)
class ProgressRecord:
    """How far a client is: told when it has found its parent and when it ends, for records of rounds may be lost."""

    node: str
    now_s: float
    round: int
    steps: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class StartRecord:
    """A client measured its model before the first round."""

    node: str
    now_s: float
    loss: float | None
    """Held-out loss, nats per byte; None of a client that keeps it private."""
    perplexity_per_token: float | None
    """None where a token is a byte, too."""
    heldout_bytes: int
    """Size of the held-out text: the weight of this client in means over clients. 0 where the loss is private."""
    private: bool = False
    """Whether this client reports no measurement on its text, by its configuration."""


@dataclass(frozen=True, kw_only=True)
class OwnModelRecord:
    """A client has measured the published model of a node above it on its held-out text, during the run."""

    node: str
    """The node whose model it is."""
    now_s: float
    by: str
    """The client; one that keeps its losses private measures none."""
    version: int
    """Of the model."""
    loss: float
    """Nats per byte."""
    perplexity_per_token: float | None
    """None where a token is a byte, too."""
    heldout_bytes: int
    """Size of the client's held-out text: the weight of this measurement."""


@dataclass(frozen=True, kw_only=True)
class FinalRecord:
    """The run has ended: a node's own model was measured, an inner node's on the text of all clients below it."""

    node: str
    now_s: float
    version: int
    """Of the model that was measured; of a client, the parent's version that it took last."""
    loss: float
    """Nats per byte."""
    perplexity_per_token: float | None
    """None where a token is a byte, too."""
    heldout_bytes: int


@dataclass(frozen=True, kw_only=True)
class VerdictRecord:
    """A node accepted or refused an update: one line of the audit trail."""

    node: str
    now_s: float
    sender: str
    seq: int
    base_version: int
    version: int
    """The receiver's version when the update arrived."""
    tau: int
    """Staleness: version - base_version."""
    verdict: str
    """`accepted`, or the name of the refusal."""
    bytes: int
    detail: str = ""
    incarnation: int = 1
    """The receiver's."""


@dataclass(frozen=True, kw_only=True)
class AggregationRecord:
    """A node applied an aggregation."""

    node: str
    now_s: float
    version: int
    """Version after the aggregation."""
    tokens: int
    """Tokens of the updates in this aggregation."""
    total_tokens: int
    """Tokens of all updates that this node has aggregated so far."""
    contributors: tuple[str, ...]
    """Names of the children whose updates were folded in, in the order of folding."""
    step_norm: float
    """L2 norm of the change of the node's backbone."""
    busy_fraction: float = 0.0


@dataclass(frozen=True, kw_only=True)
class AttentionRecord:
    """Attention weights over candidates, one row per key layer.

    `direction` is `up` for an inner node's blend of its children's key layers and `down` for a node's blend
    of its own and its parent's.
    """

    node: str
    now_s: float
    version: int
    direction: str
    layers: tuple[str, ...]
    candidates: tuple[str, ...]
    weights: tuple[tuple[float, ...], ...]
    """[layers, candidates]; every row sums to one."""


@dataclass(frozen=True, kw_only=True)
class MergeRecord:
    """A node moved to its parent's model, or did not."""

    node: str
    now_s: float
    version: int
    """The parent's."""
    m: float
    """How far the backbone moved: 0 not at all, 1 all the way."""


@dataclass(frozen=True, kw_only=True)
class PullRecord:
    """A child took its parent's model."""

    node: str
    """The child."""
    now_s: float
    version: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class PushRecord:
    """A child sent an update to its parent (whether or not it was accepted)."""

    node: str
    """The child."""
    now_s: float
    bytes: int


@dataclass(frozen=True, kw_only=True)
class PrivacyRecord:
    """What a client's contributions to its aggregator have cost so far."""

    node: str
    """The client."""
    now_s: float
    epsilon: float


@dataclass(frozen=True, kw_only=True)
class LifeRecord:
    """Something in a node's life that an operator wants to know: started, continued, finished, lost."""

    node: str
    now_s: float
    event: str
    version: int = 0
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class BorderRecord:
    """What one side of a border has counted since its record before, of the node on the other side."""

    node: str
    """The node in the other cluster: a member, or the parent of one."""
    now_s: float
    bytes_up: int
    """Of updates, from the member to its parent."""
    bytes_down: int
    """Of models."""
    mbit_up: float | None
    """Megabits per second while updates moved; None where none did."""
    mbit_down: float | None
    resumed: int
    """Parts that were sent again."""
    accepted: int
    """Updates of the member."""
    refused: dict[str, int]
    """Requests and updates of the member, by name of the refusal."""
    tau: int | None
    """Staleness of the member's newest update, versions; None if there was none."""
    every_s: float | None
    """Seconds between the member's newest two updates; None if there was none."""
    parameters: int
    """Of the model."""
    codec: str
    """By which updates travel."""
    overlap: bool
    """Whether training goes on during an exchange, as far as this side knows."""
    certificate_days: float | None
    """Until the member's certificate ends; None where it is not known."""
    offline_s: float
    """Seconds for which the other side has not been heard; 0 if it is there."""


Record = (
    RoundRecord
    | ProgressRecord
    | StartRecord
    | OwnModelRecord
    | FinalRecord
    | VerdictRecord
    | AggregationRecord
    | AttentionRecord
    | MergeRecord
    | PullRecord
    | PushRecord
    | PrivacyRecord
    | LifeRecord
    | BorderRecord
)


@dataclass(frozen=True, kw_only=True)
class NodeSummary:
    """One node's line in summary.json.

    Losses are nats per byte, perplexities per byte (exp of the loss). `loss` is that of the node's own model: a
    client's on its held-out text, an inner node's on the held-out text of all clients below it.
    """

    kind: str
    version: int = 0
    steps: int = 0
    tokens: int = 0
    loss_start: float | None = None
    """Of the initial model, with which every node begins."""
    loss: float | None = None
    loss_version: int | None = None
    """Of an inner node: the version that `loss` was measured of; the oldest of them where texts differ in it."""
    loss_measured_s: float | None = None
    """Run time of the newest measurement in `loss`."""
    perplexity_start: float | None = None
    perplexity: float | None = None
    perplexity_per_token: float | None = None
    """None where a token is a byte, too."""
    clients_loss: float | None = None
    """Of an inner node: mean over the clients below, each one's own model on its own text, by held-out bytes."""
    clients_perplexity: float | None = None
    private: bool = False
    """Whether no client here reports losses on its text."""
    busy_fraction: float = 0.0
    accepted: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0
    epsilon: float | None = None
    """Privacy spent, of a private client."""
    best_round: int | None = None
    """Of a client that keeps its best round (`evaluation.keep_best`): which one it is. `loss` is of its model."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Held-out quality of a model on one client's text, or on several clients'."""

    loss: float
    """Nats per byte."""
    heldout_bytes: int
    """Size of the whole held-out text: the weight of this measure in means."""
    perplexity_per_token: float | None = None
    """None where a token is a byte, too."""

    @property
    def perplexity(self) -> float:
        """Per byte."""
        return perplexity(self.loss)
