"""The TensorBoard sink: it chooses the chart and the line of each point."""

from __future__ import annotations

from collections.abc import Mapping

from worldlm_ray.plan.rundir import TENSORBOARD
from worldlm_ray.records import AttentionRecord
from worldlm_ray.tracking.charts import EACH, SHARED_LINES, charts_of
from worldlm_ray.tracking.sinks import RunFacts, Sink, sink
from worldlm_ray.tracking.tensorboard import Board


@sink("tensorboard")
class TensorBoardCharts(Sink):
    """Draws to RUN_DIR/tensorboard. Source: TensorBoard's event files, see worldlm_ray/tracking/tensorboard.py."""

    def __init__(self, run: RunFacts) -> None:
        self._root, self._lines = run.root, run.lines
        self._board = Board(run.run_dir / TENSORBOARD, root=run.root, started_at=run.started_at)
        self._charted: set[tuple[str, str]] = set()
        """Names of the quantities that have a chart already, with the kind of the node."""
        names = {
            "loss": "World's own model: loss (nats/byte)",
            "clients_loss": "Clients' own models: mean loss (nats/byte)",
            "perplexity": "World's own model: perplexity per byte",
            "version": "World: version",
        }
        metrics = {charts_of(name, "world")[0].tag: shown for name, shown in names.items()}
        self._board.hparams(run.hparams, metrics=metrics, run=run.run_dir.name)
        for name, markdown in run.texts.items():
            self._board.text(name, markdown, now_s=run.now_s)

    @property
    def trouble(self) -> str:  # type: ignore[override]
        """Why charts wait in memory; empty if they do not."""
        return self._board.trouble

    def scalars(self, node: str, kind: str, values: Mapping[str, float | None], *, now_s: float, tokens: int) -> None:
        """Add a point to the node's line. A client without a line has a separate chart of its loss."""
        if node in self._lines or node in SHARED_LINES:
            self._draw(node, kind, values, now_s=now_s, tokens=tokens)
        elif kind == "client" and values.get("loss") is not None:
            self._draw(self._root, "client", {f"{EACH}/{node}": values["loss"]}, now_s=now_s, tokens=tokens)

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

    def histogram(self, node: str, name: str, counts: Mapping[int, int], *, step: int, now_s: float) -> None:
        """Show how often each whole number was seen, if the node has a line."""
        if node in self._lines:
            self._board.histogram(node, name, counts, step=step, now_s=now_s)

    def attention(self, record: AttentionRecord) -> None:
        """Show attention weights as a heat map."""
        self._board.attention(record)

    def text(self, name: str, markdown: str, *, step: int, now_s: float) -> None:
        """Show a text on the TEXT page."""
        self._board.text(name, markdown, step=step, now_s=now_s)

    def flush(self) -> None:
        """Return when everything so far is in the files, or the storage has refused it."""
        self._board.flush()

    def finish(self, *, now_s: float) -> None:
        """Mark the run of the HPARAMS tab as ended."""
        self._board.finish(now_s=now_s)

    def close(self) -> None:
        """Flush and close the files."""
        self._board.close()
