"""The interface of a sink, which turns the points of a run into one kind of charts.

A tracker draws to the sinks that `tracking.sinks` names. Unless given, they are `tensorboard`, `jsonl` and those that a
user's package or file adds.

    @sink("mine")
    def open_mine(run: RunFacts) -> Sink:
        \"""A line in my database for each point. Source: its manual.\"""
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

from worldlm_ray.config.names import SINKS
from worldlm_ray.config.tracking import TrackingConfig
from worldlm_ray.records import AttentionRecord
from worldlm_ray.tracking.charts import Lines

Scalar = str | int | float | bool


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a sink is told of its run when the tracker opens it."""

    run_dir: Path
    root: str
    """Path of the world."""
    lines: Lines
    """Which nodes have a separate line. The tracker adds the nodes that join."""
    hparams: Mapping[str, Scalar]
    """Settings by dotted key."""
    texts: Mapping[str, str]
    """Markdown by tag: the configuration and the tree."""
    started_at: float
    """Wall time of the run's first start, seconds since 1970."""
    now_s: float
    """Run time in seconds: above 0 where the tracker continues a run."""
    clock: Callable[[], float]
    """Monotonic seconds; it only paces files."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """The run's settings of trackers."""

    @property
    def id(self) -> str:
        """Names the run to a service, also when it is continued."""
        return sha256(f"{self.run_dir} {self.started_at}".encode()).hexdigest()[:16]


class Sink:
    """Writes charts of a run. A sink that inherits from this class leaves out what it does not show.

    A sink never raises because its storage refuses: it keeps what it can in memory, and says why in `trouble`.
    """

    trouble: str = ""
    """Why points wait in memory; empty if they do not."""
    failure: str = ""
    """Why it has ended before the run; empty if it has not."""

    def scalars(self, node: str, kind: str, values: Mapping[str, float | None], *, now_s: float, tokens: int) -> None:
        """Add a point to curves of a node.

        Args:
            node: its path, or one of `charts.MEAN`, `BEST`, `WORST` for all clients together.
            kind: `world`, `federation` or `client`.
            values: by name, see worldlm_ray/tracking/charts.py; None is left out.
            now_s: run time in seconds.
            tokens: trained so far, by the node or by the clients below it.
        """

    def histogram(self, node: str, name: str, counts: Mapping[int, int], *, step: int, now_s: float) -> None:
        """Show how often each whole number was seen; the step is a version."""

    def attention(self, record: AttentionRecord) -> None:
        """Show attention weights."""

    def text(self, name: str, markdown: str, *, step: int, now_s: float) -> None:
        """Show a text in Markdown; the step is the rounds of its client."""

    def flush_if_due(self) -> None:
        """Write the waiting points, if the last write was long enough ago. A sink with a thread does nothing here."""

    def flush(self) -> None:
        """Return when everything so far is written, or the storage has refused it."""

    def finish(self, *, now_s: float) -> None:
        """Mark the run as ended; `flush` and `close` follow."""

    def close(self) -> None:
        """Close the files; nothing can be added after this."""


OpenSink = Callable[[RunFacts], Sink]
"""Makes the sink of a run."""
ON_REQUEST = set[str]()
"""Names of sinks that only a configuration chooses. Each has a thread, since it may wait for a service."""
Open = TypeVar("Open", bound=OpenSink)


def sink(name: str, *, by_default: bool = True) -> Callable[[Open], Open]:
    """Register a sink: a class that is made from a run's facts, or a function that makes one.

    Args:
        name: the sink's.
        by_default: whether a run that names no sinks is drawn to it.
    """

    def register(open_sink: Open) -> Open:
        if not by_default:
            ON_REQUEST.add(name)
        SINKS.add(name, open_sink, open_sink)
        return open_sink

    return register


def chosen_sinks(tracking: TrackingConfig) -> list[OpenSink]:
    """What makes the sinks that a configuration chooses, each guarded: a failure ends that sink alone."""
    from worldlm_ray.tracking.guarded import Guarded

    names = list(dict.fromkeys(tracking.sinks)) or [name for name in SINKS if name not in ON_REQUEST]

    def opener(name: str) -> OpenSink:
        open_sink: OpenSink = SINKS.get(name)
        return lambda run: Guarded(name, open_sink, replace(run, tracking=tracking), in_thread=name in ON_REQUEST)

    return [opener(name) for name in names]
