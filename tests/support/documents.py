"""Documents as data: their code blocks, and the mark that says whether a test runs a block.

A block of commands has a comment before it, `<!-- run -->` or `<!-- not run: REASON -->`. A page may say for all of its
blocks `<!-- commands on this page are not run: REASON -->`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("worldlm", "make", "python", "pip", "ray", "sh", "tensorboard", "git", "kubectl", "export", "mkdocs")
COMMAND = re.compile(rf"^\s*(?:\$ )?(?:{'|'.join(PROGRAMS)})\s", re.M)
PAGE_MARK = re.compile(r"<!-- commands on this page are not run: \S.* -->")
MARK = re.compile(r"<!-- (run|not run: \S.*) -->$")


@dataclass(frozen=True)
class Block:
    """A code block of a document."""

    document: str
    line: int
    """Of its first line of code, from 1."""
    language: str
    """As its fence says; empty for an indented block."""
    mark: str
    """`run`, `not run: REASON`, or empty."""
    text: str

    @property
    def runs(self) -> bool:
        """Whether a test runs it."""
        return self.mark == "run"

    @property
    def is_program(self) -> bool:
        """Whether it holds commands or Python, rather than their output or a configuration."""
        return self.language == "python" or (self.language in ("", "sh") and bool(COMMAND.search(self.text)))


def documents() -> list[str]:
    """Every document that a person reads, by its path from the root."""
    top = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "examples/README.md", "benchmarks/README.md"]
    return [*top, *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))]


def read(document: str) -> str:
    """The text of a document."""
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str) -> list[Block]:
    """The code blocks of a document, fenced and indented, in their order."""
    found, lines = [], read(document).splitlines()
    number, mark = 0, ""
    while number < len(lines):
        line = lines[number]
        if match := MARK.match(line.strip()):
            mark = match.group(1)
        elif match := re.match(r"(\s*)```(\w*)", line):
            end = next(i for i in range(number + 1, len(lines)) if lines[i].startswith(match.group(1) + "```"))
            found.append(Block(document, number + 2, match.group(2), mark, "\n".join(lines[number + 1 : end])))
            number, mark = end, ""
        elif re.match(r" {4}\s*\S", line) and not lines[number - 1].strip():
            end = number
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            text = "\n".join(one[4:] for one in lines[number:end]).rstrip()
            found.append(Block(document, number + 1, "", mark, text))
            number, mark = end - 1, ""
        elif line.strip():
            mark = ""
        number += 1
    return found
