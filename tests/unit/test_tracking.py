"""The run folder, read back as its users do: status, TensorBoard events, summary."""

from __future__ import annotations

import json
import math
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from worldlm_ray.config.schema import BudgetConfig
from worldlm_ray.errors import RunError
from worldlm_ray.plan.rundir import STATUS
from worldlm_ray.records import (
    AggregationRecord,
    AttentionRecord,
    FinalRecord,
    LifeRecord,
    MergeRecord,
    NodeSummary,
    ProgressRecord,
    PullRecord,
    PushRecord,
    RoundRecord,
    StartRecord,
    VerdictRecord,
)
from worldlm_ray.tracking import audit, charts, curves, tensorboard
from worldlm_ray.tracking import tracker as tracking
from worldlm_ray.tracking.charts import charts_of
from worldlm_ray.tracking.status import read_status
from worldlm_ray.tracking.summary import Summary, write_summary
from worldlm_ray.tracking.tensorboard import Board, EventFiles, layout
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


def test_losses_are_drawn_by_tokens_and_by_time(tmp_path: Path) -> None:
    with_loss = tracker(tmp_path)
    with_loss.record(start(ITALY), round_of(ITALY, tokens=200, loss=3.0, now_s=10.9))
    with_loss.close()
    assert points(tmp_path, ITALY, chart("loss", by="tokens")) == [(0, 5.0), (200, 3.0)]
    assert points(tmp_path, ITALY, chart("loss")) == [(0, 5.0), (10, 3.0)]
    by_tokens = [(0, math.exp(5)), (200, math.exp(3))]
    assert points(tmp_path, ITALY, chart("perplexity", by="tokens")) == by_tokens
    walls = [event.wall_time for event in events(tmp_path, ITALY).Scalars(chart("loss"))]
    assert walls == [STARTED_AT, pytest.approx(STARTED_AT + 10.9)]


def test_every_node_is_a_run_of_its_own(tmp_path: Path) -> None:
    run = tracker(tmp_path)
    run.record(start(ITALY), round_of(ITALY, tokens=200, loss=3.0, epsilon=1.0), verdict("italy"))
    run.record(aggregation(), PullRecord(node=ITALY, now_s=14.0, version=4, bytes=8))
    run.close()
    read = EventMultiplexer().AddRunsFromDirectory(str(tmp_path / "tensorboard")).Reload()
    tags = {path: set(run_tags["scalars"]) for path, run_tags in read.Runs().items()}
    names = {path: {line["name"] for line in curves.read(tmp_path) if line["node"] == path} for path in tags}
    inner = {"loss", "perplexity", "clients_loss", "tokens_per_s", "epsilon"}
    assert names == {
        "world": inner,
        "world/europe": inner | {"version", "step_norm", "busy_fraction"},
        ITALY: {"loss", "perplexity", "tokens_per_s", "busy_fraction", "train_loss", "learning_rate", "epsilon"}
        | {"version", "tau", "accepted", "bytes_down"},
    }, "nodes of which nothing is known yet have no folder"
    for path, found in tags.items():
        assert found == {each.tag for name in names[path] for each in charts_of(name, KINDS[path])}
    assert points(tmp_path, "world", chart("clients_loss", "world", by="tokens")) == [(0, 5.0), (200, 3.0)]
    assert points(tmp_path, "world", chart("loss", "world", by="tokens")) == [(0, 5.0)], "not measured since"
    assert points(tmp_path, "world/europe", chart("tokens_per_s", "world")) == [(10, 50.0)]


