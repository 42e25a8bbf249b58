"""An audit trail that is missing or damaged proves nothing, and is said to be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.worlds import a_verdict
from typer.testing import CliRunner

from worldlm_ray.cli import main as cli
from worldlm_ray.plan.rundir import CONFIG, STATUS, SUMMARY
from worldlm_ray.records import VerdictRecord
from worldlm_ray.reports import trail
from worldlm_ray.tracking.audit import AuditLog


def verdict(seq: int, *, incarnation: int = 1) -> VerdictRecord:
    return a_verdict(seq, incarnation=incarnation)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose world has accepted three updates."""
    (tmp_path / CONFIG).write_text("name: run\n")
    (tmp_path / SUMMARY).write_text(json.dumps({"nodes": {"world": {"accepted": 0}, "world/a": {"accepted": 3}}}))
    log = AuditLog(tmp_path, "world")
    for seq in (1, 2, 3):
        log.verdict(verdict(seq))
    return tmp_path


def lines(run: Path) -> Path:
    return run / "audit" / "world.jsonl"


def cut(run: Path) -> None:
    lines(run).write_text("".join(lines(run).read_text().splitlines(keepends=True)[:2]))


def change(line: str) -> Callable[[Path], None]:
    def change_it(run: Path) -> None:
        lines(run).write_text(lines(run).read_text() + line + "\n")

    return change_it


@pytest.mark.parametrize(
    ("damage", "place"),
    [
        (lambda run: lines(run).unlink(), "holds 0 of 3 accepted updates of world/a"),
        (lambda run: lines(run).write_text(""), "holds 0 of 3"),
        (cut, "holds 2 of 3"),
        (change("garbage"), "world.jsonl line 4"),
        (change("[1]"), "world.jsonl line 4"),
        (change('{"node": "world"}'), "world.jsonl line 4"),
        (change('{"now_s": 1.0, "node": "world", "restored": 3}'), "world.jsonl line 4"),
        (lambda run: (run / SUMMARY).write_text("{}"), "summary.json cannot be read"),
    ],
)
def test_a_damaged_trail_is_a_failure(run: Path, damage: Callable[[Path], None], place: str) -> None:
    assert trail.look(run).holds
    damage(run)
    said = CliRunner().invoke(cli.app, ["audit", str(run)])
    assert said.exit_code == 1
    assert f"the trail of {run} is missing or damaged" in said.output
    assert place in said.output
    values = CliRunner().invoke(cli.app, ["audit", str(run), "--json"])
    assert (values.exit_code, json.loads(values.output)["holds"]) == (1, False)


def test_a_garbage_line_in_the_middle_is_named(run: Path) -> None:
    first, *rest = lines(run).read_text().splitlines()
    lines(run).write_text("\n".join([first, '{"now_s": 1.0, "no', *rest]) + "\n")
    assert trail.look(run).damage == [f"{lines(run)} line 2"]


def test_a_line_that_a_kill_tore_apart_is_passed_over_and_counted(run: Path) -> None:
    with lines(run).open("a") as file:
        file.write('{"now_s": 14.0, "node": "wor')
    found = trail.look(run)
    assert (found.holds, found.torn) == (True, 1)
    assert found.conclusion(run).endswith("passed over one line that a kill has torn apart")
    AuditLog(run, "world").verdict(verdict(4, incarnation=2))
    assert (trail.look(run).holds, trail.look(run).torn) == (True, 1)


def test_a_run_without_a_summary_is_compared_with_its_status(run: Path) -> None:
    (run / SUMMARY).rename(run / STATUS)
    assert trail.look(run).holds
    lines(run).unlink()
    assert "status.json counts 3 accepted updates" in trail.look(run).conclusion(run)


def test_a_trail_of_nothing_proves_nothing(run: Path) -> None:
    (run / SUMMARY).unlink()
    lines(run).unlink()
    said = CliRunner().invoke(cli.app, ["audit", str(run), "--json"])
    assert (said.exit_code, json.loads(said.output)["holds"]) == (0, None)
    assert "nothing is proved" in CliRunner().invoke(cli.app, ["audit", str(run)]).output
