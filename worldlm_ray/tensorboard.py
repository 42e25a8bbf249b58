"""What a run shows in TensorBoard: one writer, one event folder, no torch and no TensorFlow.

TensorBoard's own event writer is used instead of `torch.utils.tensorboard`: it imports in 0.2 s, not 1.3 s,
and the process that tracks a run needs no torch. Tags are `GROUP/NODE`, where a node is its path in the tree:

    loss_by_tokens loss_by_time perplexity_by_tokens perplexity_by_time    held-out; means at inner nodes
    train_loss_by_tokens learning_rate_by_tokens epsilon                   clients
    version tokens_per_s busy_fraction step_norm                           nodes
    tau arrivals accepted bytes_up bytes_down, refused/CHILD/REASON        edges, named by the child
    tau_histogram/CHILD, attention_up/NODE, attention_down/NODE            step is a version

The step of `*_by_tokens` is tokens trained so far; of every other scalar, whole seconds of run time. The wall
time of every event is the run's first start plus its run time, so the RELATIVE axis is run time too, in
simulation and after a pause as well.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG
from tensorboard.plugins.custom_scalar.metadata import PLUGIN_NAME as LAYOUT_PLUGIN
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2, summary_v2
from tensorboard.plugins.hparams import metadata as hparams_metadata
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from worldlm_ray.records import AttentionRecord

Scalar = str | int | float | bool

QUEUE_EVENTS = 1_000
"""Events that may wait for the writer's thread before the tracker has to wait for it."""
FLUSH_EVERY_S = 2.0
"""Longest time that an event stays in memory."""
CELLS_WITH_NUMBERS = 400
"""A heat map with more cells than this shows colours only."""
NODES_PER_REGEX = 30
"""The browser sends every regex in a URL: one that names 1000 clients would be too long."""

_UNSAFE = re.compile(r"[^A-Za-z0-9_.\-/]")


def tag(group: str, *parts: str) -> str:
    """The tag `group/part/part`, with every character that TensorBoard might mangle made an underscore."""
    return _UNSAFE.sub("_", "/".join((group, *parts)))


class Board:
    """Writes one event file; nobody else writes to its folder.

    Args:
        folder: where the event file is made; a resumed run makes another one beside the first.
        started_at: wall time of the run's first start, seconds since 1970.
    """

    def __init__(self, folder: Path, *, started_at: float) -> None:
        self._writer = EventFileWriter(str(folder), max_queue_size=QUEUE_EVENTS, flush_secs=FLUSH_EVERY_S)
        self._started_at = started_at

    def scalars(self, values: Mapping[str, float | None], *, now_s: float, step: int | None = None) -> None:
        """Write several scalars that share a step as one event.

        Args:
            values: by tag; None is left out.
            now_s: run time in seconds, and the step unless `step` is given.
            step: tokens, for the tags that are drawn over tokens.
        """
        summary = Summary()
        for name, value in values.items():
            if value is not None:
                summary.value.add(tag=name, simple_value=value)
        if summary.value:
            self._add(summary, step=int(now_s) if step is None else step, now_s=now_s)

    def histogram(self, name: str, counts: Mapping[int, int], *, step: int, now_s: float) -> None:
        """Write the histogram of whole numbers: how often each was seen."""
        if not counts:
            return
        proto = HistogramProto(
            min=min(counts) - 0.5,
            max=max(counts) + 0.5,
            num=sum(counts.values()),
            sum=sum(value * count for value, count in counts.items()),
            sum_squares=sum(value * value * count for value, count in counts.items()),
        )
        for value in sorted(counts):
            if proto.bucket_limit and proto.bucket_limit[-1] < value - 0.5:
                # An empty bucket keeps the bar one wide, however large the gap before it.
                proto.bucket_limit.append(value - 0.5)
                proto.bucket.append(0)
            proto.bucket_limit.append(value + 0.5)
            proto.bucket.append(counts[value])
        self._add(Summary(value=[Summary.Value(tag=name, histo=proto)]), step=step, now_s=now_s)

    def attention(self, record: AttentionRecord) -> None:
        """Write attention weights as a heat map; the step is the node's version."""
        png, width, height = heat_map(record)
        image = Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=png)
        name = tag(f"attention_{record.direction}", record.node)
        self._add(
            Summary(value=[Summary.Value(tag=name, image=image)]), step=record.version, now_s=record.now_s
        )

    def hparams(self, values: Mapping[str, Scalar], *, metrics: Mapping[str, str], run: str) -> None:
        """Write what the HPARAMS tab shows: this run's settings beside the last values of its metrics.

        Args:
            values: settings by dotted key.
            metrics: name shown, by tag of a scalar.
            run: name of the run; TensorBoard groups sessions by it.
        """
        config = summary_v2.hparams_config_pb(
            hparams=[summary_v2.HParam(name) for name in values],
            metrics=[summary_v2.Metric(name, display_name=shown) for name, shown in metrics.items()],
        )
        self._add(config)
        self._add(summary_v2.hparams_pb(dict(values), trial_id=run, start_time_secs=self._started_at))

    def finish(self, *, now_s: float) -> None:
        """Mark the run of the HPARAMS tab as ended."""
        end = plugin_data_pb2.SessionEndInfo(
            status=api_pb2.STATUS_SUCCESS, end_time_secs=self._started_at + now_s
        )
        data = plugin_data_pb2.HParamsPluginData(session_end_info=end)
        value = Summary.Value(
            tag=hparams_metadata.SESSION_END_INFO_TAG,
            metadata=hparams_metadata.create_summary_metadata(data),
            tensor=hparams_metadata.NULL_TENSOR,
        )
        self._add(Summary(value=[value]), now_s=now_s)

    def layout(self, kinds: Mapping[str, str], *, private: bool = False, now_s: float = 0.0) -> None:
        """Write the first screen: the CUSTOM SCALARS tab."""
        value = Summary.Value(
            tag=CONFIG_SUMMARY_TAG,
            metadata=SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=LAYOUT_PLUGIN)),
            tensor=TensorProto(
                dtype="DT_STRING",
                string_val=[layout(kinds, private=private).SerializeToString()],
                tensor_shape=TensorShapeProto(),
            ),
        )
        # TensorBoard reads the layout of the highest step: one that shows privacy replaces one that does not.
        self._add(Summary(value=[value]), step=int(private), now_s=now_s)

    def flush(self) -> None:
        """Return when everything written so far is in the file."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the file."""
        self._writer.close()

    def _add(self, summary: Summary, *, step: int = 0, now_s: float = 0.0) -> None:
        self._writer.add_event(Event(wall_time=self._started_at + now_s, step=step, summary=summary))


