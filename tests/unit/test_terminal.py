"""The console: whole lines on a pipe, tables that fit on a terminal."""

from __future__ import annotations

import io

import pytest
from rich.text import Text
from typer.testing import CliRunner

from worldlm_ray.cli.main import app
from worldlm_ray.reports.terminal import Column, FittingTable, Terminal

COLUMNS = [
    Column("node", is_number=False),
    Column("loss\n(nats/byte)"),
    Column("tokens/s", rank=2),
    Column("staleness", rank=1),
    Column("state", is_number=False),
]


def a_table() -> FittingTable:
    table = FittingTable("a run", COLUMNS, caption="what it means")
    table.add_row("world", "1.234", "12.3k", "0.50", "training")
    table.add_row("  a-client-with-a-long-name", "2.345", "1.23k", "[1]", Text("paused: its budget is spent"))
    return table


def printed(width: int | None, *objects: object) -> str:
    """What a terminal of so many columns shows; a pipe where there is none."""
    out = io.StringIO()
    console = Terminal(file=out, width=width, force_terminal=width is not None, color_system=None)
    console.print(*objects)
    return out.getvalue()


def test_a_pipe_gets_whole_lines_without_padding() -> None:
    long = "x" * 300 + " " + "y" * 300
    lines = printed(None, a_table(), long).splitlines()
    assert long in lines
    assert [line for line in lines if line != line.rstrip()] == []
    [row] = [line for line in lines if "a-client-with-a-long-name" in line]
    assert " ".join(row.split()) == "a-client-with-a-long-name 2.345 1.23k [1] paused: its budget is spent"


def test_a_wide_terminal_shows_every_column() -> None:
    shown = printed(120, a_table())
    assert "tokens/s" in shown
    assert "staleness" in shown
    assert "hidden" not in shown


@pytest.mark.parametrize("width", [70, 75, 80])
def test_a_narrow_terminal_hides_the_least_important_column_and_says_so(width: int) -> None:
    lines = printed(width, a_table()).splitlines()
    assert max(map(len, lines)) <= width
    assert any(f"hidden in {width} columns: tokens/s" in " ".join(line.split()) for line in lines)
    assert any("a-client-with-a-long-name" in line for line in lines)  # a name is never cut
    assert not any("…" in line for line in lines)


def test_columns_of_rank_0_stay() -> None:
    shown = printed(40, a_table())
    assert "1.234" in shown
    assert "2.345" in shown


def test_a_row_needs_a_cell_for_every_column() -> None:
    with pytest.raises(ValueError, match="2 cells in a table of 5"):
        a_table().add_row("a", "b")


def test_every_command_is_summed_up_in_a_whole_sentence() -> None:
    done = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    lines = done.output.partition("Commands:")[2].strip().splitlines()
    assert len(lines) >= 14
    assert [line for line in lines if not line.endswith(".") or line.endswith("...")] == []
