"""What a run shows in TensorBoard: a few lines in numbered groups of charts, see worldlm_ray/tracking/charts.py.

    tensorboard/world/                  its curves, the layout of CUSTOM SCALARS, the settings of HPARAMS, all texts
    tensorboard/world/europe/           and so on: the folder of a node with a line is its path in the tree
    tensorboard/all-clients-mean/       and -best and -worst, in a world with more nodes than lines

The step of a chart by tokens is the tokens trained so far, of histograms and images a version, of a text the rounds of
its client, and of every other tag whole seconds of run time. The wall time of an event is the run's first start plus
its run time. So the RELATIVE axis is run time, also in simulation and after a pause.

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
from collections.abc import Iterable, Mapping
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
from tensorboard.plugins.text import metadata as text_metadata
from tensorboard.summary.writer.record_writer import RecordWriter

from worldlm_ray.records import AttentionRecord
from worldlm_ray.storage import filesystem
from worldlm_ray.tracking.charts import CATEGORIES, CHARTS, Chart, clean
from worldlm_ray.tracking.sinks import Scalar

FLUSH_EVERY_S = 2.0
"""Longest time that an event stays in memory."""
OBJECTS_EVERY_S = 10.0
"""The same in an object store, where each write rewrites a whole object."""
WAITING_BYTES = 4_000_000
"""Bytes of events in memory above which the thread that adds an event also writes them."""
KEPT_BYTES = 16 * WAITING_BYTES
"""Bytes of events that are kept while the storage refuses them. Newer events are dropped."""
CELLS_WITH_NUMBERS = 400
"""A heat map with more cells shows colours only."""
_BLENDS = {"up": "blends its children", "down": "blends itself and its parent"}

_file_numbers = itertools.count()

_FILE = re.compile(r"events\.out\.tfevents\.(\d+)\.")


def _next_file(folder: Path) -> str:
    """Name of a new event file, after those that are there.

    TensorBoard reads the files of a run in the order of their names, which begin with the time. A clock that was set
    back since the last file was made must not put the new one before it.

    Raises:
        OSError: the storage refused.
    """
    with filesystem.refusals(folder):
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    newest = max((int(match[1]) for match in map(_FILE.match, names) if match), default=0)
    began = max(int(time.time()), newest + 1)
    return f"events.out.tfevents.{began:010d}.{socket.gethostname()}.{os.getpid()}.{next(_file_numbers)}"


class EventFiles:
    """Event files of many TensorBoard runs.

    TensorBoard's own writer takes a thread and an open file for each run, and a tree may have a thousand
    nodes. Here one thread appends to all files in turn and holds none of them open.

    Args:
        folder: the folder above those of the runs. No other process writes below it. Existing files stay:
            a resumed run adds new ones.
        started_at: wall time of the run's first start, seconds since 1970.
    """

    def __init__(self, folder: Path, *, started_at: float) -> None:
        self._folder, self._started_at = folder, started_at
        self._waiting: dict[str, list[bytes]] = {}
        self._waiting_bytes = 0
        self._runs: dict[str, filesystem.Growing] = {}
        self._every_s = OBJECTS_EVERY_S if filesystem.is_remote(folder) else FLUSH_EVERY_S
        self._adding, self._writing = threading.Lock(), threading.Lock()
        self._closing = threading.Event()
        self.trouble = ""
        """Why events wait in memory; empty if they do not."""
        self._thread = threading.Thread(target=self._write_often, name="event-files", daemon=True)
        self._thread.start()

    def add(self, run: str, event: Event) -> None:
        """Add an event. It is written within a few seconds, or later if the storage refuses."""
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
        """Write the waiting events, and stop the thread. No event can be added after this."""
        self._closing.set()
        self._thread.join()
        self.flush()

    def _write_often(self) -> None:
        while not self._closing.wait(self._every_s):
            self.flush()

    def _keep(self, events: dict[str, list[bytes]]) -> None:
        """Put back events that could not be written, before newer ones."""
        with self._adding:
            for run, since in self._waiting.items():
                events.setdefault(run, []).extend(since)
            self._waiting = events
            self._waiting_bytes = sum(len(data) for datas in events.values() for data in datas)

    def _append(self, run: str, events: list[bytes]) -> None:
        """Append events to a run's file: all or none, as far as the storage allows."""
        file = self._runs.pop(
            run, None
        )  # after an error the run continues in a new file, since this one may end inside an event
        if file is None:
            file = filesystem.Growing(self._folder / run / _next_file(self._folder / run))
            source = SourceMetadata(writer="worldlm_ray.tracking.tensorboard")
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
                # An empty bucket keeps the bar one unit wide, whatever the gap before it.
                proto.bucket_limit.append(value - 0.5)
                proto.bucket.append(0)
            proto.bucket_limit.append(value + 0.5)
            proto.bucket.append(counts[value])
        self._add(node, Summary(value=[Summary.Value(tag=name, histo=proto)]), step=step, now_s=now_s)

    def attention(self, record: AttentionRecord) -> None:
        """Write attention weights as a heat map, under the root and the node's name; the step is the node's version."""
        png, width, height = heat_map(record)
        image = Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=png)
        name = f"each node, {_BLENDS.get(record.direction, record.direction)}/{clean(record.node)}"
        self._add(
            self._root, Summary(value=[Summary.Value(tag=name, image=image)]), step=record.version, now_s=record.now_s
        )

    def text(self, name: str, markdown: str, *, step: int = 0, now_s: float = 0.0) -> None:
        """Write a text for the TEXT page: Markdown."""
        value = Summary.Value(
            tag=name,
            metadata=text_metadata.create_summary_metadata(display_name=None, description=""),
            tensor=TensorProto(dtype="DT_STRING", string_val=[markdown.encode()], tensor_shape=TensorShapeProto()),
        )
        self._add(self._root, Summary(value=[value]), step=step, now_s=now_s)

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

    def layout(self, tags: Iterable[str], *, now_s: float = 0.0) -> None:
        """Write the CUSTOM SCALARS page: the charts of these tags."""
        known = set(tags)
        value = Summary.Value(
            tag=CONFIG_SUMMARY_TAG,
            metadata=SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=LAYOUT_PLUGIN)),
            tensor=TensorProto(
                dtype="DT_STRING",
                string_val=[layout(known).SerializeToString()],
                tensor_shape=TensorShapeProto(),
            ),
        )
        # TensorBoard reads the layout of the highest step: one with more charts replaces one with fewer.
        self._add(self._root, Summary(value=[value]), step=len(known), now_s=now_s)

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
        self._files.add(clean(node), event)


