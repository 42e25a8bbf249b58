"""Draws docs/architecture.md: every package, what it is, what stands in it, and which others it imports.

    python docs/draw_architecture.py            write the page and its picture anew (`make architecture`)
    python docs/draw_architecture.py --check    exit code 1 if the page is not what the code says

The layers are those of CONTRIBUTING.md. An arrow may only lead downwards, or stay within its layer.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
PICTURE = ROOT / "docs" / "images" / "layers.svg"
STEP = 40
"""Height of a layer in the picture."""
STYLE = """  <style>
    text { font-family: system-ui, "DejaVu Sans", Helvetica, Arial, sans-serif; font-size: 14px; fill: #1f2933 }
    .rooms { fill: #52606d; font-size: 13px }
    .box { fill: #e0e7ff; stroke: #4338ca }
    .line { stroke: #7b8794; stroke-width: 1.5; fill: none }
    .back { fill: #ffffff }
  </style>
  <defs>
    <marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8" orient="auto">
      <path d="M0 0 L10 5 L0 10 z" fill="#7b8794"/>
    </marker>
  </defs>"""
HEAD = """# Architecture

<!-- Written by `make architecture` from the code and the layer table of CONTRIBUTING.md. Do not edit. -->

Imports lead downwards only: a package may import its own layer and those below it. `tests/unit/test_layers.py` holds
the code to this. {packages} packages and {modules} modules, {arrows} arrows, none upwards.

"""


@dataclass(frozen=True)
class Layer:
    """A row of the layer table."""

    name: str
    rooms: tuple[str, ...]
    """Packages, and modules that stand at the top of worldlm_ray."""
    note: str


def layers() -> list[Layer]:
    """The rows of the layer table, the highest first."""
    rows = [
        line for line in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")
    ]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows if "`" in row.split("|")[2]]
    return [
        Layer(name, tuple(room.rstrip("/") for room in re.findall(r"`([a-z_/]+)`", rooms)), note)
        for name, rooms, note in cells
    ]


def files(room: str) -> list[Path]:
    """The modules of a package, or the one file of a module."""
    place = ROOT / "actors" if room == "actors" else ROOT / "worldlm_ray" / room
    return sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]


def first_line(path: Path) -> str:
    """The first sentence of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split()).rstrip(".")


def imported(path: Path) -> set[str]:
    """Rooms that a file imports anywhere, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        top, _, rest = node.module.partition(".")
        if top == "actors":
            found.add("actors")
        elif top == "worldlm_ray":
            found |= {rest.partition(".")[0]} if rest else {alias.name for alias in node.names}
    return found


def arrows() -> dict[str, dict[str, int]]:
    """For every room, the rooms that it imports and how many of its files do."""
    found: dict[str, dict[str, int]] = {}
    for layer in layers():
        for room in layer.rooms:
            counts: dict[str, int] = defaultdict(int)
            for path in files(room):
                for other in imported(path) - {room}:
                    counts[other] += 1
            found[room] = dict(counts)
    return found


def tree() -> list[str]:
    """The packages by layer, each with its modules."""
    lines = ["## Packages", ""]
    for layer in layers():
        lines += [f"### {layer.name[0].upper()}{layer.name[1:]}", ""]
        for room in layer.rooms:
            paths = [path for path in files(room) if path.name != "__init__.py"]
            if len(files(room)) == 1:
                lines += [f"* `{room}.py`: {first_line(paths[0])}", ""]
                continue
            base = files(room)[0].parent
            lines += [f"`{room}/` {first_line(base / '__init__.py')}", "", "| module | what it is |", "|---|---|"]
            for path in paths:
                name, meaning = path.relative_to(base).with_suffix("").as_posix(), first_line(path).replace("|", "\\|")
                lines.append(f"| `{name}` | {meaning} |")
            lines.append("")
    return lines


def picture() -> str:
    """The layers as an SVG, the highest on top: a site shows it without a script from elsewhere."""
    rows = layers()
    height = STEP * len(rows)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 840 {height + 20}" role="img" aria-labelledby="title">',
        '  <title id="title">The layers: imports lead downwards only</title>',
        STYLE,
        f'  <rect class="back" width="840" height="{height + 20}" rx="8"/>',
        f'  <path class="line" d="M30 20 L30 {height}" marker-end="url(#tip)"/>',
    ]
    for number, layer in enumerate(rows):
        top = 10 + STEP * number
        lines += [
            f'  <rect class="box" x="60" y="{top}" width="760" height="{STEP - 8}" rx="6"/>',
            f'  <text x="76" y="{top + 21}">{layer.name}</text>',
            f'  <text class="rooms" x="260" y="{top + 21}">{" · ".join(layer.rooms)}</text>',
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"


def table(found: dict[str, dict[str, int]]) -> list[str]:
    """Every arrow, with the rule that permits it."""
    layer_of = {room: (number, layer.name) for number, layer in enumerate(layers()) for room in layer.rooms}
    lines = ["## Arrows", "", "A number says how many files of the importing package use the other.", ""]
    lines += ["| package | imports from its layer | imports from layers below |", "|---|---|---|"]
    for room, to in found.items():
        number, _ = layer_of[room]
        beside = [f"`{other}` {count}" for other, count in sorted(to.items()) if layer_of[other][0] == number]
        below = [
            f"`{other}` {count} ({layer_of[other][1]})"
            for other, count in sorted(to.items(), key=lambda item: (layer_of[item[0]][0], item[0]))
            if layer_of[other][0] > number
        ]
        lines.append(f"| `{room}` | {', '.join(beside)} | {', '.join(below)} |")
    return [*lines, ""]


def page() -> str:
    """The whole page.

    Raises:
        ValueError: an arrow leads upwards.
    """
    found = arrows()
    layer_of = {room: number for number, layer in enumerate(layers()) for room in layer.rooms}
    upwards = [f"{room} -> {other}" for room, to in found.items() for other in to if layer_of[other] < layer_of[room]]
    if upwards:
        raise ValueError(f"these arrows lead upwards: {', '.join(upwards)}")
    head = HEAD.format(
        packages=sum(len(files(room)) > 1 for room in found),
        modules=sum(len(files(room)) for room in found),
        arrows=sum(map(len, found.values())),
    )
    shown = ["## Layers", "", f"![The layers](images/{PICTURE.name})", ""]
    return head + "\n".join([*shown, *tree(), *table(found)]).rstrip() + "\n"


def main(arguments: list[str]) -> int:
    """Write the page, or compare it."""
    drawn = {PAGE: page(), PICTURE: picture()}
    if arguments == ["--check"]:
        if all(path.is_file() and path.read_text(encoding="utf-8") == text for path, text in drawn.items()):
            return 0
        print("docs/architecture.md is not what the code says: make architecture")
        return 1
    for path, text in drawn.items():
        path.write_text(text, encoding="utf-8")
        print(f"{path.relative_to(ROOT)} written")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