def test_the_mean_over_the_clients_and_a_nodes_own_model_are_two_numbers(tmp_path: Path) -> None:
    run = tracker(tmp_path)
    run.record(start(ITALY, loss=5.0, heldout_bytes=300), start(FRANCE, loss=4.0, heldout_bytes=100))
    run.record(start(JAPAN, loss=2.0, heldout_bytes=400))
    run.record(round_of(ITALY, tokens=100, loss=2.0), round_of(FRANCE, tokens=50, loss=4.0))
    nodes = run.snapshot()["nodes"]
    mean = (300 * 2.0 + 100 * 4.0) / 400
    begun = (300 * 5.0 + 100 * 4.0) / 400
    europe, world = nodes["world/europe"], nodes["world"]
    assert (europe["clients_loss"], europe["loss_start"]) == pytest.approx((mean, begun))
    assert europe["clients_perplexity"] == pytest.approx(math.exp(mean))
    assert world["clients_loss"] == pytest.approx((300 * 2.0 + 100 * 4.0 + 400 * 2.0) / 800)
    assert nodes[ITALY]["clients_loss"] is nodes[ITALY]["loss_version"] is None
    # At version 0 a node has the initial model, whose loss the clients have measured.
    assert (europe["loss"], europe["loss_version"], europe["perplexity"]) == pytest.approx((begun, 0, math.exp(begun)))

    run.record(final("world/europe", loss=3.5), final(ITALY, loss=1.0))
    europe = run.snapshot()["nodes"]["world/europe"]
    run.record(round_of(FRANCE, tokens=100, loss=4.5))  # a straggler
    run.close()
    assert (europe["loss"], europe["loss_version"], europe["loss_measured_s"]) == (3.5, 7, 20.0)
    assert europe["perplexity"] == pytest.approx(math.exp(3.5))
    assert europe["clients_loss"] == pytest.approx((300 * 1.0 + 100 * 4.0) / 400)
    assert read_status(tmp_path)["nodes"]["world/europe"]["loss"] == 3.5
    last = (300 * 1.0 + 100 * 4.5) / 400
    means = points(tmp_path, "world/europe", chart("clients_loss", "world", by="tokens"))
    assert means[-3:] == [(150, mean), (200, last), (200, last)]
    assert lines(tmp_path, "world/europe", "clients_loss")[-1] == (20.0, pytest.approx(last))
    assert points(tmp_path, "world/europe", chart("loss", "world", by="tokens"))[-1] == (150, 3.5)
    assert europe["tokens"] == 150
    assert nodes["world/europe"]["tokens_per_s"] == 100.0


def test_a_federation_of_private_clients_is_private(tmp_path: Path) -> None:
    run = tracker(tmp_path)
    silent = {"now_s": 0.0, "loss": None, "perplexity_per_token": None, "heldout_bytes": 0, "private": True}
    run.record(StartRecord(node=ITALY, **silent), start(JAPAN))
    assert not run.snapshot()["nodes"]["world/europe"]["private"], "of France nothing is known yet"
    run.record(StartRecord(node=FRANCE, **silent))
    nodes = run.snapshot()["nodes"]
    run.close()
    assert {path for path, node in nodes.items() if node["private"]} == {ITALY, FRANCE, "world/europe"}
    assert nodes["world/europe"]["loss"] is nodes["world/europe"]["clients_loss"] is None


def test_a_run_of_an_older_version_keeps_its_mean_under_the_right_name(tmp_path: Path) -> None:
    run = tracker(tmp_path)
    run.record(start(ITALY), round_of(ITALY, tokens=100, loss=2.0))
    run.close()
    status = read_status(tmp_path)
    for node in status["nodes"].values():
        mean = node.pop("clients_loss")
        node["loss"] = node["loss"] if mean is None else mean
    (tmp_path / "status.json").write_text(json.dumps(status))
    run = tracker(tmp_path)
    nodes = run.snapshot()["nodes"]
    run.close()
    assert (nodes["world"]["loss"], nodes["world"]["clients_loss"], nodes[ITALY]["loss"]) == (None, 2.0, 2.0)


def test_clients_that_fall_silent_do_not_count_as_training(tmp_path: Path) -> None:
    run = tracker(tmp_path)
    run.record(round_of(ITALY, tokens=100, loss=2.0, now_s=10.0), round_of(FRANCE, tokens=100, loss=2.0, now_s=10.0))
    assert run.snapshot()["tokens_per_s"] == 100.0
    for now_s in (12.0, 14.0, 16.0, 18.0):  # France's last round took 2 s
        run.record(round_of(ITALY, tokens=100 + int(now_s), loss=2.0, now_s=now_s))
    snapshot = run.snapshot()
    run.close()
    assert snapshot["tokens_per_s"] == snapshot["nodes"]["world/europe"]["tokens_per_s"] == 50.0


