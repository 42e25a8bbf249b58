"""Words that the project does without, each with what to write instead: `make check` fails on them.

    python docs/check_words.py        list every place

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


def findings() -> list[str]:
    """Every place: file, line, the word and what to write instead."""
    listed = subprocess.run(["git", "ls-files", *PLACES], cwd=ROOT, capture_output=True, text=True, check=True)
    patterns = [(re.compile(rf"\b({pattern})\b", re.IGNORECASE), cure) for pattern, cure in WORDS.items()]
    found = []
    for name in listed.stdout.split():
        if name in EXEMPT or not (ROOT / name).is_file():
            continue
        for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), 1):
            for pattern, cure in patterns:
                found += [f"{name}:{number}: {match.group(0)!r}: {cure}" for match in pattern.finditer(line)]
    return found


def main() -> int:
    """Print what was found."""
    found = findings()
    for line in found:
        print(line)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
