"""Words that the project does without, each with what to write instead, and sentences that are too long.

    python docs/check_words.py        list every place; `make check` fails on them

The glossary of the project's terms is docs/concepts.md. A word stays out where it hides the field's term, where it
makes the reader look for the subject, or where it has two meanings in one package.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORDS = {
    r"whoever|whosoever|whomever": "name the subject: the client, the process, a user",
    r"whom": "a sentence with its subject in front",
    r"nobody|somebody": "name who: no client, the user, an operator",
    r"of (its|their) own(?! \w)": "its, their, separate, one each",
    r"besides": "too, as well, beside",
    r"shall": "will, must, should",
    r"is had|are had": "a verb",
    r"heed": "apply, obey",
    r"forerunner": "the one before",
    r"last words?": "graceful shutdown, the final message",
    r"signs? of life": "heartbeat",
    r"shells?(?= (for|to|that|of|saves|sends|may|has|puts))": "backend",
    r"shelf|seat|desk": "buffer store, slot, task queue",
    r"news": "refresh",
}
"""Pattern, and what to write instead."""
PLACES = ("*.py", "*.md", "*.yaml", "Makefile", "Containerfile")
EXEMPT = {"docs/check_words.py", "docs/architecture.md"}
PROSE = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "docs/*.md", "examples/*.md", "benchmarks/*.md")
MOST_WORDS = 25
"""Of a sentence. Code in a line counts as one word."""
NO_PROSE = re.compile(r"<!--.*?-->|^ *```.*?^ *```$|^ {4}.*?$|^[|#].*?$", re.DOTALL | re.MULTILINE)
"""Comments, code, tables and headings."""
PARAGRAPH = re.compile(r"^.*\S.*(?:\n(?!\s*(?:[*-]|\d+\.)\s|\s*$).+)*", re.MULTILINE)
"""Lines up to an empty one, or up to the next item of a list."""
SENTENCE = re.compile(r"(?<=[.!?])[*\")]*\s+")
"""What parts two sentences."""


def long_sentences(text: str, most: int = MOST_WORDS) -> list[tuple[int, str]]:
    """Sentences of more than `most` words, each with the line at which its paragraph begins.

    Args:
        text: Markdown.
        most: words.
    """
    prose = NO_PROSE.sub(lambda match: "\n" * match.group().count("\n"), text)
    found = []
    for match in PARAGRAPH.finditer(prose):
        words = re.sub(r"`[^`]*`", "CODE", re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", match.group()))
        line = prose.count("\n", 0, match.start()) + 1
        found += [(line, one) for one in SENTENCE.split(words) if len(re.findall(r"\S*\w\S*", one)) > most]
    return found


def _listed(*patterns: str) -> list[str]:
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.split() if name not in EXEMPT and (ROOT / name).is_file()]


def findings() -> list[str]:
    """Every place: file, line, the word and what to write instead; then the sentences to part."""
    patterns = [(re.compile(rf"\b({pattern})\b", re.IGNORECASE), cure) for pattern, cure in WORDS.items()]
    found = []
    for name in _listed(*PLACES):
        for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), 1):
            for pattern, cure in patterns:
                found += [f"{name}:{number}: {match.group(0)!r}: {cure}" for match in pattern.finditer(line)]
    for name in _listed(*PROSE):
        for number, sentence in long_sentences((ROOT / name).read_text(encoding="utf-8")):
            found.append(
                f"{name}:{number}: more than {MOST_WORDS} words, make it two: {' '.join(sentence.split())[:80]}..."
            )
    return found


def main() -> int:
    """Print what was found."""
    found = findings()
    for line in found:
        print(line)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