def test_rounds_that_nobody_heard_of_are_counted_when_the_client_says_so(tmp_path: Path) -> None:
    run = tracker(tmp_path)
    run.record(round_of(ITALY, tokens=100, loss=2.0))
    run.record(ProgressRecord(node=ITALY, now_s=50.0, round=4, steps=40, tokens=400))
    nodes = run.snapshot()["nodes"]
    run.close()
    assert (nodes[ITALY]["rounds"], nodes[ITALY]["steps"], nodes[ITALY]["loss"]) == (4, 40, 2.0)
    assert nodes["world"]["tokens"] == 400
    with pytest.raises(RunError, match="only clients train"):
        tracker(tmp_path / "other").record(ProgressRecord(node="world", now_s=0.0, round=1, steps=1, tokens=1))


def test_a_round_without_a_measurement_draws_no_loss(tmp_path: Path) -> None:
    run = tracker(tmp_path)
    run.record(start(ITALY), round_of(ITALY, tokens=200, loss=None))
    run.close()
    assert points(tmp_path, ITALY, chart("loss", by="tokens")) == [(0, 5.0)]
    assert points(tmp_path, ITALY, chart("train_loss", by="tokens")) == [(200, 2.5)]
    assert chart("epsilon") not in scalar_tags(tmp_path, ITALY)


def test_verdicts_are_counted_by_edge_and_reason(tmp_path: Path) -> None:
    run = tracker(tmp_path)
    run.record(verdict("italy", tau=1), verdict("italy", "stale", tau=7, seq=2))
    run.record(verdict(ITALY, "stale", tau=7, seq=3), verdict("italy", "norm", seq=4), verdict("mars", "unknown"))
    node = run.snapshot()["nodes"][ITALY]
    totals = run.snapshot()
    run.close()
    strangers = f"{chart('refused_strangers', 'world')}, unknown"
    assert (node["accepted"], node["refused"], node["tau"]) == (1, {"stale": 2, "norm": 1}, 0)
    assert node["tau_mean"] == pytest.approx((1 + 7 + 7 + 0) / 4)
    assert totals["nodes"]["world/europe"]["refused"] == {}
    assert totals["nodes"]["world/europe"]["strangers"] == {"unknown": 1}
    assert (totals["accepted"], totals["refused"]) == (1, {"stale": 2, "norm": 1, "unknown": 1})
    assert points(tmp_path, ITALY, f"{chart('refused')}, stale") == [(12, 1), (12, 2)]
    assert points(tmp_path, "world/europe", strangers) == [(12, 1)]
    assert scalar_tags(tmp_path, "world/europe") == {strangers}
    assert points(tmp_path, ITALY, chart("accepted")) == [(12, 1)]


def test_a_grandchild_is_a_stranger(tmp_path: Path) -> None:
    run = tracker(tmp_path)
    run.record(verdict("world/japan", "unknown"))
    nodes = run.snapshot()["nodes"]
    run.close()
    assert nodes[JAPAN]["refused"] == {}
    assert nodes["world/europe"]["strangers"] == {"unknown": 1}


def test_staleness_is_drawn_when_the_parent_aggregates(tmp_path: Path) -> None:
    run = tracker(tmp_path)
    run.record(verdict("italy", tau=1), verdict("italy", tau=4, seq=2), verdict("france", tau=0))
    run.record(aggregation(version=4))
    run.record(verdict("italy", tau=1, seq=3), aggregation(version=5))
    run.close()
    assert points(tmp_path, ITALY, chart("tau")) == [(13, 2.5), (13, 1.0)]
    assert points(tmp_path, FRANCE, chart("tau")) == [(13, 0.0)]
    last = events(tmp_path, ITALY).Histograms(charts.HISTOGRAM)[-1]
    assert (last.step, last.histogram_value.num, last.histogram_value.sum) == (5, 3, 6)
    buckets = dict(zip(last.histogram_value.bucket_limit, last.histogram_value.bucket, strict=True))
    assert buckets == {1.5: 2, 3.5: 0, 4.5: 1}
    assert points(tmp_path, "world/europe", chart("version", "world")) == [(13, 4), (13, 5)]


