"""What a tracker draws to can be any sink."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from worldlm_ray.config.schema import BudgetConfig
from worldlm_ray.errors import ConfigError
from worldlm_ray.records import PushRecord, StartRecord
from worldlm_ray.tracking.sinks import SINKS, RunFacts, Sink, sink
from worldlm_ray.tracking.tracker import Tracker

KINDS = {"world": "world", "world/a": "client"}


class Kept(Sink):
    """Keeps what it is told, and shows scalars and texts only."""

    def __init__(self, run: RunFacts) -> None:
        self.run, self.calls = run, list[tuple[object, ...]]()

    def scalars(self, node: str, kind: str, values: Mapping[str, float | None], *, now_s: float, tokens: int) -> None:
        self.calls += [(node, kind, name, value, now_s, tokens) for name, value in values.items()]

    def text(self, name: str, markdown: str, *, step: int, now_s: float) -> None:
        self.calls.append((name, markdown, step))

    def close(self) -> None:
        self.calls.append(("closed",))


def test_a_tracker_draws_to_the_sinks_that_it_is_given(tmp_path: Path) -> None:
    opened: list[Kept] = []

    def to_kept(run: RunFacts) -> Sink:
        opened.append(Kept(run))
        return opened[-1]

    budget = BudgetConfig(tokens=10)
    tracker = Tracker(tmp_path, kinds=KINDS, hparams={"seed": 3}, budget=budget, sinks=[to_kept], wall=lambda: 50.0)
    [kept] = opened
    assert (kept.run.root, kept.run.hparams, kept.run.started_at, kept.run.now_s) == ("world", {"seed": 3}, 50.0, 0.0)
    tracker.record(
        StartRecord(node="world/a", now_s=1.0, loss=None, perplexity_per_token=None, heldout_bytes=0, private=True)
    )
    tracker.record(PushRecord(node="world/a", now_s=2.0, bytes=7))
    assert ("world/a", "client", "bytes_up", 7, 2.0, 0) in kept.calls
    tracker.samples({"world/a": "words"}, now_s=2.0)
    assert ("3 samples/world/a", "    words\n", 0) in kept.calls
    kept.trouble = "the sink's storage is full"
    assert tracker.snapshot()["trouble"] == "the sink's storage is full"
    tracker.close()
    assert kept.calls[-1] == ("closed",)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["status.json"], "no charts but the sink's"


def test_a_run_that_names_no_sinks_is_drawn_to_all_but_those_on_request(tmp_path: Path) -> None:
    assert SINKS.names() == ("tensorboard", "jsonl", "csv", "wandb", "mlflow")
    opened: list[Kept] = []

    @sink("kept")
    def to_kept(run: RunFacts) -> Sink:
        """A list. Source: this test."""
        opened.append(Kept(run))
        return opened[-1]

    try:
        tracker = Tracker(tmp_path, kinds=KINDS, hparams={}, budget=BudgetConfig(tokens=10))
        tracker.record(PushRecord(node="world/a", now_s=2.0, bytes=7))
        tracker.close()
    finally:
        SINKS.remove("kept")
    [kept] = opened
    assert ("world/a", "client", "bytes_up", 7, 2.0, 0) in kept.calls
    assert {path.name for path in tmp_path.iterdir()} == {"status.json", "tensorboard", "metrics.jsonl"}


def test_an_unknown_sink_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'tensorboard'"):
        SINKS.get("tensorbord")
