"""What the trail of an inner node proves."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.worlds import a_verdict

from worldlm_ray.records import VerdictRecord
from worldlm_ray.tracking.audit import AuditLog, proofs, read


def verdict(seq: int, reason: str = "accepted", *, incarnation: int = 1, sender: str = "italy") -> VerdictRecord:
    return a_verdict(seq, reason, node="world/europe", sender=sender, incarnation=incarnation)


@pytest.fixture
def log(tmp_path: Path) -> AuditLog:
    return AuditLog(tmp_path, "world/europe")


def test_every_verdict_is_a_line_as_soon_as_it_is_written(log: AuditLog, tmp_path: Path) -> None:
    log.verdict(verdict(1))
    log.verdict(verdict(2, "stale"))
    lines = [(line["sender"], line["seq"], line["verdict"]) for line in read(tmp_path)]
    assert lines == [("italy", 1, "accepted"), ("italy", 2, "stale")]


def test_what_a_restart_undid_and_came_again_is_not_lost(log: AuditLog, tmp_path: Path) -> None:
    for seq in (1, 2, 3):
        log.verdict(verdict(seq))
    log.restored(now_s=4.0, incarnation=2, last_seq={"italy": 1})
    for seq in (2, 3, 4):
        log.verdict(verdict(seq, incarnation=2))
    [proof] = proofs(tmp_path)
    assert (proof.applied, proof.again, proof.lost, proof.twice) == ([1, 2, 3, 4], 2, [], [])
    assert proof.holds


def test_what_a_restart_undid_and_never_came_again_is_lost(log: AuditLog, tmp_path: Path) -> None:
    for seq in (1, 2, 3):
        log.verdict(verdict(seq))
    log.restored(now_s=4.0, incarnation=2, last_seq={"italy": 1})
    log.verdict(verdict(3, incarnation=2))
    [proof] = proofs(tmp_path)
    assert (proof.lost, proof.holds) == ([2], False)


def test_what_was_applied_twice_is_found(log: AuditLog, tmp_path: Path) -> None:
    for seq in (1, 2, 2):
        log.verdict(verdict(seq))
    [proof] = proofs(tmp_path)
    assert (proof.twice, proof.holds) == ([2], False)


def test_lines_of_a_leftover_count_as_written_before_its_successor_began(log: AuditLog, tmp_path: Path) -> None:
    log.verdict(verdict(1))
    log.restored(now_s=2.0, incarnation=2, last_seq={"italy": 1})
    log.verdict(verdict(2, incarnation=2))
    log.verdict(verdict(2, incarnation=1))  # the process before, which still lived
    [proof] = proofs(tmp_path)
    assert (proof.applied, proof.again, proof.holds) == ([1, 2], 1, True)


def test_a_line_that_a_kill_tore_apart_is_closed_off(log: AuditLog, tmp_path: Path) -> None:
    log.verdict(verdict(1))
    path = tmp_path / "audit" / "world" / "europe.jsonl"
    with path.open("a") as file:
        file.write('{"now_s": 14.0, "node": "wor')
    again = AuditLog(tmp_path, "world/europe")
    again.verdict(verdict(2))
    assert [line["seq"] for line in read(tmp_path)] == [1, 2]


def test_lines_wait_for_storage_that_refuses(log: AuditLog, tmp_path: Path) -> None:
    (tmp_path / "audit").write_text("in the way")
    warnings: list[str] = []
    log = AuditLog(tmp_path, "world/europe", warn=warnings.append)
    log.verdict(verdict(1))
    log.verdict(verdict(2))
    assert len(warnings) == 1
    assert "its lines wait in memory" in warnings[0]
    (tmp_path / "audit").unlink()
    log.verdict(verdict(3))
    assert [line["seq"] for line in read(tmp_path)] == [1, 2, 3]
