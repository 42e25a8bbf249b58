"""What is known of a running world, node by node. Records go in, one snapshot comes out. No files, no clock.

Counters of messages belong to an edge and stand at its lower end: `accepted` of `world/europe` counts the
updates of europe that the world accepted. The world, which has no parent, has none.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from worldlm_ray.config.schema import BudgetConfig
from worldlm_ray.errors import RunError
from worldlm_ray.exchange.replies import ACCEPTED
from worldlm_ray.records import (
    AggregationRecord,
    BorderRecord,
    FinalRecord,
    LifeRecord,
    NodeSummary,
    OwnModelRecord,
    PrivacyRecord,
    ProgressRecord,
    PullRecord,
    PushRecord,
    Record,
    RoundRecord,
    StartRecord,
    VerdictRecord,
)
from worldlm_ray.run_clock import seconds
from worldlm_ray.tracking.node_state import DIVERGED, FINISHED, KINDS, REMOTE, NodeState, crossed, finite, values_of
from worldlm_ray.tracking.run_warnings import NOT_FINITE, Warnings

T = TypeVar("T", NodeState, OwnModelRecord)
SILENT = 3.0
"""A client is silent if it has ended no round for this multiple of its last round's time. It then counts as idle."""
CLIENTS_SUMMED_ALWAYS = 256
"""Up to this many clients below an inner node, its throughput is recomputed at every record."""
SUMS_PER_ROUND = 16
"""Above that number, it is recomputed this many times per round of all clients."""


