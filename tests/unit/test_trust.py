"""docs/trust.md has a row for every field that a child or a parent can lie about."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from worldlm_ray.aggregation.events import Done, Heartbeat, Joined, Left, Pull
from worldlm_ray.exchange.messages import Model, Residual, Update
from worldlm_ray.exchange.replies import Verdict, Welcome

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "trust.md").read_text(encoding="utf-8")
CALLS = (Joined, Pull, Done, Left, Heartbeat)


def rows(heading: str) -> list[str]:
    """First column of the table below a heading."""
    [section] = [part for part in TEXT.split("\n## ") if part.startswith(heading)]
    return re.findall(r"^\| `([A-Za-z_.]+)` \|", section, re.M)


def names(kind: type) -> list[str]:
    return [each.name for each in fields(kind)]


@pytest.mark.parametrize("kind", [Update, Residual, Model])
def test_every_field_of_a_message_has_a_row(kind: type) -> None:
    assert sorted(rows(f"{kind.__name__}:")) == sorted(names(kind))


def test_every_field_of_a_call_has_a_row() -> None:
    found = {name for call in CALLS for name in names(call)} - {"now_s", "quota", "admission"}  # the receiver's own
    assert sorted(rows("Calls of a child")) == sorted(found)


def test_every_field_of_an_answer_has_a_row() -> None:
    expected = [f"{kind.__name__}.{name}" for kind in (Welcome, Verdict) for name in names(kind)]
    assert sorted(rows("Answers of a parent")) == sorted(expected)


def test_every_refusal_that_the_page_names_is_one() -> None:
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "worldlm_ray").rglob("*.py"))
    for reason in re.findall(r"\(`([a-z_]+)`\)", TEXT):
        assert f'"{reason}"' in code, reason
