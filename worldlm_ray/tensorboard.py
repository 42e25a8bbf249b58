"""What a run shows in TensorBoard: every node is a TensorBoard run, with a colour and a toggle of its own.

    tensorboard/world/                  its events, the layout of the first screen, the settings of HPARAMS
    tensorboard/world/europe/           and so on: a node's folder is its path in the tree

Tags name quantities, so that one chart shows the lines of all nodes. Where clients and inner nodes do not
belong in one chart, the tag ends in the KIND of the node, `client` or `inner`:

    loss_by_tokens/KIND perplexity_by_tokens/KIND                           held-out, of a node's own model, per byte
    clients_loss_by_tokens/inner clients_loss_by_time                       means of the clients' own models below
    loss_by_time perplexity_by_time busy_fraction                           all nodes
    tokens_per_s/KIND version/KIND                                          a client's version is its parent's
    train_loss_by_tokens learning_rate_by_tokens epsilon                    clients
    step_norm refused_strangers/REASON                                      inner nodes
    tau tau_histogram arrivals accepted refused/REASON bytes_up bytes_down  edges, in the run of the child
    merge agreement                                                         all nodes below the world
    attention_up attention_down                                             images

The step of `*_by_tokens` is tokens trained so far, of histograms and images a version, and of every other tag
whole seconds of run time. The wall time of every event is the run's first start plus its run time, so the
RELATIVE axis is run time too, in simulation and after a pause as well.

The files are written without torch and without TensorFlow: the process that tracks a run needs neither.
"""

from __future__ import annotations

import io
import itertools
import os
import re
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SourceMetadata
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG
from tensorboard.plugins.custom_scalar.metadata import PLUGIN_NAME as LAYOUT_PLUGIN
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2, summary_v2
from tensorboard.plugins.hparams import metadata as hparams_metadata
from tensorboard.summary.writer.record_writer import RecordWriter

from worldlm_ray import storage
from worldlm_ray.records import AttentionRecord

Scalar = str | int | float | bool

FLUSH_EVERY_S = 2.0
"""Longest time that an event stays in memory."""
OBJECTS_EVERY_S = 10.0
"""The same where files are objects: each is written anew."""
WAITING_BYTES = 4_000_000
"""Events that may stay in memory: whoever adds more writes them itself."""
KEPT_BYTES = 16 * WAITING_BYTES
"""Events that are kept while the storage refuses them; newer ones are dropped."""
CELLS_WITH_NUMBERS = 400
"""A heat map with more cells than this shows colours only."""

_file_numbers = itertools.count()

_UNSAFE = re.compile(r"[^A-Za-z0-9_.\-/]")


def tag(group: str, *parts: str) -> str:
    """The tag `group/part/part`, with every character that TensorBoard might mangle made an underscore."""
    return _UNSAFE.sub("_", "/".join((group, *parts)))


