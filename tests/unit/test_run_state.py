"""What is known of every node of a run: counts, means, progress, and what a second tracker takes over."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from support.tracked import (
    FRANCE,
    ITALY,
    JAPAN,
    chart,
    event_files,
    final,
    lines,
    points,
    round_of,
    scalar_tags,
    start,
    tracker,
    verdict,
)

from worldlm_ray.config.schema import BudgetConfig
from worldlm_ray.errors import RunError
from worldlm_ray.records import (
    LifeRecord,
    ProgressRecord,
    PullRecord,
    PushRecord,
    StartRecord,
)
from worldlm_ray.tracking import audit
from worldlm_ray.tracking.status import read_status
from worldlm_ray.tracking.tracker import Tracker


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


def test_rounds_without_a_record_are_counted_when_the_client_reports_them(tmp_path: Path) -> None:
    run = tracker(tmp_path)
    run.record(round_of(ITALY, tokens=100, loss=2.0))
    run.record(ProgressRecord(node=ITALY, now_s=50.0, round=4, steps=40, tokens=400))
    nodes = run.snapshot()["nodes"]
    run.close()
    assert (nodes[ITALY]["rounds"], nodes[ITALY]["steps"], nodes[ITALY]["loss"]) == (4, 40, 2.0)
    assert nodes["world"]["tokens"] == 400
    with pytest.raises(RunError, match="only clients train"):
        tracker(tmp_path / "other").record(ProgressRecord(node="world", now_s=0.0, round=1, steps=1, tokens=1))


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
    assert snapshot["nodes"]["world/europe"]["version"] == 0, "a federation counts its version itself"


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
