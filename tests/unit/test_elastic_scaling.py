"""The figures of a scaling experiment, by hand."""

from __future__ import annotations

from pathlib import Path

import elastic_scaling
import pytest
import scaling_figures
from rich.console import Console
from scaling_figures import Stage

from worldlm_ray.errors import ConfigError
from worldlm_ray.plan.plan import Plan
from worldlm_ray.records import VerdictRecord
from worldlm_ray.tracking.audit import AuditLog

TOKENS = {"world/a": 100, "world/b": 100}


def accept(log: AuditLog, sender: str, seq: int, now_s: float, tau: int = 0) -> None:
    log.verdict(
        VerdictRecord(
            node="world",
            now_s=now_s,
            sender=sender,
            seq=seq,
            base_version=0,
            version=0,
            tau=tau,
            verdict="accepted",
            bytes=1,
            detail="",
        )
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """`a` pushes every second for 40 s, `b` in the second half, with one update that a restart had undone."""
    log = AuditLog(tmp_path, "world")
    for second in range(40):
        accept(log, "a", second + 1, second + 0.5)
        if second >= 20:
            accept(log, "b", second - 19, second + 0.5, tau=1)
    accept(log, "a", 40, 39.9)
    return tmp_path


def looks() -> list[dict[str, object]]:
    return [{"now_s": float(s), "nodes": {"world": {"clients_loss": 5.0 - 0.1 * s if s else None}}} for s in range(41)]


def test_figures_are_those_of_the_settled_part(run: Path) -> None:
    stages = [
        Stage(machines=1, begin_s=0.0, end_s=20.0),
        Stage(machines=2, begin_s=20.0, end_s=40.0),
        Stage(machines=4, begin_s=40.0, end_s=50.0),
    ]
    one, two, none = scaling_figures.figures(run, stages, round_tokens=TOKENS, looks=looks())
    assert (one.clients, one.tokens_per_s, one.efficiency, one.tau) == (1, 100.0, 1.0, 0.0)
    assert one.clients_loss == pytest.approx(3.0)
    assert (two.clients, two.tokens_per_s, two.efficiency, two.tau) == (2, 200.0, 1.0, 0.5)
    assert (none.clients, none.tokens_per_s, none.efficiency, none.tau) == (0, 0.0, 0.0, None)


def test_they_are_shown_and_drawn(run: Path, tmp_path: Path) -> None:
    stages = [Stage(machines=n, begin_s=20.0 * (n - 1), end_s=20.0 * n) for n in (1, 2)]
    rows = scaling_figures.figures(run, stages, round_tokens=TOKENS, looks=looks())
    console = Console(width=100, record=True)
    console.print(scaling_figures.table(rows))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert ["2", "2", "200", "1.00", "0.50", "1.000"] in lines
    picture = tmp_path / "scaling.png"
    scaling_figures.plot(picture, rows, run_dir=run, round_tokens=TOKENS, looks=looks())
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert scaling_figures.as_json(rows)[1]["tokens_per_s"] == 200.0


def test_stages_grow_and_shrink() -> None:
    assert elastic_scaling.parse("1,2,4") == [1, 2, 4, 2, 1]
    assert elastic_scaling.parse("2") == [2]
    assert elastic_scaling.parse("4,1,2") == [4, 1, 2]
    for wrong in ("", "0,1", "a", "1,,2"):
        with pytest.raises(ConfigError, match=r"--machines: got .*; write numbers of machines"):
            elastic_scaling.parse(wrong)


def test_a_world_to_be_scaled_begins_without_clients_and_ends_when_told(tiny: object) -> None:
    plan: Plan = elastic_scaling.elastic(tiny(budget={"rounds": 3}))  # type: ignore[operator]
    assert [spec.min_clients for spec in plan.root.inner] == [None, 0, 0]
    assert plan.config.budget.rounds is None
