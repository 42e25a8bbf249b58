"""Log lines of a run's processes: the level, the path of the node, and where they go."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from support.worlds import TINY_MODEL, client
from typer.testing import CliRunner

from worldlm_ray.cli.main import app
from worldlm_ray.config.loading import from_mapping
from worldlm_ray.errors import ConfigError
from worldlm_ray.records import LifeRecord, PushRecord
from worldlm_ray.tracking import log_lines

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (DEBUG|INFO|WARNING) (\S+): ")


def said(folder: Path, node: str) -> list[str]:
    file = folder / "logs" / f"{node}.log"
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


def test_a_line_has_the_path_of_its_node_and_goes_to_a_file_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log_lines.set_up("info", "world/europe", tmp_path)
    assert not (tmp_path / "logs").exists(), "a process that says nothing leaves no file"
    logging.getLogger("actors.inner").info("hello")
    log_lines.note(LifeRecord(node="world/europe", now_s=1.0, event="warning", detail="no room"))
    log_lines.note(PushRecord(node="world/europe", now_s=1.0, bytes=7))
    lines = said(tmp_path, "world/europe")
    assert [LINE.sub(r"\1 \2 ", line) for line in lines] == [
        "INFO world/europe hello",
        "WARNING world/europe LifeRecord at 1.0 s event=warning version=0 detail=no room",
    ]
    assert capsys.readouterr().err.splitlines() == lines


def test_debug_shows_every_record_and_a_second_call_replaces_the_first(tmp_path: Path) -> None:
    log_lines.set_up("error", "world/a", tmp_path / "old")
    log_lines.set_up("debug", "recorder", tmp_path)
    log_lines.note(PushRecord(node="world/a", now_s=1.0, bytes=7))
    assert [LINE.sub(r"\1 \2 ", line) for line in said(tmp_path, "recorder")] == [
        "DEBUG world/a PushRecord at 1.0 s bytes=7"
    ]
    assert said(tmp_path / "old", "world/a") == []


def test_an_unknown_level_is_one_error() -> None:
    with pytest.raises(ConfigError, match=r"logging\.level: got 'loud'"):
        from_mapping({"budget": {"rounds": 1}, "logging": {"level": "loud"}})


def test_the_command_logs_at_the_level_that_is_asked_for(tmp_path: Path) -> None:
    raw: dict[str, Any] = {
        "run_dir": str(tmp_path / "run"),
        "model": TINY_MODEL,
        "budget": {"rounds": 1},
        "training": {"local_steps": 2, "batch_size": 2},
        "data": {"cache_dir": str(tmp_path / "cache")},
        "world": {"children": [client("a", tmp_path, 1)]},
    }
    conf = tmp_path / "small.yaml"
    conf.write_text(json.dumps(raw), encoding="utf-8")
    done = CliRunner().invoke(app, ["simulate", str(conf), "--log-level", "info"])
    assert done.exit_code == 0, done.output
    nodes = {match[2] for line in done.stderr.splitlines() if (match := LINE.match(line))}
    assert {"world", "world/a"} <= nodes
    assert any("INFO world/a: RoundRecord" in line for line in said(tmp_path / "run", "command"))
    assert "RoundRecord" not in done.stdout
