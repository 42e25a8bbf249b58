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

import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from worldlm_ray.config.schema import BudgetConfig
from worldlm_ray.errors import RunError
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
from worldlm_ray.tracking.charts import EACH, HISTOGRAM, Crowd, Lines, charts_of, clean
from worldlm_ray.tracking.curves import Curves
from worldlm_ray.tracking.run_state import ACCEPTED, RunState, finite
from worldlm_ray.tracking.run_texts import quoted
from worldlm_ray.tracking.status_fields import wrong_field
from worldlm_ray.tracking.tensorboard import Board, Scalar

STATUS, SUMMARY, TENSORBOARD = "status.json", "summary.json", "tensorboard"
FAILED = "failed"
"""`status` of a run that has ended with an error; `reason` stands beside it."""
STATUS_EVERY_S = 1.0
"""Wall seconds between two writes of status.json."""
STATUS_SHARE = 0.05
"""Share of the time that writing status.json may take: of a very large world it is written less often."""
MANY_CLIENTS = 512
"""Of a world with more clients, the charts show every so-many-th client, ..."""
SHOWN_CLIENTS = 64
"""... about so many of them, and every so-many-th aggregation of the inner nodes."""
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
        self._curves = Curves(run_dir, clock=clock)
        self._board = Board(run_dir / TENSORBOARD, root=self._root, started_at=self._started_at)
        self._charted: set[tuple[str, str]] = set()
        """Names of the quantities that have a chart already, with the kind of the node."""
        self._introduce(hparams, texts or {})
        self._lines = Lines(kinds)
        clients = [path for path, kind in kinds.items() if kind == "client"]
        self._every = max(len(clients) // SHOWN_CLIENTS, 1) if len(clients) > MANY_CLIENTS else 1
        self._hidden = set(clients) - set(clients[:: self._every])
        """Clients without curves of their own."""
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
        self._curves.flush_if_due()

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
                self._board.text(name, quoted(sample), step=self._state.nodes[path].rounds, now_s=now_s)

    def warn(self, warning: str) -> None:
        """Have `trouble` of the snapshot say what the machines of the run suffer from; an empty text ends it."""
        self._warning = warning
        self._write_status()

    def snapshot(self) -> dict[str, Any]:
        """Everything that is known, ready for JSON: totals of the run, `trouble` with its files, `nodes` by path."""
        return {
            "run": self.run_dir.name,
            "trouble": self._trouble or self._board.trouble or self._curves.trouble or self._warning,
            "started_at": self._started_at,
            "updated_at": self._wall(),
            "updated": asdict(Stamp.now()),
            **self._state.snapshot(),
        }

    @property
    def warnings(self) -> list[dict[str, Any]]:
        """What an operator must know: see `RunState.warnings`."""
        return list(self._state.warnings)

    def summaries(self) -> dict[str, NodeSummary]:
        """One line per node for `write_summary`."""
        return self._state.summaries()

    def staleness(self) -> dict[str, float | None]:
        """Mean staleness of the updates that each node sent; None where it sent none."""
        return {path: node.tau_mean for path, node in self._state.nodes.items()}

    def flush(self) -> None:
        """Bring every file up to date."""
        self._curves.flush()
        self._write_status()
        self._board.flush()

    def close(self) -> None:
        """Draw what still waits, mark the run as ended in TensorBoard, and close every file."""
        for _ in range(min(len(self._images), IMAGES_AT_END)):
            self._draw_next()
        now_s = self._state.now_s
        self._show_crowd(now_s)
        for path, node in self._state.nodes.items() if self._ended else ():
            if node.kind != "client":  # once, when all clients below have been measured
                self._put(path, {"clients_loss": node.clients_loss}, now_s=now_s)
        self._board.finish(now_s=self._state.now_s)
        self.flush()
        self._board.close()

    # What each record shows, after the state has taken it in.

    def _introduce(self, hparams: Mapping[str, Scalar], texts: Mapping[str, str]) -> None:
        names = {
            "loss": "World's own model: loss (nats/byte)",
            "clients_loss": "Clients' own models: mean loss (nats/byte)",
            "perplexity": "World's own model: perplexity per byte",
            "version": "World: version",
        }
        metrics = {charts_of(name, "world")[0].tag: shown for name, shown in names.items()}
        self._board.hparams(hparams, metrics=metrics, run=self.run_dir.name)
        for name, markdown in texts.items():
            self._board.text(name, markdown, now_s=self._state.now_s)

    def _put(self, path: str, values: Mapping[str, float | None], *, now_s: float) -> None:
        """Add a point to curves of a node, in charts if it has a line there, and in metrics.jsonl.

        Args:
            path: of the node.
            values: by name, see worldlm_ray/tracking/charts.py.
            now_s: run time in seconds.
        """
        node = self._state.nodes[path]
        self._curves.add(path, values, now_s=now_s, tokens=node.tokens)
        if path in self._lines:
            self._draw(path, node.kind, values, now_s=now_s, tokens=node.tokens)
        elif node.kind == "client" and values.get("loss") is not None:
            self._draw(self._root, "client", {f"{EACH}/{path}": values["loss"]}, now_s=now_s, tokens=node.tokens)

    def _draw(self, line: str, kind: str, values: Mapping[str, float | None], *, now_s: float, tokens: int) -> None:
        """Add a point to every chart that shows these values."""
        by_time, by_tokens = dict[str, float | None](), dict[str, float | None]()
        for name, value in values.items():
            for chart in charts_of(name, kind) if value is not None else ():
                (by_tokens if chart.by == "tokens" else by_time)[chart.tag] = value
        self._board.scalars(line, by_time, now_s=now_s)
        self._board.scalars(line, by_tokens, now_s=now_s, step=tokens)
        names = {(name.partition("/")[0], kind) for name, value in values.items() if value is not None}
        if not names <= self._charted:
            self._charted |= names
            tags = (chart.tag for known in self._charted for chart in charts_of(*known))
            self._board.layout(tags, now_s=now_s)

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
            self._curves.add(line, values, now_s=now_s, tokens=tokens)

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
            if child in self._lines:
                self._board.histogram(child, HISTOGRAM, counts, step=record.version, now_s=now_s)

    def _draw_next(self) -> None:
        self._board.attention(self._images.pop(next(iter(self._images))))
        self._last_image = self._clock()

    def _write_status(self) -> None:
        began = self._clock()
        try:
            _replace_json(self.run_dir / STATUS, self.snapshot())
            self._trouble = ""
        except OSError as error:
            self._trouble = f"cannot write {self.run_dir / STATUS}: {error}; it waits"
        self._last_status = self._clock()
        self._status_s = self._last_status - began


def read_status(run_dir: Path) -> dict[str, Any]:
    """The newest snapshot of a run, running or not.

    Raises:
        RunError: there is no run in this folder, or its status cannot be read.
    """
    path = run_dir / STATUS
    try:
        status = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(f"there is no run in {str(run_dir)!r}: it has no {STATUS}; give a run's folder") from None
    except (ValueError, RecursionError) as error:
        raise RunError(f"{str(path)!r} is not valid JSON ({error}); resume the run to write it again") from error
    if not isinstance(status, dict):
        raise RunError(f"{str(path)!r} holds a {type(status).__name__}, not a mapping; resume the run to mend it")
    if wrong := wrong_field(status):
        raise RunError(f"{str(path)!r} is no status of a run: {wrong}; resume the run to write it again")
    return status


def record_failure(run_dir: Path, reason: str) -> None:
    """Have status.json say that the run has failed, and of what; without a status.json nothing has begun.

    To be called when no tracker has the folder open any more. A tracker that opens it again takes the words back.
    """
    # Storage that refuses must not hide the reason itself, which its caller raises.
    with suppress(OSError, RunError), filesystem.refusals(run_dir):
        status = read_status(run_dir)
        filesystem.replace_text(
            run_dir / STATUS, json.dumps({**status, "status": FAILED, "reason": reason}, indent=1) + "\n"
        )


def has_ended(run_dir: Path, status: Mapping[str, Any]) -> bool:
    """Whether a run is over, by its own word: finished, stopped or failed."""
    return status.get("status") == FAILED or (run_dir / SUMMARY).is_file()


def write_summary(
    run_dir: Path,
    *,
    run: str,
    method: str,
    seed: int,
    wall_s: float,
    tokens: int,
    params_sha256: str | None,
    nodes: Mapping[str, NodeSummary],
    staleness: Mapping[str, float | None] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write summary.json, all of it or nothing, and return what it holds.

    Args:
        run_dir: the run folder.
        run: name of the run.
        method: name of the method, such as `worldlm` or `fedavg`.
        seed: the run's seed.
        wall_s: seconds from start to end; virtual in simulation.
        tokens: trained by all clients together.
        params_sha256: fingerprint of the world's final parameters; None where nothing was trained.
        nodes: by path, in the order to be shown.
        staleness: mean staleness by path (`Tracker.staleness`); becomes `tau_mean` of the nodes.
        extra: more values for the top level; they cannot replace the others.
    """
    lines = {path: asdict(node) for path, node in nodes.items()}
    for path, line in lines.items():
        if staleness is not None:
            line["tau_mean"] = staleness.get(path)
    summary: dict[str, Any] = finite(
        {
            **(extra or {}),
            "run": run,
            "method": method,
            "seed": seed,
            "wall_s": wall_s,
            "tokens": tokens,
            "params_sha256": params_sha256,
            "nodes": lines,
        }
    )
    _replace_json(run_dir / SUMMARY, summary, durable=True)
    return summary


def _replace_json(path: Path, value: Any, *, durable: bool = False) -> None:
    # Indented, for people, as long as people can read it: without, it is written ten times as fast.
    indent = 1 if len(value["nodes"]) <= MANY_CLIENTS else None
    filesystem.replace_text(path, json.dumps(value, indent=indent, allow_nan=False) + "\n", durable=durable)