class EventFiles:
    """Event files of many TensorBoard runs.

    TensorBoard's own writer takes a thread and an open file for each run, and a tree may have a thousand
    nodes. Here one thread appends to all files in turn and holds none of them open.

    Args:
        folder: the folder above those of the runs. Nobody else writes below it. Files that are there stay:
            a resumed run makes new ones beside them.
        started_at: wall time of the run's first start, seconds since 1970.
    """

    def __init__(self, folder: Path, *, started_at: float) -> None:
        self._folder, self._started_at = folder, started_at
        self._waiting: dict[str, list[bytes]] = {}
        self._waiting_bytes = 0
        self._runs: dict[str, storage.Growing] = {}
        self._every_s = OBJECTS_EVERY_S if storage.is_remote(folder) else FLUSH_EVERY_S
        self._adding, self._writing = threading.Lock(), threading.Lock()
        self._closing = threading.Event()
        self.trouble = ""
        """Why events wait in memory; empty if they do not."""
        self._thread = threading.Thread(target=self._write_often, name="event-files", daemon=True)
        self._thread.start()

    def add(self, run: str, event: Event) -> None:
        """Have an event written within a few seconds; later, while the storage refuses."""
        if self._closing.is_set():
            raise ValueError(f"the event files in {str(self._folder)!r} are closed")
        data = event.SerializeToString()
        with self._adding:
            if self._waiting_bytes > KEPT_BYTES:
                return
            self._waiting.setdefault(run, []).append(data)
            self._waiting_bytes += len(data)
            full = self._waiting_bytes > WAITING_BYTES and not self.trouble
        if full:
            self.flush()

    def flush(self) -> None:
        """Return when everything added so far is in the files, or the storage has refused it: see `trouble`."""
        with self._writing:
            with self._adding:
                waiting, self._waiting, self._waiting_bytes = self._waiting, {}, 0
            try:
                for run in list(waiting):
                    self._append(run, waiting[run])
                    del waiting[run]
                self.trouble = ""
            except OSError as error:
                self.trouble = f"cannot write {self._folder}: {error}; charts wait in memory"
                self._keep(waiting)

    def close(self) -> None:
        """Write what waits, and stop the thread; nothing can be added after this."""
        self._closing.set()
        self._thread.join()
        self.flush()

    def _write_often(self) -> None:
        while not self._closing.wait(self._every_s):
            self.flush()

    def _keep(self, events: dict[str, list[bytes]]) -> None:
        """Put back what could not be written, before what has come since."""
        with self._adding:
            for run, since in self._waiting.items():
                events.setdefault(run, []).extend(since)
            self._waiting = events
            self._waiting_bytes = sum(len(data) for datas in events.values() for data in datas)

    def _append(self, run: str, events: list[bytes]) -> None:
        """Append to a run's file: all of the events or none of them, as far as the storage can be told."""
        file = self._runs.pop(run, None)  # after an error the run goes on in a new file: this one may end anyhow
        if file is None:
            # TensorBoard reads the files of a run in the order of their names, which begin with the time.
            number = f"{os.getpid()}.{next(_file_numbers)}"
            name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{number}"
            file = storage.Growing(self._folder / run / name)
            source = SourceMetadata(writer="worldlm_ray.tensorboard")
            first = Event(wall_time=self._started_at, file_version="brain.Event:2", source_metadata=source)
            events = [first.SerializeToString(), *events]
        buffer = io.BytesIO()
        records = RecordWriter(buffer)
        for event in events:
            records.write(event)
        file.add(buffer.getvalue())
        self._runs[run] = file


class Board:
    """Writes the charts of a whole tree.

    Args:
        folder: where the folders of the nodes are made.
        root: path of the node that stands for the run: its folder has the layout and the settings too.
        started_at: wall time of the run's first start, seconds since 1970.
    """

    def __init__(self, folder: Path, *, root: str, started_at: float) -> None:
        self._files = EventFiles(folder, started_at=started_at)
        self._root, self._started_at = root, started_at

    def scalars(self, node: str, values: Mapping[str, float | None], *, now_s: float, step: int | None = None) -> None:
        """Write several scalars of a node that share a step as one event.

        Args:
            node: its path.
            values: by tag; None is left out.
            now_s: run time in seconds, and the step unless `step` is given.
            step: tokens, for the tags that are drawn over tokens.
        """
        summary = Summary()
        for name, value in values.items():
            if value is not None:
                summary.value.add(tag=name, simple_value=value)
        if summary.value:
            self._add(node, summary, step=int(now_s) if step is None else step, now_s=now_s)

    def histogram(self, node: str, name: str, counts: Mapping[int, int], *, step: int, now_s: float) -> None:
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
        self._add(node, Summary(value=[Summary.Value(tag=name, histo=proto)]), step=step, now_s=now_s)

    def attention(self, record: AttentionRecord) -> None:
        """Write attention weights as a heat map; the step is the node's version."""
        png, width, height = heat_map(record)
        image = Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=png)
        summary = Summary(value=[Summary.Value(tag=tag(f"attention_{record.direction}"), image=image)])
        self._add(record.node, summary, step=record.version, now_s=record.now_s)

    def hparams(self, values: Mapping[str, Scalar], *, metrics: Mapping[str, str], run: str) -> None:
        """Write what the HPARAMS tab shows: this run's settings beside the last values of its metrics.

        Args:
            values: settings by dotted key.
            metrics: name shown, by tag of a scalar of the root.
            run: name of the run; TensorBoard groups sessions by it.
        """
        config = summary_v2.hparams_config_pb(
            hparams=[summary_v2.HParam(name) for name in values],
            metrics=[summary_v2.Metric(name, display_name=shown) for name, shown in metrics.items()],
        )
        self._add(self._root, config)
        start = summary_v2.hparams_pb(dict(values), trial_id=run, start_time_secs=self._started_at)
        self._add(self._root, start)

    def finish(self, *, now_s: float) -> None:
        """Mark the run of the HPARAMS tab as ended."""
        end = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=self._started_at + now_s)
        data = plugin_data_pb2.HParamsPluginData(session_end_info=end)
        value = Summary.Value(
            tag=hparams_metadata.SESSION_END_INFO_TAG,
            metadata=hparams_metadata.create_summary_metadata(data),
            tensor=hparams_metadata.NULL_TENSOR,
        )
        self._add(self._root, Summary(value=[value]), now_s=now_s)

    def layout(self, *, private: bool = False, now_s: float = 0.0) -> None:
        """Write the first screen: the CUSTOM SCALARS tab."""
        value = Summary.Value(
            tag=CONFIG_SUMMARY_TAG,
            metadata=SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=LAYOUT_PLUGIN)),
            tensor=TensorProto(
                dtype="DT_STRING",
                string_val=[layout(private=private).SerializeToString()],
                tensor_shape=TensorShapeProto(),
            ),
        )
        # TensorBoard reads the layout of the highest step: one that shows privacy replaces one that does not.
        self._add(self._root, Summary(value=[value]), step=int(private), now_s=now_s)

    @property
    def trouble(self) -> str:
        """Why charts wait in memory; empty if they do not."""
        return self._files.trouble

    def flush(self) -> None:
        """Return when everything written so far is in the files, or the storage has refused it."""
        self._files.flush()

    def close(self) -> None:
        """Flush and close the files."""
        self._files.close()

    def _add(self, node: str, summary: Summary, *, step: int = 0, now_s: float = 0.0) -> None:
        event = Event(wall_time=self._started_at + now_s, step=step, summary=summary)
        self._files.add(_UNSAFE.sub("_", node), event)


