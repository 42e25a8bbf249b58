"""A small world, records of it, and what its run folder holds."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from worldlm_ray.config.schema import BudgetConfig
from worldlm_ray.records import (
    AggregationRecord,
    AttentionRecord,
    FinalRecord,
    RoundRecord,
    StartRecord,
    VerdictRecord,
)
from worldlm_ray.tracking import curves
from worldlm_ray.tracking.charts import charts_of
from worldlm_ray.tracking.tracker import Tracker

ITALY, FRANCE, JAPAN = "world/europe/italy", "world/europe/france", "world/japan"
KINDS = {"world": "world", "world/europe": "federation", ITALY: "client", FRANCE: "client", JAPAN: "client"}
STARTED_AT = 1_700_000_000.0


class Clock:
    """Stands still until told otherwise."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def tracker(folder: Path, *, clock: Clock | None = None, budget: BudgetConfig | None = None) -> Tracker:
    return Tracker(
        folder,
        kinds=KINDS,
        hparams={"training.lr": 0.003, "method": "worldlm", "privacy": False},
        budget=budget or BudgetConfig(tokens=1_000),
        clock=clock or Clock(),
        wall=lambda: STARTED_AT,
    )


def start(node: str, *, loss: float = 5.0, heldout_bytes: int = 100) -> StartRecord:
    return StartRecord(node=node, now_s=0.0, loss=loss, perplexity_per_token=None, heldout_bytes=heldout_bytes)


def round_of(
    node: str, *, tokens: int, loss: float | None, now_s: float = 10.0, epsilon: float | None = None
) -> RoundRecord:
    return RoundRecord(
        node=node,
        now_s=now_s,
        round=tokens // 100,
        steps=tokens // 10,
        tokens=tokens,
        train_loss=2.5,
        loss=loss,
        perplexity_per_token=None,
        learning_rate=0.001,
        tokens_per_s=50.0,
        busy_fraction=0.9,
        epsilon=epsilon,
    )


def final(node: str, *, loss: float) -> FinalRecord:
    bytes_ = {ITALY: 300, FRANCE: 100}.get(node, 400)
    return FinalRecord(node=node, now_s=20.0, version=7, loss=loss, perplexity_per_token=None, heldout_bytes=bytes_)


def verdict(sender: str, verdict: str = "accepted", *, tau: int = 0, seq: int = 1) -> VerdictRecord:
    return VerdictRecord(
        node="world/europe",
        now_s=12.0,
        sender=sender,
        seq=seq,
        base_version=3,
        version=3 + tau,
        tau=tau,
        verdict=verdict,
        bytes=64,
        detail="why",
    )


def aggregation(version: int = 4) -> AggregationRecord:
    return AggregationRecord(
        node="world/europe",
        now_s=13.0,
        version=version,
        tokens=200,
        total_tokens=400,
        contributors=("italy", "france"),
        step_norm=0.5,
        busy_fraction=0.1,
    )


def attention(node: str = "world/europe", *, version: int = 4) -> AttentionRecord:
    return AttentionRecord(
        node=node,
        now_s=13.0,
        version=version,
        direction="up",
        layers=("lm_head", "norm"),
        candidates=("self", "italy"),
        weights=((0.25, 0.75), (1.0, 0.0)),
    )


def chart(name: str, node: str = ITALY, *, by: str = "time") -> str:
    """Tag of the chart that shows a quantity of a node."""
    return next(each.tag for each in charts_of(name, KINDS[node]) if each.by == by)


def lines(folder: Path, node: str, name: str) -> list[tuple[float, float | None]]:
    """What metrics.jsonl holds of one quantity of a node: run time and value."""
    return [
        (line["now_s"], line["value"]) for line in curves.read(folder) if (line["node"], line["name"]) == (node, name)
    ]


def events(folder: Path, node: str) -> EventAccumulator:
    """What TensorBoard reads of one node; nothing where the node has no events."""
    read = EventAccumulator(str(folder / "tensorboard" / node), size_guidance={"scalars": 0, "images": 0})
    return read.Reload()


def points(folder: Path, node: str, name: str) -> list[tuple[int, float]]:
    return [(event.step, pytest.approx(event.value)) for event in events(folder, node).Scalars(name)]


def scalar_tags(folder: Path, node: str) -> set[str]:
    return set(events(folder, node).Tags()["scalars"])


def event_files(folder: Path, node: str) -> list[Path]:
    return sorted((folder / "tensorboard" / node).glob("events.out.tfevents.*"))


def eventually(check: Callable[[], bool]) -> bool:
    """Whether something becomes true within ten seconds."""
    end = time.monotonic() + 10.0
    while not check():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True