def test_bytes_belong_to_the_child_and_add_up(tmp_path: Path) -> None:
    run = tracker(tmp_path)
    run.record(PushRecord(node=ITALY, now_s=1.0, bytes=10), PushRecord(node=ITALY, now_s=2.0, bytes=5))
    run.record(PullRecord(node=ITALY, now_s=3.0, version=9, bytes=7))
    run.record(PullRecord(node="world/europe", now_s=3.0, version=9, bytes=8))
    snapshot = run.snapshot()
    run.close()
    assert points(tmp_path, ITALY, chart("bytes_up")) == [(1, 10), (2, 15)]
    assert points(tmp_path, ITALY, chart("bytes_down")) == [(3, 7)]
    assert points(tmp_path, ITALY, chart("version")) == [(3, 9)]
    assert scalar_tags(tmp_path, "world/europe") == {chart("bytes_down")}
    assert (snapshot["bytes_up"], snapshot["bytes_down"]) == (15, 15)
    assert snapshot["nodes"][ITALY]["version"] == 9
    assert snapshot["nodes"]["world/europe"]["version"] == 0, "a federation has a version of its own"


def test_attention_images_are_few_and_every_node_has_its_turn(tmp_path: Path) -> None:
    clock = Clock()
    run = tracker(tmp_path, clock=clock)
    run.record(attention(version=1))
    for version in (2, 3):
        run.record(attention(version=version), attention("world", version=version))
    clock.now += tracking.IMAGE_EVERY_S
    run.record(LifeRecord(node="world", now_s=20.0, event="running"))
    run.close()
    name = "each node, blends its children"
    images = {node: events(tmp_path, "world").Images(f"{name}/{node}") for node in ("world", "world/europe")}
    assert [image.step for image in images["world/europe"]] == [1, 3]
    assert [image.step for image in images["world"]] == [3]
    image = images["world"][0]
    assert image.encoded_image_string.startswith(b"\x89PNG")
    assert image.width > 100
    assert image.height > 50


def test_status_is_paced_whole_and_left_without_a_temporary_file(tmp_path: Path) -> None:
    clock = Clock()
    run = tracker(tmp_path, clock=clock)
    run.record(round_of(ITALY, tokens=100, loss=None))
    assert read_status(tmp_path)["tokens"] == 0, "within a second of the last write"
    clock.now += tracking.STATUS_EVERY_S
    run.record(round_of(ITALY, tokens=200, loss=None))
    assert read_status(tmp_path)["tokens"] == 200
    run.record(round_of(ITALY, tokens=250, loss=None))
    run.flush()
    status = read_status(tmp_path)
    run.close()
    assert (status["tokens"], status["progress"], status["now_s"]) == (250, 0.25, 10.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "status.json", "tensorboard"]


@pytest.mark.parametrize(
    ("budget", "progress"),
    [
        (BudgetConfig(tokens=400), 0.5),
        (BudgetConfig(rounds=1), 1 / 3),
        (BudgetConfig(seconds=40.0), 0.25),
        (BudgetConfig(tokens=100), 1.0),
    ],
)
def test_progress_follows_the_budget(tmp_path: Path, budget: BudgetConfig, progress: float) -> None:
    run = tracker(tmp_path, budget=budget)
    run.record(round_of(ITALY, tokens=200, loss=None))
    assert run.snapshot()["progress"] == pytest.approx(progress)
    run.close()


def test_a_diverged_loss_leaves_valid_json(tmp_path: Path) -> None:
    run = tracker(tmp_path)
    run.record(start(ITALY), round_of(ITALY, tokens=100, loss=math.nan))
    run.close()
    assert read_status(tmp_path)["nodes"][ITALY]["loss"] is None
    assert math.isnan(events(tmp_path, ITALY).Scalars(chart("loss", by="tokens"))[-1].value)