def layout(*, private: bool = False) -> layout_pb2.Layout:
    """Charts of the CUSTOM SCALARS tab, in the order in which a run is understood.

    Args:
        private: add the chart of privacy spent.
    """
    learning = [
        _chart("Clients: loss (nats/byte) by tokens", "^loss_by_tokens/client$"),
        _chart("World, federations: own loss (nats/byte) by tokens", "^loss_by_tokens/inner$"),
        _chart("World, federations: mean of the clients' losses by tokens", "^clients_loss_by_tokens/inner$"),
        _chart("Loss (nats/byte) by run time (s)", "^loss_by_time$"),
    ]
    asynchrony = [
        _chart("Staleness per edge (versions behind)", "^tau$"),
        _chart("Version by run time (s)", "^version/inner$"),
        _chart("How far a node followed its parent (0 to 1)", "^merge$"),
        _chart("Agreement with the others' movement (cosine)", "^agreement$"),
        _chart("Clients: training speed (tokens/s)", "^tokens_per_s/client$"),
        _chart("Busy share of every node", "^busy_fraction$"),
        _chart("Updates accepted per edge", "^accepted$"),
        _chart("Updates refused per edge and reason", "^refused(_strangers)?/"),
    ]
    more = [
        _chart("Clients: perplexity per byte by tokens", "^perplexity_by_tokens/client$"),
        _chart("Bytes sent up per edge", "^bytes_up$"),
        _chart("Bytes sent down per edge", "^bytes_down$"),
    ]
    if private:
        more.insert(0, _chart("Privacy spent (epsilon)", "^epsilon$"))
    return layout_pb2.Layout(
        category=[
            layout_pb2.Category(title="Learning", chart=learning),
            layout_pb2.Category(title="Asynchrony", chart=asynchrony),
            layout_pb2.Category(title="Cost", chart=more),
        ]
    )


def _chart(title: str, regex: str) -> layout_pb2.Chart:
    return layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=[regex]))


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
    figure.suptitle(f"{what}, version {record.version}", fontsize=9)  # TensorBoard names the node
    if rows * columns <= CELLS_WITH_NUMBERS:
        for i, row in enumerate(record.weights):
            for j, weight in enumerate(row):
                colour = "white" if weight > 0.55 else "black"
                axes.text(j, i, f"{weight:.2f}", ha="center", va="center", fontsize=9, color=colour)
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    width, height = canvas.get_width_height()
    return buffer.getvalue(), width, height