class RunState:
    """The state of every node of one run.

    Args:
        kinds: `world`, `federation`, `client` or `remote` by the path of every node.
        budget: what `progress` is measured against.

    Raises:
        RunError: `kinds` is not a tree.
    """

    def __init__(self, kinds: Mapping[str, str], *, budget: BudgetConfig) -> None:
        _check_tree(kinds)
        self.nodes: dict[str, NodeState] = {}
        self.above: dict[str, tuple[str, ...]] = {}
        """Inner nodes above each node, the nearest first."""
        self.taus: dict[str, Counter[int]] = {}
        """How often each staleness was seen among the updates that a node sent."""
        self._last_seq: dict[str, int] = {}
        """Highest accepted seq of every sender."""
        self.now_s = 0.0
        self.warnings = Warnings()
        self._budget = budget
        self._clients: dict[str, list[NodeState]] = {}
        self._own_models: dict[str, dict[str, OwnModelRecord]] = {}
        """The newest measurement by each client below, by inner node."""
        self._rounds: Counter[str] = Counter()
        """Rounds recorded below each inner node."""
        for path, kind in kinds.items():
            self.add(path, kind)

    def add(self, path: str, kind: str) -> None:
        """Add a node that has joined the tree. Its parent is known."""
        node = self.nodes[path] = NodeState(kind=kind)
        self.above[path], self.taus[path], self._clients[path] = (
            tuple(_ancestors(path)),
            Counter(),
            [],
        )
        for inner in self.above[path] if kind == "client" else ():
            self._clients[inner].append(node)

    def node(self, path: str) -> NodeState:
        """The node at this path.

        Raises:
            RunError: there is none.
        """
        if path not in self.nodes:
            known = ", ".join(self.nodes)
            raise RunError(f"a record names the node {path!r}, which is not in the tree ({known}); name one of these")
        return self.nodes[path]

    def edge(self, receiver: str, sender: str) -> str | None:
        """Path of the child that sent a message: `sender` is its path or its name. None if it is no child."""
        path = sender if sender in self.nodes else f"{receiver}/{sender}"
        return path if self.above.get(path, ("",))[:1] == (receiver,) else None

    def check(self, record: Record) -> None:
        """Raise what `apply` would.

        Raises:
            RunError: the record names an unknown node, or one that cannot have done this.
        """
        node = self.node(record.node)
        if isinstance(record, RoundRecord | ProgressRecord | StartRecord) and node.kind != "client":
            raise RunError(f"{record.node!r} is a {node.kind}, but only clients train and measure; name a client")
        if isinstance(record, OwnModelRecord) and record.node not in self.above.get(record.by, ()):
            raise RunError(f"{record.by!r} has measured {record.node!r}, which is not above it; name a node above")

    def apply(self, record: Record) -> None:
        """Take in what happened.

        Raises:
            RunError: see `check`.
        """
        self.check(record)
        self.now_s = max(self.now_s, seconds(record.now_s))
        node = self.nodes[record.node]
        match record:
            case RoundRecord():
                self._round(node, record)
            case ProgressRecord():
                self._count_progress(node, record)
            case StartRecord():
                self._start(node, record)
            case OwnModelRecord():
                self._own_model(node, record)
            case FinalRecord():
                self._final(node, record)
            case VerdictRecord():
                sender = self.edge(record.node, record.sender)
                if sender is not None:
                    self.warnings.refusal(record, sender=sender, known=self.nodes[sender].refused)
                self.count(record.node, record.sender, seq=record.seq, tau=record.tau, verdict=record.verdict)
            case AggregationRecord():
                node.version, node.tokens_aggregated = record.version, record.total_tokens
                node.busy_fraction = record.busy_fraction
            case PullRecord():
                node.bytes_down += record.bytes
                if node.kind == "client":  # An inner node counts its version itself.
                    node.version = record.version
            case PushRecord():
                node.bytes_up += record.bytes
            case PrivacyRecord():
                node.epsilon = record.epsilon
            case LifeRecord():
                node.state, node.state_detail, node.state_at_s = record.event, record.detail, record.now_s
                if record.event == "warning":
                    self.warnings.add(record.node, record.detail, now_s=record.now_s)
            case BorderRecord():
                node.border = crossed(node.border, record)

    def count(self, receiver: str, sender: str, *, seq: int, tau: int, verdict: str) -> None:
        """Count one verdict. An update that is accepted again after a restart of the receiver counts once."""
        path = self.edge(receiver, sender)
        if path is None:
            strangers = self.nodes[receiver].strangers
            strangers[verdict] = strangers.get(verdict, 0) + 1
            return
        node, taus = self.nodes[path], self.taus[path]
        if verdict == ACCEPTED:
            if seq <= self._last_seq.get(path, 0):
                return
            self._last_seq[path] = seq
            node.accepted += 1
            node.diverged = False
        else:
            node.diverged = verdict == NOT_FINITE or node.diverged
            node.refused[verdict] = node.refused.get(verdict, 0) + 1
        if tau >= 0:  # A malformed update may claim a version that does not exist yet.
            seen = taus.total()
            taus[tau] += 1
            node.tau, node.tau_mean = tau, ((node.tau_mean or 0.0) * seen + tau) / (seen + 1)

    def snapshot(self) -> dict[str, Any]:
        """Totals of the run, and `nodes` by path, ready for JSON: numbers that are not finite become null."""
        nodes = self.nodes.values()
        clients = [node for node in nodes if node.kind == "client"]
        refused: Counter[str] = Counter()
        for node in nodes:
            refused.update(node.refused)
            refused.update(node.strangers)
        values = {
            "now_s": self.now_s,
            "progress": self._progress(clients),
            "budget": {unit: amount for unit, amount in vars(self._budget).items() if amount is not None},
            "tokens": sum(node.tokens for node in clients),
            "tokens_per_s": self._speed(clients),
            "accepted": sum(node.accepted for node in nodes),
            "refused": dict(refused),
            "bytes_up": sum(node.bytes_up for node in nodes),
            "bytes_down": sum(node.bytes_down for node in nodes),
            "warnings": list(self.warnings.kept),
            "warnings_left_out": self.warnings.left_out,
            "nodes": {path: values_of(node) for path, node in self.nodes.items()},
        }
        return dict(finite(values))

    def summaries(self) -> dict[str, NodeSummary]:
        """One line per node for summary.json."""
        names = {each.name for each in fields(NodeSummary)}
        return {
            path: NodeSummary(**{name: value for name, value in values_of(node).items() if name in names})
            for path, node in self.nodes.items()
        }

    def restore(self, snapshot: Mapping[str, Any], verdicts: Iterable[Mapping[str, Any]]) -> None:
        """Continue from an earlier snapshot, and count again every verdict of the run.

        Nodes that have left the tree since then are forgotten; nodes that are new start empty.
        """
        self.now_s = seconds(snapshot.get("now_s"))
        self.warnings.kept = list(snapshot.get("warnings", []))
        self.warnings.left_out = snapshot.get("warnings_left_out", 0)
        counted = {"accepted", "refused", "strangers", "tau_mean", "diverged"}
        kept = {each.name for each in fields(NodeState)} - counted - {"kind"}
        for path, values in snapshot.get("nodes", {}).items():
            if "clients_loss" not in values and values["kind"] != "client":
                # written before the two values were separate
                values = {**values, "clients_loss": values["loss"], "loss": None}
            for name in kept & values.keys() if path in self.nodes else ():
                setattr(self.nodes[path], name, values[name])
            if values.get("state") == DIVERGED and path in self.nodes:
                self.nodes[path].state = FINISHED
        for inner, clients in self._clients.items():
            if self.nodes[inner].kind != "client":  # clients may have left
                self.nodes[inner].steps = sum(client.steps for client in clients)
                self.nodes[inner].tokens = sum(client.tokens for client in clients)
        for verdict in verdicts:
            if verdict["node"] in self.nodes and "verdict" in verdict:
                known = {name: verdict[name] for name in ("sender", "seq", "tau", "verdict")}
                self.count(verdict["node"], **known)

    def _start(self, node: NodeState, record: StartRecord) -> None:
        node.heldout_bytes, node.private = record.heldout_bytes, record.private
        # A client that was restarted measures again: its first measurement stays its start.
        if node.loss_start is None:
            node.loss_start = record.loss
        self._measured(node, record)
        for inner in self.above[record.node]:
            self.nodes[inner].private = all(client.private for client in self._clients[inner])
            if record.heldout_bytes:
                self._average(inner)

    def _own_model(self, node: NodeState, record: OwnModelRecord) -> None:
        """The loss of an inner node's model: the newest measurement on each text below, weighted by bytes.

        It changes only when every client that trains now has measured. A mean over fewer texts is another quantity.
        """
        texts = self._own_models.setdefault(record.node, {})
        texts[record.by] = record
        for path in [path for path in texts if self.nodes[path].state == "left"]:
            del texts[path]
        counted = {id(self.nodes[path]) for path in texts}
        training = [
            client for client in self._clients[record.node] if client.heldout_bytes and self._is_training(client)
        ]
        if not texts or any(id(client) not in counted for client in training):
            return
        newest = list(texts.values())
        node.loss = _mean(newest, lambda text: text.loss)
        per_token = [text.perplexity_per_token for text in newest if text.perplexity_per_token]
        log = _mean(newest, lambda text: math.log(text.perplexity_per_token or 1.0))
        node.perplexity_per_token = math.exp(log) if log is not None and len(per_token) == len(newest) else None
        node.loss_version = min(each.version for each in texts.values())
        node.loss_measured_s = record.now_s

    def _final(self, node: NodeState, record: FinalRecord) -> None:
        node.heldout_bytes = record.heldout_bytes
        self._measured(node, record)
        if node.kind != "client":
            node.loss_version = record.version
        for inner in self.above[record.node] if node.kind == "client" else ():
            self._average(inner)

    def _measured(self, node: NodeState, record: StartRecord | RoundRecord | FinalRecord) -> None:
        """The node's own model was measured."""
        if record.loss is not None:
            node.loss, node.loss_measured_s = record.loss, record.now_s
            node.perplexity_per_token = record.perplexity_per_token

    def _round(self, node: NodeState, record: RoundRecord) -> None:
        trained_s = (record.tokens - node.tokens) / record.tokens_per_s if record.tokens_per_s else 0.0
        since_s = record.now_s - node.round_at_s if node.rounds else 0.0
        node.round_s, node.round_at_s = max(trained_s, since_s), record.now_s
        node.tokens_per_s, node.busy_fraction = record.tokens_per_s, record.busy_fraction
        if record.epsilon is not None:  # with client-level privacy the aggregator records it
            node.epsilon = record.epsilon
        node.best_round = record.best_round
        self._measured(node, record)
        self._count_progress(node, record)
        for inner in self.above[record.node] if record.loss is not None else ():
            self._average(inner)

    def _count_progress(self, node: NodeState, record: RoundRecord | ProgressRecord) -> None:
        steps, tokens = record.steps - node.steps, record.tokens - node.tokens
        node.rounds, node.steps, node.tokens = record.round, record.steps, record.tokens
        for inner in self.above[record.node]:
            above, clients = self.nodes[inner], self._clients[inner]
            above.steps += steps
            above.tokens += tokens
            self._rounds[inner] += 1
            if len(clients) <= CLIENTS_SUMMED_ALWAYS or self._rounds[inner] % (len(clients) // SUMS_PER_ROUND) == 0:
                above.tokens_per_s = self._speed(clients)

    def _speed(self, clients: list[NodeState]) -> float:
        """Tokens per second of the clients that train."""
        return sum(client.tokens_per_s for client in clients if self._is_training(client))

    def _is_training(self, client: NodeState) -> bool:
        """Whether a client counts as training."""
        return self.now_s - client.round_at_s <= SILENT * client.round_s

    def _average(self, path: str) -> None:
        """Means over the clients below that have measured.

        Every node begins with the initial model, so the mean of its losses is its loss on all texts. An inner node has
        the initial model at version 0.
        """
        node = self.nodes[path]
        measured = [client for client in self._clients[path] if client.heldout_bytes > 0]
        node.heldout_bytes = sum(client.heldout_bytes for client in measured)
        node.clients_loss = _mean(measured, lambda client: client.loss)
        node.loss_start = _mean(measured, lambda client: client.loss_start)
        if not node.loss_version and path not in self._own_models:
            node.loss, node.loss_version, node.loss_measured_s = node.loss_start, 0, self.now_s

    def _progress(self, clients: list[NodeState]) -> float:
        """Fraction of the budget that is spent, 0 to 1."""
        budget, share, root = self._budget, 0.0, next(iter(self.nodes.values()))
        if budget.tokens:  # the root has aggregated those of other clusters, too
            share = max(sum(client.tokens for client in clients), root.tokens_aggregated) / budget.tokens
        elif budget.rounds and clients:
            done = sum(min(client.rounds, budget.rounds) for client in clients)
            share = done / (budget.rounds * len(clients))
        elif budget.seconds:
            share = self.now_s / budget.seconds
        return min(share, 1.0)


def _mean(texts: list[T], get: Callable[[T], float | None]) -> float | None:
    """Mean over clients' texts, weighted by their bytes."""
    pairs = [(text.heldout_bytes, value) for text in texts if (value := get(text)) is not None]
    total = sum(weight for weight, _ in pairs)
    return sum(weight * value for weight, value in pairs) / total if total else None


def _ancestors(path: str) -> Iterator[str]:
    while path := path.rpartition("/")[0]:
        yield path


def _check_tree(kinds: Mapping[str, str]) -> None:
    for path, kind in kinds.items():
        if kind not in KINDS:
            raise RunError(f"node {path!r} has the kind {kind!r}; give one of {', '.join(KINDS)}")
        parent = path.rpartition("/")[0]
        if (kind == "world") != (parent == "") and kind != REMOTE:
            raise RunError(f"node {path!r} is a {kind}; let the world, and only the world, have no parent")
        if parent and kinds.get(parent) not in ("world", "federation", REMOTE):
            raise RunError(
                f"node {path!r} hangs under {parent!r}, which is no inner node; name a federation or the world"
            )
    if sum("/" not in path for path in kinds) != 1:
        raise RunError("the tree must have exactly one world; give one path without a slash")
