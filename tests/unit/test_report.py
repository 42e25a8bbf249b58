"""Tables as a terminal of a given width shows them."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console, RenderableType

from worldlm_ray.reports.tables import (
    amount,
    budget_line,
    duration,
    final_table,
    folded,
    left_of,
    live_table,
    printable,
)


def render(table: RenderableType, *, width: int) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(table)
    return [line.rstrip() for line in out.getvalue().splitlines()]


def node(kind: str, **values: Any) -> dict[str, Any]:
    empty = {
        "version": 0,
        "tokens": 0,
        "tokens_per_s": 0.0,
        "tau": None,
        "loss": None,
        "clients_loss": None,
        "perplexity_start": None,
        "perplexity": None,
        "clients_perplexity": None,
        "private": False,
        "busy_fraction": 0.0,
        "accepted": 0,
        "refused": {},
        "state": "waiting",
    }
    return {"kind": kind, **empty, **values}


ITALY = node(
    "client",
    version=21,
    tokens=1_434_000,
    tokens_per_s=16_300.0,
    tau=2,
    loss=1.5071,
    perplexity_start=256.0,
    perplexity=4.512,
    busy_fraction=0.958,
    accepted=13,
    refused={"stale": 2, "norm": 1},
    state="finished",
)
NODES = {
    "world": node(
        "world",
        version=17,
        loss=3.0372,
        perplexity=20.85,
        perplexity_start=275.8,
        clients_loss=2.1151,
        clients_perplexity=8.29,
    ),
    "world/europe": node("federation"),
    "world/japan": node("client", private=True),
    "world/europe/italy": ITALY,
}
SNAPSHOT = {
    "run": "quick",
    "progress": 0.425,
    "budget": {"tokens": 20_000_000},
    "now_s": 200.0,
    "tokens": 7_880_000,
    "nodes": NODES,
}
SUMMARY = {
    "run": "quick",
    "method": "worldlm",
    "seed": 0,
    "wall_s": 200.0,
    "tokens": 7_880_000,
    "nodes": NODES,
}


@pytest.mark.parametrize("width", [80, 100, 120])
def test_live_table_has_one_whole_line_per_node(width: int) -> None:
    lines = render(live_table(SNAPSHOT), width=width)
    assert lines[0] == "quick  [####......] 42%  3 min 20 s, 4 min 31 s left  7.88M of 20.0M tokens"
    rows = {
        line.split()[0]: line.split()[1:] for line in lines if line.split()[0] in ("world", "europe", "italy", "japan")
    }
    assert list(rows) == ["world", "europe", "italy", "japan"]
    everything = ["21", "1.43M", "16.3k", "2", "1.507", "–", "4.51", "–", "96%", "13/3", "finished"]  # noqa: RUF001
    if width >= 100:
        assert rows["italy"] == everything
        assert rows["world"][4:8] == ["3.037", "2.115", "20.85", "8.29"]
        assert rows["japan"][4:8] == ["private", "–", "private", "–"]  # noqa: RUF001
        assert [part for part in ("(nats/byte)", "per byte", "own model") if part not in " ".join(lines[1:4])] == []
    else:
        assert f"hidden in {width} columns: " in lines[-1]
        assert set(rows["italy"]) <= set(everything)
        assert {"4.51", "finished", "96%"} <= set(rows["italy"])
    assert max(len(line) for line in lines) <= width


def test_live_table_wraps_a_long_name_and_cuts_no_number() -> None:
    deep = {"world": node("world"), "world/a": node("federation"), f"world/a/{'x' * 60}": ITALY}
    lines = render(live_table({**SNAPSHOT, "nodes": deep}), width=80)
    assert sum(line.count("x") for line in lines) - " ".join(lines).count("perplexity") == 60
    assert any(" 4.51 " in line for line in lines)
    assert not any("…" in line for line in lines)


def test_time_left_is_foretold_once_there_is_something_to_tell_by() -> None:
    assert left_of({"progress": 0.5, "now_s": 60.0}) == "1 min 00 s left"
    assert left_of({"progress": 0.01, "now_s": 60.0}) == ""
    assert left_of({"progress": 1.0, "now_s": 60.0}) == ""


@pytest.mark.parametrize("width", [80, 120])
def test_final_table_shows_markup_and_control_characters_as_text(width: int) -> None:
    samples = {"world/europe/italy": "selva [red]oscura[/red]\n\x1b[31mciao\x07 [/nothing]"}
    nodes = {**NODES, "world/europe/italy": {**ITALY, "tau_mean": 0.789}}
    lines = render(final_table({**SUMMARY, "nodes": nodes}, samples), width=width)
    text = " ".join(" ".join(lines).split())
    assert "\x1b" not in text
    assert "\x07" not in text
    for part in ("[red]oscura[/red]", r"\x1b[31mciao\x07"):
        assert part in text
    assert len(lines) == 4 + len(nodes) + 2, "a sample takes one line"
    italy = next(line for line in lines if line.lstrip().startswith("italy"))
    assert italy.split()[:6] == ["italy", "1.43M", "0.79", "256.0", "4.51", "–"]  # noqa: RUF001 - the table's dash
    assert max(len(line) for line in lines) <= width


def test_final_table_of_nodes_without_numbers_or_samples() -> None:
    lines = render(final_table(SUMMARY, {}), width=100)
    rows = {line.split()[0]: line.split()[1:] for line in lines[4:]}
    assert rows["world"] == ["0", "–", "275.8", "20.85", "8.29"]  # noqa: RUF001 - the dash that the table shows
    assert rows["europe"] == ["0", "–", "–", "–", "–"]  # noqa: RUF001
    assert rows["japan"] == ["0", "–", "–", "private", "–"]  # noqa: RUF001


def test_what_was_trained_beyond_a_budget_in_tokens_is_said() -> None:
    spent = {"tokens": 400_000, "trained": 440_000, "beyond": 40_000}
    said = "budget 400k tokens, trained 440k (rounds under way were finished)"
    assert budget_line({**SUMMARY, "budget": spent}) == said
    assert budget_line({**SUMMARY, "budget": {**spent, "trained": 400_000, "beyond": 0}}) == ""
    assert budget_line({**SUMMARY, "budget": {"rounds": 3}}) == budget_line(SUMMARY) == ""


def test_children_stand_under_their_parents() -> None:
    assert [path for path, _ in folded(NODES)] == [
        "world",
        "world/europe",
        "world/europe/italy",
        "world/japan",
    ]


def test_printable_keeps_languages_and_escapes_what_acts_on_a_terminal() -> None:
    assert printable("猫 é\n\t\x9b\u202e") == r"猫 é \t\x9b\u202e"


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (0, "0"),
        (999, "999"),
        (999.7, "1.00k"),
        (12_345, "12.3k"),
        (999_600, "1.00M"),
        (4e6, "4.00M"),
        (123e9, "123G"),
    ],
)
def test_amounts_are_short(number: float, shown: str) -> None:
    assert amount(number) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(59.4, "59 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7_500, "2 h 05 min")]
)
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown
