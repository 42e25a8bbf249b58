"""How paths are printed: so that a person can copy them into a shell."""

from __future__ import annotations

import glob
import re
import shlex
from pathlib import Path

_PLAIN = re.compile(r"[\w@%+=:,./\[\]-]+")


def pasted(path: Path | str) -> str:
    """A path as a word of a command line: quoted only where a shell would read it as something else.

    Square brackets stay as they are unless they match another file: a shell takes a pattern without a match literally.
    """
    text = str(path)
    if not _PLAIN.fullmatch(text):
        return shlex.quote(text)
    return shlex.quote(text) if "[" in text and any(found != text for found in glob.iglob(text)) else text
