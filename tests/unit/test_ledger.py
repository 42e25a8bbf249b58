"""Accounting by hand, and a ledger that believes no change."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from worldlm_ray.errors import PrivacyError
from worldlm_ray.privacy.accounting import Spend, epsilon, noise_for, rounds_left
from worldlm_ray.privacy.ledger import Ledger


def test_epsilon_of_known_histories() -> None:
    """Figures of Opacus 1.6 for these histories at delta 1e-5."""
    history = [Spend(1.0, 0.01, 1000)]
    assert epsilon(history, delta=1e-5, accountant="rdp") == pytest.approx(2.10, abs=0.01)
    assert epsilon(history, delta=1e-5, accountant="prv") == pytest.approx(1.84, abs=0.01)
    assert epsilon([Spend(1.0, 0.01, 10)] * 100, delta=1e-5, accountant="rdp") == epsilon(
        history, delta=1e-5, accountant="rdp"
    )
    assert epsilon([], delta=1e-5, accountant="prv") == 0.0
    assert epsilon([Spend(0.0, 0.01, 1)], delta=1e-5, accountant="rdp") == math.inf


def test_rounds_of_a_budget_of_three() -> None:
    """Noise 1, rate 0.02, 20 steps a round, delta 1e-5: 22 whole rounds end below 3, the 23rd would not."""
    held = rounds_left([], noise=1.0, rate=0.02, per_round=20, target_epsilon=3.0, delta=1e-5, accountant="rdp")
    spent = [epsilon([Spend(1.0, 0.02, 20 * n)], delta=1e-5, accountant="rdp") for n in (held, held + 1)]
    assert spent[0] <= 3.0 < spent[1]
    assert held == 22


def test_noise_for_what_is_left_of_a_budget() -> None:
    """500 steps at noise 1 are spent, 200 are to come, within 4: 0.899, where a fresh ledger would say 0.795."""
    common: dict[str, Any] = {"rate": 0.02, "steps": 200, "delta": 1e-5, "accountant": "rdp", "key": "privacy"}
    assert noise_for(4.0, spent=[Spend(1.0, 0.02, 500)], **common) == pytest.approx(0.899, abs=0.003)
    with pytest.raises(PrivacyError, match=r"privacy.target_epsilon: no noise keeps 200 steps within 1 "):
        noise_for(1.0, spent=[Spend(1.0, 0.02, 500)], **common)


ENTRY = {"node": "world/a", "run": "r", "noise": 1.0, "rate": 0.02, "steps": 20}


def test_a_ledger_keeps_every_charge_and_refuses_what_is_not_allowed(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledgers", unit="record", text="abc")
    assert ledger.history() == []
    assert ledger.charge(ENTRY, allowed=lambda history: len(history) <= 2)
    assert ledger.charge(ENTRY, allowed=lambda history: len(history) <= 2)
    before = ledger.path.read_bytes()
    assert not ledger.charge(ENTRY, allowed=lambda history: len(history) <= 2)
    assert ledger.path.read_bytes() == before
    assert Ledger.at(ledger.path).history() == [Spend(1.0, 0.02, 20)] * 2


def test_a_line_that_a_crash_cut_short_is_dropped(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, unit="record", text="abc")
    for _ in range(2):
        ledger.charge(ENTRY, allowed=lambda _: True)
    whole = ledger.path.read_bytes()
    for length in range(whole.index(b"\n") + 1, len(whole)):
        ledger.path.write_bytes(whole[:length])
        ledger = Ledger.at(ledger.path)
        assert len(ledger.history()) == 1
    assert ledger.charge(ENTRY, allowed=lambda _: True)
    assert ledger.path.read_bytes() == whole


@pytest.mark.parametrize("change", [("1.0", "9.0"), ('"steps": 20', '"steps": 2'), ('"number": 1', '"number": 2')])
def test_a_ledger_that_was_changed_is_not_believed(tmp_path: Path, change: tuple[str, str]) -> None:
    ledger = Ledger(tmp_path, unit="record", text="abc")
    ledger.charge(ENTRY, allowed=lambda _: True)
    ledger.charge(ENTRY, allowed=lambda _: True)
    changed = ledger.path.read_text().replace(*change, 1)
    ledger.path.write_text(changed)
    with pytest.raises(PrivacyError, match="line 1: was changed after it was written"):
        Ledger.at(ledger.path).charge(ENTRY, allowed=lambda _: True)
    assert ledger.path.read_text() == changed


def test_a_charge_that_was_taken_out_is_noticed(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, unit="record", text="abc")
    for _ in range(3):
        ledger.charge(ENTRY, allowed=lambda _: True)
    lines = ledger.path.read_text().splitlines(keepends=True)
    ledger.path.write_text(lines[0] + lines[2])
    with pytest.raises(PrivacyError, match="line 2"):
        Ledger.at(ledger.path).history()
    with pytest.raises(PrivacyError, match="was shortened while it was in use"):
        ledger.history()


def test_a_ledger_that_cannot_be_written_stops_the_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PrivacyError, match="nothing may be trained"):
        Ledger(tmp_path / "file" / "ledgers", unit="record", text="abc").charge(ENTRY, allowed=lambda _: True)