def test_a_second_tracker_continues_the_first(tmp_path: Path) -> None:
    first = tracker(tmp_path)
    first.record(start(ITALY), round_of(ITALY, tokens=100, loss=4.0), verdict("italy", tau=3))
    log = audit.AuditLog(tmp_path, "world/europe")  # of the node itself
    log.verdict(verdict("italy", tau=3))
    first.record(PushRecord(node=ITALY, now_s=12.0, bytes=10), LifeRecord(node=ITALY, now_s=12.0, event="started"))
    first.close()
    second = tracker(tmp_path)
    second.record(verdict("italy", "stale", tau=5, seq=2), PushRecord(node=ITALY, now_s=20.0, bytes=10))
    second.record(start(ITALY, loss=3.5))
    node = second.snapshot()["nodes"][ITALY]
    second.close()
    assert (node["accepted"], node["refused"], node["bytes_up"], node["tokens"]) == (1, {"stale": 1}, 20, 100)
    assert (node["loss_start"], node["loss"], node["state"]) == (5.0, 3.5, "started")
    assert node["tau_mean"] == pytest.approx(4.0)
    assert len(event_files(tmp_path, "world")) == len(event_files(tmp_path, ITALY)) == 2
    # In one second two writers of one process are told apart by a counter, which does not sort as text.
    assert sorted(points(tmp_path, ITALY, chart("bytes_up"))) == [(12, 10), (20, 20)]


def test_an_update_that_is_accepted_again_after_a_restart_counts_once(tmp_path: Path) -> None:
    run = tracker(tmp_path)
    run.record(verdict("italy", seq=1), verdict("italy", seq=2), verdict("italy", seq=2), verdict("italy", seq=3))
    assert run.snapshot()["nodes"][ITALY]["accepted"] == 3
    run.close()


def test_an_unknown_node_is_an_error_and_nothing_of_the_batch_is_kept(tmp_path: Path) -> None:
    run = tracker(tmp_path)
    lost = LifeRecord(node="world/mars", now_s=1.0, event="started")
    with pytest.raises(RunError, match=r"world/mars.*not in the tree"):
        run.record(verdict("italy"), lost)
    with pytest.raises(RunError, match="only clients"):
        run.record(start("world/europe"))
    assert run.snapshot()["accepted"] == 0
    run.close()


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ({"world": "planet"}, "planet"),
        ({"world": "world", "world/a/b": "client"}, "hangs under 'world/a'"),
        ({"world": "world", "world/a": "client", "world/a/b": "client"}, "hangs under"),
        ({"europe": "federation"}, "no parent"),
        ({}, "exactly one"),
    ],
)
def test_kinds_must_be_a_tree(tmp_path: Path, kinds: dict[str, str], message: str) -> None:
    with pytest.raises(RunError, match=re.escape(message)):
        Tracker(tmp_path, kinds=kinds, hparams={}, budget=BudgetConfig(tokens=1))


def test_every_chart_of_the_first_screen_finds_its_tags(tmp_path: Path) -> None:
    run = tracker(tmp_path)
    for client in (ITALY, FRANCE, JAPAN):
        run.record(start(client), round_of(client, tokens=100, loss=3.0, epsilon=1.5))
        run.record(PushRecord(node=client, now_s=1.0, bytes=1))
        run.record(PullRecord(node=client, now_s=1.0, version=1, bytes=1))
        run.record(MergeRecord(node=client, now_s=1.0, version=1, m=1.0, agreement=0.75))
    run.record(verdict("italy"), verdict("france", "stale"), verdict("mars", "unknown"), aggregation())
    run.close()
    tags = {node: scalar_tags(tmp_path, node) for node in KINDS}
    proto = layout_pb2.Layout.FromString(
        max(
            events(tmp_path, "world").Tensors("custom_scalars__config__"), key=lambda event: event.step
        ).tensor_proto.string_val[0]
    )
    shown = {each.title: list(each.multiline.tag) for group in proto.category for each in group.chart}
    found = {
        title: {
            (node, name)
            for node, names in tags.items()
            for name in names
            if any(re.match(regex, name) for regex in regexes)
        }
        for title, regexes in shown.items()
    }
    assert [title for title, lines in found.items() if not lines] == []
    assert found["Clients: loss of own models (nats/byte) by tokens"] == {
        (client, chart("loss", by="tokens")) for client in (ITALY, FRANCE, JAPAN)
    }
    for name in ("clients_loss", "loss"):
        for by, title in (("tokens", "(nats/byte) by tokens"), ("time", "by run time (s)")):
            what = {"clients_loss": "mean loss of the clients below", "loss": "loss of own models"}[name]
            assert found[f"World, federations: {what} {title}"] == {
                (inner, chart(name, "world", by=by)) for inner in ("world", "world/europe")
            }
    assert found["Version by run time (s)"] == {("world/europe", chart("version", "world"))}
    assert found["Privacy spent (epsilon)"] == {(node, chart("epsilon")) for node in KINDS}
    assert found["Updates refused per edge and reason"] == {(FRANCE, f"{chart('refused')}, stale")}
    assert layout([]).category == []


