"""Output to a terminal or a pipe: a console that pipes whole lines, and tables that fit the width.

On a terminal a table hides its least important columns until it fits, and says which. On a pipe no line is wrapped, cut
or padded, so that a program can read it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleDimensions, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from worldlm_ray.errors import OutputError

PIPE_WIDTH = 10_000
"""Columns of a line on a pipe: more than any table has."""
TEXT_WIDTH = 32
"""Width that a column of text gets before other columns are hidden. Longer text is wrapped."""
_PADDING = re.compile(r"[ \t]+$", re.MULTILINE)


class Terminal(Console):
    """A console whose lines on a pipe are whole and end with their last character.

    Paths, names and messages are printed as they are: square brackets and colons in them are no markup.

    Args:
        options: as of `rich.console.Console`.
    """

    def __init__(self, **options: Any) -> None:
        # Without colours there are no other styles either: a program reads plain text.
        plain = {"color_system": None} if os.environ.get("NO_COLOR") else {}
        super().__init__(**{"markup": False, "emoji": False, **plain, **options})

    @property
    def size(self) -> ConsoleDimensions:
        """Columns and lines. A pipe has enough columns that no line is wrapped."""
        return super().size if self.is_terminal else ConsoleDimensions(PIPE_WIDTH, 100)

    @size.setter
    def size(self, new_size: tuple[int, int]) -> None:
        self._width, self._height = new_size

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as `rich` does, on a pipe without the padding of tables."""
        try:
            if self.is_terminal or self._buffer_index:
                super().print(*objects, **options)
                return
            with self.capture() as lines:
                super().print(*objects, **options)
            self.file.write(_PADDING.sub("", lines.get()))
            self.file.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputError(f"cannot write the output: {error.strerror}; make room, or write elsewhere") from error


@dataclass(frozen=True)
class Column:
    """A column of a `FittingTable`."""

    name: str
    """Its heading, of one or more lines."""
    rank: int = 0
    """A column of rank 0 always stays. The highest rank is hidden first."""
    is_number: bool = True
    """Numbers are aligned to the right and are never cut or wrapped."""


class FittingTable:
    """A table that hides columns if the terminal is too narrow for all of them.

    Args:
        title: the line above it.
        columns: from left to right.
        caption: the line below it.
    """

    def __init__(self, title: str, columns: Sequence[Column], *, caption: str = "") -> None:
        self.title, self.columns, self.caption = title, tuple(columns), caption
        self.rows: list[tuple[tuple[str | Text, ...], str]] = []

    def add_row(self, *cells: str | Text, style: str = "") -> None:
        """Add a line.

        Args:
            cells: one per column.
            style: of the whole line.

        Raises:
            ValueError: the number of cells is not that of the columns.
        """
        if len(cells) != len(self.columns):
            raise ValueError(f"a row of {len(cells)} cells in a table of {len(self.columns)} columns")
        self.rows.append((cells, style))

    def shown(self, width: int) -> list[int]:
        """Indices of the columns that fit into a width in characters, from left to right."""
        indices = list(range(len(self.columns)))
        while self._needed(indices, gap=1) > width:
            rank, victim = max((self.columns[index].rank, index) for index in indices)
            if rank == 0:
                break
            indices.remove(victim)
        return indices

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        indices = self.shown(options.max_width)
        gap = 2 if self._needed(indices, gap=2) <= options.max_width else 1
        if self.title:  # not the caption of the table, which would be wrapped at the table's width
            yield Text(self.title, style="bold")
        yield self._table(indices, gap=gap)
        hidden = [" ".join(self.columns[i].name.split()) for i in range(len(self.columns)) if i not in indices]
        notes = [self.caption] if self.caption else []
        if hidden:
            notes.append(f"hidden in {options.max_width} columns: {', '.join(hidden)}")
        for note in notes:
            yield Text(note, style="dim")

    def _needed(self, indices: Iterable[int], *, gap: int) -> int:
        chosen = list(indices)
        return sum(self._width(index) for index in chosen) + gap * (len(chosen) - 1)

    def _width(self, index: int) -> int:
        column = self.columns[index]
        cells = [line for cells, _ in self.rows for line in str(cells[index]).split("\n")]
        widest = max(map(cell_len, [*column.name.split("\n"), *cells]))
        return widest if column.is_number else min(widest, TEXT_WIDTH)

    def _table(self, indices: Iterable[int], *, gap: int) -> Table:
        chosen = list(indices)
        table = Table(
            box=None,
            pad_edge=False,
            padding=(0, 1),
            collapse_padding=gap == 1,
            header_style="dim",
        )
        for column in (self.columns[index] for index in chosen):
            justify = "right" if column.is_number else "left"
            table.add_column(column.name, justify=justify, no_wrap=column.is_number, overflow="fold")  # type: ignore[arg-type]
        for cells, style in self.rows:
            table.add_row(*(_plain(cells[index]) for index in chosen), style=style)
        return table


def _plain(cell: str | Text) -> Text:
    """A cell whose brackets are never parsed as markup."""
    return cell if isinstance(cell, Text) else Text(cell)
