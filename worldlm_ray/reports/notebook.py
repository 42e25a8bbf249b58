"""What a notebook shows: a rich object as HTML, and one that is replaced while a run goes on.

rich's live display needs ipywidgets in a notebook. IPython's display handles, which every notebook has, do what is
needed.
"""

from __future__ import annotations

import io
import sys
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live

from worldlm_ray.reports.terminal import Terminal

WIDTH = 120
"""Columns of a table in a notebook."""
FRAME = '<pre style="white-space:pre;overflow-x:auto;line-height:normal;font-family:monospace">{code}</pre>'


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")  # a kernel has imported it
    shell = None if ipython is None else ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None


def console_for(progress: bool | None) -> Terminal:
    """The console of a call from Python.

    Args:
        progress: whether to show anything; None shows it on a terminal and in a notebook.
    """
    console = Terminal()
    is_shown = console.is_terminal or in_notebook() if progress is None else progress
    return console if is_shown else Terminal(quiet=True)


def live_of(console: Console) -> Live | NotebookLive | None:
    """What is redrawn in place: on a terminal and in a notebook; None elsewhere."""
    if console.quiet:
        return None
    if console.is_terminal:
        return Live(console=console, auto_refresh=False, transient=True)
    return NotebookLive() if in_notebook() else None


def as_html(shown: RenderableType) -> str:
    """A rich object as HTML that needs no style sheet."""
    console = Terminal(file=io.StringIO(), record=True, width=WIDTH, force_terminal=True, force_jupyter=False)
    console.print(shown)
    return console.export_html(inline_styles=True, code_format=FRAME)


def as_text(shown: RenderableType) -> str:
    """A rich object as plain text."""
    lines = io.StringIO()
    Terminal(file=lines, width=WIDTH, force_jupyter=False).print(shown)
    return lines.getvalue()


class NotebookLive:
    """An output of a notebook's cell that is replaced in place, with the methods of `rich.live.Live` that are used."""

    def __init__(self) -> None:
        self._handle: Any = None

    def start(self) -> None:
        """Nothing is shown before the first update."""

    def update(self, shown: RenderableType, *, refresh: bool = True) -> None:
        """Replace what is shown."""
        from IPython.display import display

        data = {"text/html": as_html(shown), "text/plain": as_text(shown)}
        if self._handle is None:
            self._handle = display(data, raw=True, display_id=True)
        else:
            self._handle.update(data, raw=True)

    def stop(self) -> None:
        """The last state goes, as on a terminal: the result follows."""
        if self._handle is not None:
            self._handle.update({"text/plain": ""}, raw=True)
            self._handle = None
