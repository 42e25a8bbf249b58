"""What is known of a border in a run's files: sums over restarts, charts, and the lines of `worldlm status`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support.tracked import lines, scalar_tags

from worldlm_ray.config.schema import BudgetConfig
from worldlm_ray.records import BorderRecord
from worldlm_ray.reports.border import border_lines, link_facts
from worldlm_ray.tracking.tracker import Tracker

EUROPE = "world/europe"
KINDS = {"world": "world", EUROPE: "remote"}
RECORD = BorderRecord(
    node=EUROPE,
    now_s=10.0,
    bytes_up=4_000_000,
    bytes_down=8_000_000,
    mbit_up=8.192,
    mbit_down=32.768,
    resumed=1,
    accepted=2,
    refused={"stale": 1},
    tau=3,
    every_s=25.0,
    parameters=1_024_000,
    codec="fp32",
    overlap=False,
    certificate_days=29.5,
    offline_s=0.0,
)
QUIET = replace(
    RECORD, now_s=15.0, bytes_up=0, bytes_down=0, mbit_up=None, mbit_down=None, resumed=0, accepted=0, refused={}
)


def tracker(folder: Path) -> Tracker:
    return Tracker(folder, kinds=KINDS, hparams={}, budget=BudgetConfig(rounds=1))


def test_counts_add_up_over_a_restart_and_the_newest_speed_stays(tmp_path: Path) -> None:
    run = tracker(tmp_path)
    run.record(RECORD, replace(QUIET, tau=None, every_s=None, offline_s=50.0))
    run.close()
    run = tracker(tmp_path)
    run.record(replace(RECORD, now_s=20.0, refused={"stale": 1, "busy": 2}, mbit_up=4.0))
    found = run.snapshot()["nodes"][EUROPE]["border"]
    run.close()
    assert (found["bytes_up"], found["bytes_down"], found["resumed"], found["accepted"]) == (8e6, 16e6, 2, 4)
    assert found["refused"] == {"stale": 2, "busy": 2}
    assert (found["mbit_up"], found["mbit_down"], found["tau"], found["every_s"]) == (4.0, 32.768, 3, 25.0)
    assert found["offline_s"] == 0.0
    assert lines(tmp_path, EUROPE, "border_offline_s") == [(10.0, 0.0), (15.0, 50.0), (20.0, 0.0)]
    assert lines(tmp_path, EUROPE, "border_mbit_up") == [(10.0, 8.192), (20.0, 4.0)]
    assert lines(tmp_path, EUROPE, "border_refused/stale") == [(10.0, 1), (20.0, 2)]


def test_a_border_has_a_group_of_charts(tmp_path: Path) -> None:
    run = tracker(tmp_path)
    run.record(RECORD)
    run.close()
    tags = {tag.partition("/")[2] for tag in scalar_tags(tmp_path, EUROPE) if tag.startswith("6 exchange over a")}
    assert tags == {
        "1 Mbit per s up, while updates move",
        "2 Mbit per s down, while models move",
        "3 bytes up",
        "4 bytes down",
        "5 parts sent again",
        "6 updates accepted",
        "7 refusals, stale",
        "8 versions behind, newest update",
        "9 seconds between two updates",
        "10 seconds offline",
        "11 days until the certificate ends",
    }


def test_status_has_a_line_and_advice_for_each_border(tmp_path: Path) -> None:
    run = tracker(tmp_path)
    assert not list(border_lines(run.snapshot()))
    run.record(replace(RECORD, every_s=None, resumed=0, refused={}))
    [line] = border_lines(run.snapshot())
    assert line == (
        "world/europe: 4.00MB up at 8.2 Mbit/s, 8.00MB down at 32.8 Mbit/s, 2 accepted, certificate 30 days, there"
    )
    run.record(replace(QUIET, offline_s=75.0))
    crossed, advised = border_lines(run.snapshot())
    assert crossed.endswith("certificate 30 days, offline for 1 min 15 s")
    assert advised.startswith("world/europe: clients are busy for 80%: an update takes 4.0 s up and a model 1.0 s down")
    run.close()


def test_a_round_is_what_the_exchange_leaves() -> None:
    border = {
        "mbit_up": 8.192,
        "mbit_down": 32.768,
        "every_s": 25.0,
        "parameters": 1_024_000,
        "codec": "fp32",
        "overlap": False,
    }
    facts = link_facts(border)
    assert facts is not None
    assert facts.round_s == pytest.approx(20.0)
    assert (beside := link_facts(border | {"overlap": True})) is not None
    assert beside.round_s == 25.0
    assert (measured := link_facts(border, mbit_up=16.384)) is not None
    assert measured.round_s == pytest.approx(22.0)
    assert link_facts(border | {"every_s": None}) is None
