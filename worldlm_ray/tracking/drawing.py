"""What each record of a run adds to its charts, once the state has taken it in."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from worldlm_ray.exchange.replies import ACCEPTED
from worldlm_ray.records import (
    AggregationRecord,
    AttentionRecord,
    BorderRecord,
    FinalRecord,
    MergeRecord,
    OwnModelRecord,
    PrivacyRecord,
    PullRecord,
    PushRecord,
    Record,
    RoundRecord,
    StartRecord,
    VerdictRecord,
    perplexity,
)
from worldlm_ray.tracking.charts import HISTOGRAM, Lines, SharedLines, clean
from worldlm_ray.tracking.node_state import BORDER_NEWEST, BORDER_SUMS
from worldlm_ray.tracking.run_state import RunState
from worldlm_ray.tracking.run_texts import quoted
from worldlm_ray.tracking.sinks import Sink

MANY_CLIENTS = 512
"""A world with more clients shows a sample of them in its charts."""
SHOWN_CLIENTS = 64
"""Size of that sample, about. Of the inner nodes' aggregations the same fraction is shown."""
IMAGE_EVERY_S = 2.0
"""Wall seconds between two attention images of the whole run: one costs 50 to 100 ms."""
IMAGES_AT_END = 16
"""Attention images that may still be drawn when the run ends."""

MOST_CANDIDATES = 12
"""Candidates of a blend with a curve of their mean weight."""
ATTENTION = "attention"


