"""Charts, images and texts of a run, read back as TensorBoard reads them."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from support.tracked import (
    FRANCE,
    ITALY,
    JAPAN,
    KINDS,
    STARTED_AT,
    Clock,
    aggregation,
    attention,
    chart,
    events,
    points,
    round_of,
    scalar_tags,
    start,
    tracker,
    verdict,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from worldlm_ray.config.schema import BudgetConfig
from worldlm_ray.records import (
    LifeRecord,
    MergeRecord,
    PullRecord,
    PushRecord,
)
from worldlm_ray.tracking import charts, curves, drawing
from worldlm_ray.tracking.charts import charts_of
from worldlm_ray.tracking.tensorboard import Board, layout
from worldlm_ray.tracking.tracker import Tracker


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


def test_every_node_is_a_separate_run(tmp_path: Path) -> None:
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


def test_a_round_without_a_measurement_draws_no_loss(tmp_path: Path) -> None:
    run = tracker(tmp_path)
    run.record(start(ITALY), round_of(ITALY, tokens=200, loss=None))
    run.close()
    assert points(tmp_path, ITALY, chart("loss", by="tokens")) == [(0, 5.0)]
    assert points(tmp_path, ITALY, chart("train_loss", by="tokens")) == [(200, 2.5)]
    assert chart("epsilon") not in scalar_tags(tmp_path, ITALY)


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


def test_attention_images_are_few_and_every_node_has_its_turn(tmp_path: Path) -> None:
    clock = Clock()
    run = tracker(tmp_path, clock=clock)
    run.record(attention(version=1))
    for version in (2, 3):
        run.record(attention(version=version), attention("world", version=version))
    clock.now += drawing.IMAGE_EVERY_S
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


def test_every_chart_of_the_first_screen_finds_its_tags(tmp_path: Path) -> None:
    run = tracker(tmp_path)
    for client in (ITALY, FRANCE, JAPAN):
        run.record(start(client), round_of(client, tokens=100, loss=3.0, epsilon=1.5))
        run.record(PushRecord(node=client, now_s=1.0, bytes=1))
        run.record(PullRecord(node=client, now_s=1.0, version=1, bytes=1))
        run.record(MergeRecord(node=client, now_s=1.0, version=1, m=1.0))
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
