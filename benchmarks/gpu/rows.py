"""Rows of results: each is on disk as soon as it is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROWS = ".jsonl"


class Rows:
    """Takes the rows of one step.

    Args:
        path: file to append to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(
        self,
        what: str,
        value: float,
        unit: str = "",
        *,
        most: float | None = None,
        least: float | None = None,
        must: bool = False,
    ) -> None:
        """Write a row.

        Args:
            what: what was measured.
            value: the figure.
            unit: its unit; a ratio has none.
            most: the target, if the value should not be larger.
            least: the target, if it should not be smaller.
            must: whether missing the target means that something is wrong, not slow.
        """
        target, met = "", None
        if most is not None:
            target, met = f"<= {most:g}", value <= most
        elif least is not None:
            target, met = f">= {least:g}", value >= least
        row = {"what": what, "value": float(value), "unit": unit, "target": target, "met": met, "must": must}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"  {what}: {value:.5g} {unit} {target}", flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a step; a line that was cut off is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