def test_hparams_tab_shows_the_settings_the_metrics_and_the_end(tmp_path: Path) -> None:
    run = tracker(tmp_path / "quick")
    run.record(start(ITALY))
    run.close()
    read = events(tmp_path / "quick", "world")
    contents = {
        name: HParamsPluginData.FromString(content) for name, content in read.PluginTagToContent("hparams").items()
    }
    started = contents["_hparams_/session_start_info"].session_start_info
    assert started.hparams["training.lr"].number_value == 0.003
    assert started.hparams["method"].string_value == "worldlm"
    assert started.group_name == "quick"
    metrics = [info.name.tag for info in contents["_hparams_/experiment"].experiment.metric_infos]
    own, means, perplexity, version = metrics
    assert (own, version) == (chart("loss", "world", by="tokens"), chart("version", "world"))
    assert perplexity == chart("perplexity", "world", by="tokens")
    assert {own, means, perplexity} <= set(read.Tags()["scalars"])
    assert contents["_hparams_/session_end_info"].session_end_info.status == 1
    client = events(tmp_path / "quick", ITALY)
    assert client.Tags()["tensors"] == [], "the root alone has the settings and the layout"
    with pytest.raises(KeyError):
        client.PluginTagToContent("hparams")


def test_tags_and_folders_hold_no_character_that_tensorboard_mangles(tmp_path: Path) -> None:
    [refused] = charts_of("refused/a:b c", "client")
    assert refused.tag == f"{chart('refused')}, a_b_c"
    board = Board(tmp_path / "tensorboard", root="world", started_at=0.0)
    board.scalars("world/são paulo", {"gone": None, "there": 2.0}, now_s=1.0)
    board.histogram("world/none", "empty", {}, step=0, now_s=1.0)
    board.close()
    assert points(tmp_path, "world/s_o_paulo", "there") == [(1, 2.0)]
    assert [path.name for path in (tmp_path / "tensorboard/world").iterdir()] == ["s_o_paulo"]


def test_many_nodes_take_neither_threads_nor_open_files(tmp_path: Path) -> None:
    clients = [f"world/client-{i}" for i in range(300)]
    threads, open_files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    run = Tracker(
        tmp_path,
        kinds={"world": "world", **dict.fromkeys(clients, "client")},
        hparams={},
        budget=BudgetConfig(tokens=1),
    )
    for tokens in (100, 200):
        run.record(*(round_of(client, tokens=tokens, loss=None) for client in clients))
        run.flush()
    assert threading.active_count() <= threads + 1
    assert len(os.listdir("/proc/self/fd")) <= open_files + 2
    run.close()
    assert threading.active_count() == threads
    assert lines(tmp_path, clients[-1], "train_loss") == [(10.0, 2.5), (10.0, 2.5)]


def test_events_reach_the_files_without_a_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorboard, "FLUSH_EVERY_S", 0.01)
    board = Board(tmp_path / "tensorboard", root="world", started_at=0.0)
    board.scalars("world", {"version": 1}, now_s=1.0)
    assert eventually(lambda: event_files(tmp_path, "world") != [])
    assert eventually(lambda: points(tmp_path, "world", "version") == [(1, 1)])
    board.scalars("world", {"version": 2}, now_s=2.0)
    assert eventually(lambda: points(tmp_path, "world", "version") == [(1, 1), (2, 2)])
    board.close()


