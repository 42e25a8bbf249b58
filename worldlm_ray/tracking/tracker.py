"""The single writer of a run folder: what the backends record becomes files that people and tools read.

    status.json     the newest snapshot, replaced whole about once a second
    tensorboard/    charts, heat maps, texts: see worldlm_ray/tracking/tensorboard.py
    metrics.jsonl   the same curves as lines of JSON, of all nodes: see worldlm_ray/tracking/curves.py
    summary.json    the result of a finished run

Of a world with more than MANY_CLIENTS clients, charts and metrics.jsonl hold a sample of them.

Storage that refuses costs no more than delay: files are written later, and the snapshot says why (`trouble`).

A tracker that opens an existing folder continues it: verdicts are counted again from the audit trail, which inner
nodes write themselves (worldlm_ray/tracking/audit.py); everything else comes from status.json and may be a second old.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from worldlm_ray.config.schema import BudgetConfig
from worldlm_ray.errors import RunError
from worldlm_ray.exchange.replies import ACCEPTED
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.rundir import STATUS
from worldlm_ray.records import (
    AggregationRecord,
    AttentionRecord,
    FinalRecord,
    MergeRecord,
    NodeSummary,
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
from worldlm_ray.run_clock import Stamp, seconds
from worldlm_ray.storage import filesystem
from worldlm_ray.tracking import audit
from worldlm_ray.tracking.charts import HISTOGRAM, Crowd, Lines, clean
from worldlm_ray.tracking.curves import Curves
from worldlm_ray.tracking.run_state import RunState
from worldlm_ray.tracking.run_texts import introduction, quoted
from worldlm_ray.tracking.sinks import OpenSink, RunFacts, Scalar
from worldlm_ray.tracking.status import read_status, replace_json
from worldlm_ray.tracking.tensorboard_charts import TensorBoardCharts

SINKS: tuple[OpenSink, ...] = (TensorBoardCharts, Curves.of)
"""What a run draws to, unless its tracker is told otherwise."""
STATUS_EVERY_S = 1.0
"""Wall seconds between two writes of status.json."""
STATUS_SHARE = 0.05
"""Share of the time that writing status.json may take: of a very large world it is written less often."""
MANY_CLIENTS = 512
"""A world with more clients shows a sample of them in its charts."""
SHOWN_CLIENTS = 64
"""Size of that sample, about. Of the inner nodes' aggregations the same fraction is shown."""
IMAGE_EVERY_S = 2.0
"""Wall seconds between two attention images of the whole run: one costs 50 to 100 ms."""
IMAGES_AT_END = 16
"""Attention images that may still be drawn when the tracker closes."""