def layout(tags: Iterable[str]) -> layout_pb2.Layout:
    """The CUSTOM SCALARS page, in the order in which a run is understood: no chart without a tag.

    Args:
        tags: those that exist, as `Chart.tag` gives them.
    """
    known = set(tags)
    charts = [chart for each in CHARTS.values() for chart in each if chart.tag in known and chart.category]
    return layout_pb2.Layout(
        category=[
            layout_pb2.Category(title=title, chart=[_chart(chart) for chart in charts if chart.category == title])
            for title in CATEGORIES
            if any(chart.category == title for chart in charts)
        ]
    )


def _chart(chart: Chart) -> layout_pb2.Chart:
    # After the tag may follow a comma and the reason of a refusal, or a slash and a node.
    regex = f"^{re.escape(chart.tag)}([,/].*)?$"
    return layout_pb2.Chart(title=chart.title, multiline=layout_pb2.MultilineChartContent(tag=[regex]))


def heat_map(record: AttentionRecord) -> tuple[bytes, int, int]:
    """Draw attention weights: layers downwards, candidates across, the weight in every cell.

    Returns:
        A PNG, its width and its height in pixels.
    """
    # Matplotlib takes half a second to import: a run without attention never imports it. The figure is drawn
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
    what = _BLENDS.get(record.direction, record.direction)
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