def test_events_that_wait_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorboard, "FLUSH_EVERY_S", 1_000.0)
    monkeypatch.setattr(tensorboard, "WAITING_BYTES", 200)
    board = Board(tmp_path / "tensorboard", root="world", started_at=0.0)
    for step in range(100):
        board.scalars("world", {"version": step}, now_s=step)
    written = len(points(tmp_path, "world", "version"))
    board.close()
    assert 90 < written <= 100
    assert len(points(tmp_path, "world", "version")) == 100


def test_events_wait_while_the_disk_refuses_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorboard, "FLUSH_EVERY_S", 0.01)
    in_the_way = tmp_path / "tensorboard"
    in_the_way.write_text("a file stands where the folder should be")
    board = Board(in_the_way, root="world", started_at=0.0)
    board.scalars("world", {"version": 1}, now_s=1.0)
    assert eventually(lambda: bool(board.trouble))
    assert "cannot write" in board.trouble
    board.scalars("world", {"version": 2}, now_s=2.0)
    in_the_way.unlink()
    assert eventually(lambda: not board.trouble)
    board.scalars("world", {"version": 3}, now_s=3.0)
    board.close()
    assert [value for _, value in points(tmp_path, "world", "version")] == [1, 2, 3]


def test_what_a_full_disk_tore_apart_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorboard, "FLUSH_EVERY_S", 1_000.0)
    board = Board(tmp_path / "tensorboard", root="world", started_at=0.0)
    board.scalars("world", {"version": 1}, now_s=1.0)
    board.flush()
    [first] = (tmp_path / "tensorboard/world").iterdir()
    whole = first.read_bytes()
    opened = Path.open

    class Full:
        """Takes half of what it is given, and then there is no space left."""

        def __init__(self, path: Path) -> None:
            self.file = opened(path, "ab+", buffering=0)

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def seek(self, offset: int, whence: int) -> int:
            return self.file.seek(offset, whence)

        def write(self, data: bytes) -> None:
            self.file.write(data[: len(data) // 2])
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, *_, **__: Full(path))
        board.scalars("world", {"version": 2}, now_s=2.0)
        board.flush()
        assert "No space left" in board.trouble
    assert first.read_bytes() == whole
    board.close()
    assert [value for _, value in points(tmp_path, "world", "version")] == [1, 2]


def test_events_that_the_disk_refuses_for_long_are_dropped_at_a_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorboard, "FLUSH_EVERY_S", 1_000.0)
    monkeypatch.setattr(tensorboard, "WAITING_BYTES", 200)
    monkeypatch.setattr(tensorboard, "KEPT_BYTES", 1_000)
    in_the_way = tmp_path / "tensorboard"
    in_the_way.write_text("a file stands where the folder should be")
    board = Board(in_the_way, root="world", started_at=0.0)
    for step in range(1_000):
        board.scalars("world", {"version": step}, now_s=step)
    in_the_way.unlink()
    board.close()
    assert 10 < len(points(tmp_path, "world", "version")) < 100


def test_a_status_that_cannot_be_written_waits(tmp_path: Path) -> None:
    clock = Clock()
    run = tracker(tmp_path, clock=clock)
    assert run.snapshot()["trouble"] == ""
    before = read_status(tmp_path)
    (tmp_path / "status.json.tmp").mkdir()
    clock.now += 10.0
    run.record(round_of(ITALY, tokens=100, loss=4.0))
    assert "status.json" in run.snapshot()["trouble"]
    assert read_status(tmp_path) == before
    (tmp_path / "status.json.tmp").rmdir()
    clock.now += 10.0
    run.record(round_of(ITALY, tokens=200, loss=4.0))
    assert run.snapshot()["trouble"] == ""
    assert read_status(tmp_path)["tokens"] == 200
    run.close()