def layout(kinds: Mapping[str, str], *, private: bool = False) -> layout_pb2.Layout:
    """Charts of the CUSTOM SCALARS tab, in the order in which a run is understood.

    Args:
        kinds: kind of every node by path.
        private: add the chart of privacy spent.
    """
    clients = [path for path, kind in kinds.items() if kind == "client"]
    inner = [path for path, kind in kinds.items() if kind != "client"]
    learning = [
        _chart("Clients: loss (nats/byte) by tokens", _regexes("loss_by_tokens", clients)),
        _chart("World, federations: loss by tokens", _regexes("loss_by_tokens", inner)),
        _chart("Loss (nats/byte) by run time (s)", ["^loss_by_time/"]),
    ]
    asynchrony = [
        _chart("Staleness per edge (versions behind)", ["^tau/"]),
        _chart("Version by run time (s)", _regexes("version", inner)),
        _chart("Clients: training speed (tokens/s)", _regexes("tokens_per_s", clients)),
        _chart("Busy share of every node", ["^busy_fraction/"]),
        _chart("Updates accepted per edge", ["^accepted/"]),
        _chart("Updates refused per edge and reason", ["^refused/"]),
    ]
    more = [
        _chart("Perplexity by tokens", ["^perplexity_by_tokens/"]),
        _chart("Bytes sent up per edge", ["^bytes_up/"]),
        _chart("Bytes sent down per edge", ["^bytes_down/"]),
    ]
    if private:
        more.insert(0, _chart("Privacy spent (epsilon)", ["^epsilon/"]))
    return layout_pb2.Layout(
        category=[
            layout_pb2.Category(title="Learning", chart=learning),
            layout_pb2.Category(title="Asynchrony", chart=asynchrony),
            layout_pb2.Category(title="Cost", chart=more),
        ]
    )


def _chart(title: str, regexes: Iterable[str]) -> layout_pb2.Chart:
    return layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=regexes))


def _regexes(group: str, paths: list[str]) -> list[str]:
    """Regexes that match the tags of exactly these nodes."""
    chunks = [paths[i : i + NODES_PER_REGEX] for i in range(0, len(paths), NODES_PER_REGEX)]
    return [f"^{group}/(?:{'|'.join(re.escape(tag(path)) for path in chunk)})$" for chunk in chunks]


def heat_map(record: AttentionRecord) -> tuple[bytes, int, int]:
    """Draw attention weights: layers downwards, candidates across, the weight in every cell.

    Returns:
        A PNG, its width and its height in pixels.
    """
    # Matplotlib takes half a second to import: a run without attention does without it. The figure is drawn
    # on its own canvas, since pyplot keeps global state and picks a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns = len(record.layers), len(record.candidates)
    # Small, since TensorBoard shrinks images to a third of a screen and the text with them.
    size = (min(2.6 + 0.6 * columns, 18.0), min(0.9 + 0.27 * rows, 18.0))
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(record.weights, vmin=0.0, vmax=1.0, cmap="Blues", aspect="auto")
    axes.set_xticks(range(columns), labels=record.candidates, rotation=30 if columns > 4 else 0)
    axes.set_yticks(range(rows), labels=record.layers)
    axes.tick_params(labelsize=9, length=0)
    verb = {"up": "blends its children", "down": "blends itself and its parent"}
    what = verb.get(record.direction, record.direction)
    figure.suptitle(f"{record.node} {what}, version {record.version}", fontsize=9)
    if rows * columns <= CELLS_WITH_NUMBERS:
        for i, row in enumerate(record.weights):
            for j, weight in enumerate(row):
                colour = "white" if weight > 0.55 else "black"
                axes.text(j, i, f"{weight:.2f}", ha="center", va="center", fontsize=9, color=colour)
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    width, height = canvas.get_width_height()
    return buffer.getvalue(), width, height