class Tracker:
    """Keeps the state of a run and writes its folder. One tracker owns a folder, and one actor the tracker.

    Args:
        run_dir: the run folder; made when missing, continued when it holds an earlier part of the run.
        kinds: `world`, `federation` or `client` by the path of every node.
        hparams: settings for the HPARAMS tab, by dotted key.
        budget: what `progress` is measured against.
        texts: Markdown by tag for the TEXT page (`run_texts.introduction`).
        sinks: what charts are drawn to; each is made when the tracker opens.
        clock: monotonic seconds; it only paces files.
        wall: seconds since 1970.

    Raises:
        RunError: `kinds` is not a tree.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        kinds: Mapping[str, str],
        hparams: Mapping[str, Scalar],
        budget: BudgetConfig,
        texts: Mapping[str, str] | None = None,
        sinks: Sequence[OpenSink] = SINKS,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.run_dir = run_dir
        self._kinds, self._clock, self._wall = dict(kinds), clock, wall
        self._state = RunState(kinds, budget=budget)
        self._new_taus: dict[str, list[int]] = {}
        """Staleness of what each child sent since the last aggregation of its parent."""
        self._images: dict[tuple[str, str], AttentionRecord] = {}
        filesystem.make_folder(run_dir)
        try:
            status = read_status(run_dir)
        except RunError:
            status = {}  # A new run, or one that ended before its first status.
        self._state.restore(status, audit.read(run_dir))
        self._started_at: float = seconds(status.get("started_at")) or wall()
        self._root = next(path for path, kind in kinds.items() if kind == "world")
        self._lines = Lines(kinds)
        facts = RunFacts(
            run_dir=run_dir,
            root=self._root,
            lines=self._lines,
            hparams=hparams,
            texts=texts or {},
            started_at=self._started_at,
            now_s=self._state.now_s,
            clock=clock,
        )
        self._sinks = [open_sink(facts) for open_sink in sinks]
        clients = [path for path, kind in kinds.items() if kind == "client"]
        self._every = max(len(clients) // SHOWN_CLIENTS, 1) if len(clients) > MANY_CLIENTS else 1
        self._hidden = set(clients) - set(clients[:: self._every])
        """Clients that the charts leave out."""
        self._crowd = Crowd(len(clients))
        self._ended = False
        """Whether models have been measured for the last time."""
        self._status_s = 0.0
        """What the last write of status.json took."""
        self._last_status = self._last_image = -math.inf
        self._trouble = self._warning = ""
        self.flush()

    def record(self, *records: Record) -> None:
        """Take in what happened.

        Raises:
            RunError: a record names a node that is not in the tree; nothing of the batch is taken in.
        """
        for record in records:
            self._state.check(record)
        for record in records:
            self._state.apply(record)
            self._show(record)
        now = self._clock()
        if self._images and now - self._last_image >= IMAGE_EVERY_S:
            self._draw_next()
        if now - self._last_status >= max(STATUS_EVERY_S, self._status_s / STATUS_SHARE):
            self._write_status()
        for sink in self._sinks:
            sink.flush_if_due()

    def add(self, path: str, kind: str) -> None:
        """A node has joined the tree while the run goes on. One that is known already stays as it is."""
        if path not in self._state.nodes:
            self._state.add(path, kind)
            self._lines.add(path)

    def samples(self, texts: Mapping[str, str], *, now_s: float) -> None:
        """Show texts that the clients' models wrote; the step of each is the rounds of its client.

        Args:
            texts: by path of the client.
            now_s: run time in seconds.
        """
        for path, sample in texts.items():
            if path not in self._hidden:
                name = f"3 samples/{clean(path)}"
                for sink in self._sinks:
                    sink.text(name, quoted(sample), step=self._state.nodes[path].rounds, now_s=now_s)

    def warn(self, warning: str) -> None:
        """Show in `trouble` of the snapshot what is wrong with the run's machines. An empty text ends it."""
        self._warning = warning
        self._write_status()

    def snapshot(self) -> dict[str, Any]:
        """Everything that is known, ready for JSON: totals of the run, `trouble` with its files, `nodes` by path."""
        return {
            "run": self.run_dir.name,
            "trouble": next(filter(None, (self._trouble, *(sink.trouble for sink in self._sinks))), self._warning),
            "started_at": self._started_at,
            "updated_at": self._wall(),
            "updated": asdict(Stamp.now()),
            **self._state.snapshot(),
        }

    @property
    def warnings(self) -> list[dict[str, Any]]:
        """What an operator must know: see `Warnings.kept`."""
        return list(self._state.warnings.kept)

    def summaries(self) -> dict[str, NodeSummary]:
        """One line per node for `write_summary`."""
        return self._state.summaries()

    def staleness(self) -> dict[str, float | None]:
        """Mean staleness of the updates that each node sent; None where it sent none."""
        return {path: node.tau_mean for path, node in self._state.nodes.items()}

    def flush(self) -> None:
        """Bring every file up to date."""
        for sink in self._sinks:
            sink.flush()
        self._write_status()

    def close(self) -> None:
        """Draw what still waits, mark the run as ended in TensorBoard, and close every file."""
        for _ in range(min(len(self._images), IMAGES_AT_END)):
            self._draw_next()
        now_s = self._state.now_s
        self._show_crowd(now_s)
        for path, node in self._state.nodes.items() if self._ended else ():
            if node.kind != "client":  # once, when all clients below have been measured
                self._put(path, {"clients_loss": node.clients_loss}, now_s=now_s)
        for sink in self._sinks:
            sink.finish(now_s=self._state.now_s)
        self.flush()
        for sink in self._sinks:
            sink.close()

    # What each record shows, after the state has taken it in.

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

    def _show(self, record: Record) -> None:
        node, path, now_s = self._state.nodes[record.node], record.node, record.now_s
        if isinstance(record, StartRecord | RoundRecord) and self._lines.crowded and self._crowd.is_due():
            self._show_crowd(now_s)
        if path in self._hidden:
            return
        match record:
            case StartRecord():
                self._show_losses(path, now_s)
                for inner in self._state.above[path] if node.rounds == 0 else ():
                    self._show_own_loss(inner, now_s)  # of the initial model: every node has it
            case OwnModelRecord():
                if node.loss_measured_s == now_s:  # else other texts are still to be measured
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
                # A newer one takes the place of one that still waits, so every node gets its turn.
                self._images[path, record.direction] = record
            case MergeRecord():
                self._put(path, {"merge": record.m, "agreement": record.agreement}, now_s=now_s)
            case PrivacyRecord():
                self._show_privacy(path, record.epsilon, now_s)
            case PushRecord():
                self._put(path, {"bytes_up": node.bytes_up}, now_s=now_s)
            case PullRecord():
                version = node.version if node.kind == "client" else None
                self._put(path, {"bytes_down": node.bytes_down, "version": version}, now_s=now_s)

    def _show_privacy(self, path: str, epsilon: float, now_s: float) -> None:
        """Epsilon of a client, and the largest below each node above it: no client there has less protection."""
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
        """Of the node's own model."""
        loss = self._state.nodes[path].loss
        self._put(path, {"loss": loss, "perplexity": None if loss is None else perplexity(loss)}, now_s=now_s)

    def _show_crowd(self, now_s: float) -> None:
        """The lines of all clients together; their tokens are those of one client, in the mean."""
        clients = [node for node in self._state.nodes.values() if node.kind == "client"]
        if not self._lines.crowded or not clients:
            return
        world = self._state.nodes[self._root]
        tokens = world.tokens // len(clients)
        losses = [node.loss for node in clients if node.loss is not None]
        speeds = [node.tokens_per_s for node in clients if node.rounds]
        for line, values in self._crowd.point(losses, world.clients_loss, speeds).items():
            self._draw(line, "client", values, now_s=now_s, tokens=tokens)

    def _show_verdict(self, record: VerdictRecord) -> None:
        edge = self._state.edge(record.node, record.sender)
        if edge is None:
            count = self._state.nodes[record.node].strangers[record.verdict]
            self._put(record.node, {f"refused_strangers/{record.verdict}": count}, now_s=record.now_s)
            return
        node = self._state.nodes[edge]
        if record.tau >= 0 and node.kind == "client" and self._lines.crowded:
            self._crowd.hear_tau(record.tau)
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

    def _draw_next(self) -> None:
        record = self._images.pop(next(iter(self._images)))
        for sink in self._sinks:
            sink.attention(record)
        self._last_image = self._clock()

    def _write_status(self) -> None:
        began = self._clock()
        try:
            replace_json(self.run_dir / STATUS, self.snapshot())
            self._trouble = ""
        except OSError as error:
            self._trouble = f"cannot write {self.run_dir / STATUS}: {error}; it waits"
        self._last_status = self._clock()
        self._status_s = self._last_status - began


def open_tracker(plan: Plan) -> Tracker:
    """The tracker of a run, with the settings, the texts and the sinks that its plan asks for.

    Raises:
        OSError: the storage refused.
    """
    return Tracker(
        plan.run_dir,
        kinds=plan.kinds,
        hparams=plan.hparams(),
        budget=plan.config.budget,
        texts=introduction(plan),
    )
