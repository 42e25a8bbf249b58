"""Curves as lines of JSON: whole lines, continued, kept while the storage refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from worldlm_ray.tracking import curves
from worldlm_ray.tracking.curves import Curves


class Clock:
    """Stands still until told otherwise."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def values(folder: Path) -> list[float | None]:
    return [line["value"] for line in curves.read(folder)]


def test_a_line_holds_one_value(tmp_path: Path) -> None:
    found = Curves(tmp_path)
    found.scalars("world/a", "client", {"loss": 2.5, "epsilon": None}, now_s=1.23456, tokens=100)
    found.flush()
    [line] = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line) == {"now_s": 1.235, "tokens": 100, "node": "world/a", "name": "loss", "value": 2.5}


def test_a_value_that_is_not_finite_is_null(tmp_path: Path) -> None:
    found = Curves(tmp_path)
    found.scalars("world/a", "client", {"loss": math.nan, "perplexity": math.inf}, now_s=0.0, tokens=0)
    found.flush()
    assert values(tmp_path) == [None, None]


def test_a_resumed_run_appends_after_a_line_that_a_kill_tore(tmp_path: Path) -> None:
    first = Curves(tmp_path)
    first.scalars("world", "world", {"version": 1}, now_s=1.0, tokens=0)
    first.flush()
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"now_s": 1.5, "tok')
    second = Curves(tmp_path)
    second.scalars("world", "world", {"version": 2}, now_s=2.0, tokens=0)
    second.flush()
    assert values(tmp_path) == [1, 2]


def test_lines_are_written_now_and_then(tmp_path: Path) -> None:
    clock = Clock()
    found = Curves(tmp_path, clock=clock)
    found.scalars("world", "world", {"version": 1}, now_s=1.0, tokens=0)
    found.flush_if_due()
    assert not (tmp_path / "metrics.jsonl").exists()
    clock.now += curves.EVERY_S
    found.flush_if_due()
    assert values(tmp_path) == [1]


def test_lines_wait_while_the_disk_refuses_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "KEPT_LINES", 3)
    (tmp_path / "metrics.jsonl").mkdir()
    found = Curves(tmp_path)
    for version in range(5):
        found.scalars("world", "world", {"version": version}, now_s=0.0, tokens=0)
        found.flush()
    assert "cannot write" in found.trouble
    (tmp_path / "metrics.jsonl").rmdir()
    found.flush()
    assert values(tmp_path) == [0, 1, 2]
    assert found.trouble == f"2 lines of {tmp_path / 'metrics.jsonl'} were dropped"
