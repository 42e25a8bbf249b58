"""What is known of one node of a running world, and how it is written as JSON."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, get_args

from worldlm_ray.plan.tree import Kind
from worldlm_ray.records import BorderRecord, perplexity

FINISHED, DIVERGED = "finished", "diverged"
REMOTE = "remote"
"""Kind of a node in another cluster."""
KINDS: tuple[str, ...] = (*get_args(Kind), REMOTE)


@dataclass(kw_only=True)
class NodeState:
    """What is known of one node."""

    kind: str
    version: int = 0
    """Aggregations applied. Of a client: the parent's version that it pulled last."""
    rounds: int = 0
    steps: int = 0
    """Of an inner node: the sum over the clients below it. The same for `tokens` and `tokens_per_s`."""
    tokens: int = 0
    tokens_aggregated: int = 0
    """Tokens of the updates that an inner node has aggregated."""
    heldout_bytes: int = 0
    """Of an inner node: the sum over the clients below it whose losses may be reported."""
    loss_start: float | None = None
    """Loss of the initial model, with which all nodes begin. All losses are in nats per byte."""
    loss: float | None = None
    """Loss of the node's own model, on the held-out text of the client or of all clients below the inner node."""
    loss_version: int | None = None
    """Of an inner node: the version whose loss was measured. The oldest one, if texts were measured at several."""
    loss_measured_s: float | None = None
    """Run time of the newest measurement in `loss`."""
    perplexity_per_token: float | None = None
    """Of the node's own model; None where a token is a byte. `values_of` adds the perplexities per byte."""
    clients_loss: float | None = None
    """Of an inner node: the mean over the clients below of their own models' losses, weighted by held-out bytes."""
    private: bool = False
    """Whether this client, or every client below, reports no losses."""
    tau: int | None = None
    """Staleness of the last update that this node sent."""
    tau_mean: float | None = None
    tokens_per_s: float = 0.0
    round_s: float = 0.0
    """Of a client: seconds that its last round took, with pull and push. `round_at_s` is the run time of its end."""
    round_at_s: float = 0.0
    busy_fraction: float = 0.0
    epsilon: float | None = None
    best_round: int | None = None
    """The round of a client whose model is its best one, by its validation text."""
    accepted: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    strangers: dict[str, int] = field(default_factory=dict)
    """Refusals that an inner node gave to senders that are not its children."""
    bytes_up: int = 0
    bytes_down: int = 0
    state: str = "waiting"
    """The last event of the node's life. `state_at_s` is its run time, `state_detail` its detail."""
    state_at_s: float = 0.0
    state_detail: str = ""
    border: dict[str, Any] = field(default_factory=dict)
    """Of a node in another cluster: what has crossed the border, as `crossed` adds it up."""
    diverged: bool = False
    """Whether the last update that this node sent was refused because its values are not finite."""


def values_of(node: NodeState) -> dict[str, Any]:
    """The fields of a node by name, with the perplexities per byte of its losses. `asdict` takes ten times as long.

    The state of a node that has ended with a model of NaN is DIVERGED, not FINISHED.
    """
    state = DIVERGED if node.diverged and node.state == FINISHED else node.state
    perplexities = {of: None if getattr(node, loss) is None else perplexity(getattr(node, loss)) for of, loss in _OF}
    return {
        **vars(node),
        **perplexities,
        "refused": dict(node.refused),
        "strangers": dict(node.strangers),
        "state": state,
    }


def crossed(before: dict[str, Any], record: BorderRecord) -> dict[str, Any]:
    """What has crossed a border so far, with what one more record says.

    Args:
        before: the result for the record before; empty for the first one.
        record: of one side.
    """
    sums = {name: before.get(name, 0) + getattr(record, name) for name in BORDER_SUMS}
    newest = {name: getattr(record, name) for name in BORDER_NEWEST}
    kept = {name: before.get(name) if value is None else value for name, value in newest.items()}
    refused = Counter(before.get("refused", {})) + Counter(record.refused)
    now = {name: getattr(record, name) for name in ("parameters", "codec", "overlap", "offline_s")}
    return {**sums, **kept, **now, "refused": dict(refused)}


BORDER_SUMS = ("bytes_up", "bytes_down", "resumed", "accepted")
BORDER_NEWEST = ("mbit_up", "mbit_down", "tau", "every_s", "certificate_days")
"""Fields of a BorderRecord of which the newest value that is known stays."""
_OF = (
    ("perplexity_start", "loss_start"),
    ("perplexity", "loss"),
    ("clients_perplexity", "clients_loss"),
)


def finite(value: Any) -> Any:
    """Replace numbers that JSON does not know (NaN, infinities) by None, in containers too."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