class Drawing:
    """Draws a run to its sinks.

    Args:
        state: of the run.
        sinks: what is drawn to.
        lines: which nodes have a line where not every node can have one.
        clock: monotonic seconds; it only paces images.
    """

    def __init__(self, state: RunState, sinks: Sequence[Sink], *, lines: Lines, clock: Callable[[], float]) -> None:
        self._state, self._sinks, self._lines, self._clock = state, sinks, lines, clock
        clients = [path for path, node in state.nodes.items() if node.kind == "client"]
        self._root = next(path for path in state.nodes if "/" not in path)
        self._every = max(len(clients) // SHOWN_CLIENTS, 1) if len(clients) > MANY_CLIENTS else 1
        self._hidden = set(clients) - set(clients[:: self._every])
        """Clients that the charts leave out."""
        self._shared = SharedLines(len(clients))
        self._new_taus: dict[str, list[int]] = {}
        """Staleness of what each child sent since the last aggregation of its parent."""
        self._images: dict[tuple[str, str], AttentionRecord] = {}
        self._last_image = -math.inf
        self._ended = False
        """Whether models have been measured for the last time."""

    def samples(self, texts: Mapping[str, str], *, now_s: float) -> None:
        """Show texts by path of the client whose model wrote them."""
        for path, sample in texts.items():
            if path not in self._hidden:
                name = f"3 samples/{clean(path)}"
                for sink in self._sinks:
                    sink.text(name, quoted(sample), step=self._state.nodes[path].rounds, now_s=now_s)

    def draw_image_if_due(self) -> None:
        """Draw the attention image that has waited longest, if the last one was long enough ago."""
        if self._images and self._clock() - self._last_image >= IMAGE_EVERY_S:
            self._draw_image()

    def finish(self) -> None:
        """Draw what still waits, and what is known only at the end."""
        for _ in range(min(len(self._images), IMAGES_AT_END)):
            self._draw_image()
        now_s = self._state.now_s
        self._show_shared_lines(now_s)
        for path, node in self._state.nodes.items() if self._ended else ():
            if node.kind != "client":  # once, when all clients below have been measured
                self._put(path, {"clients_loss": node.clients_loss}, now_s=now_s)

    def _draw_image(self) -> None:
        record = self._images.pop(next(iter(self._images)))
        for sink in self._sinks:
            sink.attention(record)
        self._put(record.node, attention_means(record), now_s=record.now_s)
        self._last_image = self._clock()

    def _put(self, path: str, values: Mapping[str, float | None], *, now_s: float) -> None:
        """Add a point to curves of a node, in every sink.

        Args:
            path: of the node.
            values: by name, see worldlm_ray/tracking/charts.py.
            now_s: run time in seconds.
        """
        node = self._state.nodes[path]
        self._draw(path, node.kind, values, now_s=now_s, tokens=node.tokens)

    def _draw(self, line: str, kind: str, values: Mapping[str, float | None], *, now_s: float, tokens: int) -> None:
        for sink in self._sinks:
            sink.scalars(line, kind, values, now_s=now_s, tokens=tokens)

    def show(self, record: Record) -> None:
        """Draw what a record changes, after the state has taken it in."""
        node, path, now_s = self._state.nodes[record.node], record.node, record.now_s
        if isinstance(record, StartRecord | RoundRecord) and self._lines.are_shared and self._shared.is_due():
            self._show_shared_lines(now_s)
        if path in self._hidden:
            return
        match record:
            case StartRecord():
                self._show_losses(path, now_s)
                for inner in self._state.above[path] if node.rounds == 0 else ():
                    self._show_own_loss(inner, now_s)  # of the initial model, which every node has
            case OwnModelRecord():
                if node.loss_measured_s == now_s:  # otherwise other texts are not measured yet
                    self._show_own_loss(path, now_s)
            case FinalRecord():
                self._show_own_loss(path, now_s)
                self._ended = True
            case RoundRecord():
                self._show_round(record)
            case VerdictRecord():
                self._show_verdict(record)
            case AggregationRecord():
                self._show_aggregation(record)
            case AttentionRecord():
                # A newer record replaces one that still waits, so the nodes take turns.
                self._images[path, record.direction] = record
            case MergeRecord():
                self._put(path, {"merge": record.m}, now_s=now_s)
            case PrivacyRecord():
                self._show_privacy(path, record.epsilon, now_s)
            case PushRecord():
                self._put(path, {"bytes_up": node.bytes_up}, now_s=now_s)
            case PullRecord():
                version = node.version if node.kind == "client" else None
                self._put(path, {"bytes_down": node.bytes_down, "version": version}, now_s=now_s)
            case BorderRecord():
                self._show_border(record)

    def _show_border(self, record: BorderRecord) -> None:
        """What has crossed a border so far, and how well its line does now."""
        so_far = self._state.nodes[record.node].border
        values: dict[str, float | None] = {f"border_{name}": so_far[name] for name in BORDER_SUMS}
        values |= {f"border_{name}": getattr(record, name) for name in (*BORDER_NEWEST, "offline_s")}
        values |= {f"border_refused/{reason}": so_far["refused"][reason] for reason in record.refused}
        self._put(record.node, values, now_s=record.now_s)

    def _show_privacy(self, path: str, epsilon: float, now_s: float) -> None:
        """Epsilon of a client, and for each node above it the largest epsilon of its clients."""
        self._put(path, {"epsilon": epsilon}, now_s=now_s)
        for inner in self._state.above[path]:
            below = [
                n.epsilon for p, n in self._state.nodes.items() if p.startswith(f"{inner}/") and n.kind == "client"
            ]
            self._put(inner, {"epsilon": max(e for e in below if e is not None)}, now_s=now_s)

    def _show_round(self, record: RoundRecord) -> None:
        path, now_s = record.node, record.now_s
        if record.epsilon is not None:
            self._show_privacy(path, record.epsilon, now_s)
        values = {
            "tokens_per_s": record.tokens_per_s,
            "busy_fraction": record.busy_fraction,
            "train_loss": record.train_loss,
            "learning_rate": record.learning_rate,
        }
        self._put(path, values, now_s=now_s)
        for inner in self._state.above[path]:
            self._put(inner, {"tokens_per_s": self._state.nodes[inner].tokens_per_s}, now_s=now_s)
        if record.loss is not None:
            self._show_losses(path, now_s)

    def _show_losses(self, client: str, now_s: float) -> None:
        """The client's loss, and the means over the clients below every inner node above it."""
        self._show_own_loss(client, now_s)
        for path in self._state.above[client]:
            self._put(path, {"clients_loss": self._state.nodes[path].clients_loss}, now_s=now_s)

    def _show_own_loss(self, path: str, now_s: float) -> None:
        """Loss and perplexity of the node's own model."""
        loss = self._state.nodes[path].loss
        self._put(path, {"loss": loss, "perplexity": None if loss is None else perplexity(loss)}, now_s=now_s)

    def _show_shared_lines(self, now_s: float) -> None:
        """The lines of all clients together. Their step is the mean number of tokens per client."""
        clients = [node for node in self._state.nodes.values() if node.kind == "client"]
        if not self._lines.are_shared or not clients:
            return
        world = self._state.nodes[self._root]
        tokens = world.tokens // len(clients)
        losses = [node.loss for node in clients if node.loss is not None]
        speeds = [node.tokens_per_s for node in clients if node.rounds]
        for line, values in self._shared.point(losses, world.clients_loss, speeds).items():
            self._draw(line, "client", values, now_s=now_s, tokens=tokens)

    def _show_verdict(self, record: VerdictRecord) -> None:
        edge = self._state.edge(record.node, record.sender)
        if edge is None:
            count = self._state.nodes[record.node].strangers[record.verdict]
            self._put(record.node, {f"refused_strangers/{record.verdict}": count}, now_s=record.now_s)
            return
        node = self._state.nodes[edge]
        if record.tau >= 0 and node.kind == "client" and self._lines.are_shared:
            self._shared.add_tau(record.tau)
        if edge in self._hidden:
            return
        if record.tau >= 0:
            self._new_taus.setdefault(edge, []).append(record.tau)
        if record.verdict == ACCEPTED:
            self._put(edge, {"accepted": node.accepted}, now_s=record.now_s)
        else:
            count = node.refused[record.verdict]
            self._put(edge, {f"refused/{record.verdict}": count}, now_s=record.now_s)

    def _show_aggregation(self, record: AggregationRecord) -> None:
        path, now_s = record.node, record.now_s
        if record.version % self._every:
            return
        values = {
            "version": record.version,
            "step_norm": record.step_norm,
            "busy_fraction": record.busy_fraction,
        }
        self._put(path, values, now_s=now_s)
        for child in [child for child in self._new_taus if self._state.above[child][0] == path]:
            taus, counts = self._new_taus.pop(child), self._state.taus[child]
            self._put(child, {"tau": sum(taus) / len(taus)}, now_s=now_s)
            for sink in self._sinks:
                sink.histogram(child, HISTOGRAM, counts, step=record.version, now_s=now_s)


def attention_means(record: AttentionRecord) -> dict[str, float | None]:
    """Mean weight over key layers, of the candidates that weigh most: `attention/DIRECTION/CANDIDATE`."""
    layers = max(len(record.layers), 1)
    means = {name: math.fsum(row[at] for row in record.weights) / layers for at, name in enumerate(record.candidates)}
    most = sorted(means, key=lambda name: -means[name])[:MOST_CANDIDATES]
    return {f"{ATTENTION}/{record.direction}/{name}": means[name] for name in most}