def test_closed_event_files_take_no_more(tmp_path: Path) -> None:
    files = EventFiles(tmp_path, started_at=0.0)
    files.close()
    with pytest.raises(ValueError, match="closed"):
        files.add("world", Event())
    assert list(tmp_path.iterdir()) == []


def test_summary_holds_every_node_and_is_whole(tmp_path: Path) -> None:
    run = tracker(tmp_path)
    run.record(start(ITALY), round_of(ITALY, tokens=100, loss=4.0), verdict("italy", tau=3))
    run.close()
    quick = Summary(
        run="quick",
        method="fedavg",
        seed=7,
        wall_s=1.5,
        tokens=100,
        params_sha256="ab",
        nodes=run.summaries() | {"world": NodeSummary(kind="world", loss=math.inf)},
        staleness=run.staleness(),
        extra={"seed": 8, "note": [math.nan]},
    )
    write_summary(tmp_path, quick)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary["nodes"]) == list(KINDS)
    assert (summary["run"], summary["method"], summary["seed"], summary["note"]) == (
        "quick",
        "fedavg",
        7,
        [None],
    )
    italy = summary["nodes"][ITALY]
    assert (italy["kind"], italy["steps"], italy["tokens"], italy["accepted"]) == ("client", 10, 100, 1)
    assert (italy["loss_start"], italy["loss"], italy["tau_mean"]) == (5.0, 4.0, 3.0)
    assert summary["nodes"]["world"]["loss"] is None
    assert not (tmp_path / "summary.json.tmp").exists()


def test_a_missing_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no run in .*nowhere"):
        read_status(tmp_path / "nowhere")
    (tmp_path / "status.json").write_text("{")
    with pytest.raises(RunError, match="not valid JSON"):
        read_status(tmp_path)


def test_a_clock_that_is_set_back_puts_no_event_file_before_an_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wall = time.time()
    names = []
    for step_s in (0.0, 3_600.0, -3_600.0, 0.0):
        monkeypatch.setattr(time, "time", lambda step_s=step_s: wall + step_s)
        board = Board(tmp_path, root="world", started_at=wall)
        board.scalars("world", {"loss_by_time": 1.0}, now_s=float(len(names)))
        board.close()
        [name] = {path.name for path in (tmp_path / "world").iterdir()} - set(names)
        names.append(name)
    assert names == sorted(names)


def test_a_wall_clock_that_is_set_moves_no_curve_back(tmp_path: Path) -> None:
    wall = [1e9, 1e9 + 3_600.0, 1e9 - 3_600.0]
    for part, now_s in enumerate((10.0, 20.0, 30.0)):  # the run is resumed twice
        tracker = Tracker(
            tmp_path,
            kinds={"world": "world", "world/a": "client"},
            hparams={},
            budget=BudgetConfig(seconds=40.0),
            wall=lambda part=part: wall[part],
        )
        tracker.record(PushRecord(node="world/a", now_s=now_s, bytes=7))
        assert tracker.snapshot()["progress"] == pytest.approx(now_s / 40.0)
        tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "world" / "a"))
    events.Reload()
    drawn = [events.Scalars(name) for name in events.Tags()["scalars"]]
    assert drawn
    for curve in drawn:
        assert [event.wall_time for event in curve] == [1e9 + 10.0, 1e9 + 20.0, 1e9 + 30.0]


@pytest.mark.parametrize("odd", ["NaN", "null", "-5.0", '"soon"', "Infinity"])
def test_a_status_whose_run_time_is_damaged_makes_no_odd_progress(tmp_path: Path, odd: str) -> None:
    (tmp_path / STATUS).write_text(f'{{"started_at": {odd}, "now_s": {odd}, "nodes": {{}}}}')
    tracker = Tracker(
        tmp_path, kinds={"world": "world", "world/a": "client"}, hparams={}, budget=BudgetConfig(seconds=40.0)
    )
    assert tracker.snapshot()["progress"] == 0.0
    assert tracker.snapshot()["started_at"] == pytest.approx(time.time(), abs=60.0)
    tracker.record(PushRecord(node="world/a", now_s=-3.0, bytes=7))
    assert tracker.snapshot()["now_s"] == 0.0
    tracker.close()
