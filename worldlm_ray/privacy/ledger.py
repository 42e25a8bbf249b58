"""The durable record of what a text has paid: a line per charge, on disk before anything that it pays for exists.

    {"node": "world/eu/italy", "run": "...", "round": 3, "noise": 1.1, "rate": 0.02, "steps": 20, "unit": "record", ...}

There is one ledger per text and unit, for every client that trains on it: its name is made of both. A charge is never
taken back: a round that was lost in a crash was paid for all the same. A line that a crash has cut short was not on
disk yet, so that its round had not begun: it is dropped.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from worldlm_ray.errors import PrivacyError
from worldlm_ray.privacy.accounting import Spend


class Ledger:
    """One text's ledger.

    Args:
        folder: where ledgers lie; made at the first charge.
        unit: what is protected, such as `record`.
        text: fingerprint of the text.
    """

    def __init__(self, folder: Path, *, unit: str, text: str) -> None:
        self.path = folder / f"{unit}-{text}.jsonl"
        self._entries: list[dict[str, Any]] = []
        """What was read so far; ..."""
        self._read_bytes = 0
        """... which is as much of the file, so that a long ledger is not checked again at every look."""

    @classmethod
    def at(cls, path: Path) -> Ledger:
        """The ledger in a file."""
        unit, _, text = path.stem.partition("-")
        return cls(path.parent, unit=unit, text=text)

    def entries(self) -> list[dict[str, Any]]:
        """Every charge so far.

        Raises:
            PrivacyError: a line was changed after it was written.
        """
        try:
            with self.path.open("rb") as file:
                return self._catch_up(file)
        except FileNotFoundError:
            return []

    def _catch_up(self, file: Any) -> list[dict[str, Any]]:
        """Read what others have written since the last look; what a crash has cut short is left out."""
        if os.fstat(file.fileno()).st_size < self._read_bytes:
            raise PrivacyError(f"{self.path}: was shortened while it was in use; restore the file from a copy")
        file.seek(self._read_bytes)
        data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._entries = [*self._entries, *_parsed(self.path, whole, self._entries)]
        self._read_bytes += len(whole)
        return self._entries

    def history(self) -> list[Spend]:
        """What was paid for, in the accountants' terms."""
        return [Spend(entry["noise"], entry["rate"], entry["steps"]) for entry in self.entries()]

    def charge(self, entry: Mapping[str, Any], *, allowed: Callable[[list[Spend]], bool]) -> bool:
        """Write a charge, unless the budget forbids it. When this returns True it is on disk.

        Args:
            entry: what is paid for: `noise`, `rate`, `steps` and what describes it.
            allowed: asked with the history that would result.

        Raises:
            PrivacyError: the ledger is damaged or cannot be written: nothing may be trained.
        """
        try:
            with self._locked() as file:
                entries = self._catch_up(file)
                history = [Spend(e["noise"], e["rate"], e["steps"]) for e in entries]
                if not allowed([*history, Spend(entry["noise"], entry["rate"], entry["steps"])]):
                    return False
                body = dict(entry) | {"number": len(entries) + 1}
                charged = body | {"check": _check(body, _last(entries))}
                line = (json.dumps(charged) + "\n").encode()
                file.truncate(self._read_bytes)
                file.seek(0, os.SEEK_END)
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
                self._entries, self._read_bytes = [*entries, charged], self._read_bytes + len(line)
                return True
        except OSError as error:
            raise PrivacyError(f"the ledger {self.path} cannot be written ({error}); nothing may be trained") from error

    @contextmanager
    def _locked(self) -> Iterator[Any]:
        """The file, held by this process alone: clients with the same text may charge at once."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not self.path.exists()
        with self.path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if is_new:  # the name must be as durable as the line
                folder = os.open(self.path.parent, os.O_RDONLY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
            yield file


def _last(entries: list[dict[str, Any]]) -> str:
    return str(entries[-1]["check"]) if entries else ""


def _check(body: Mapping[str, Any], before: str) -> str:
    """A digest over a line and the one before it: none can be changed, or taken out between others, unnoticed.

    Whether the last ones are there, the checkpoints of those who wrote them know.
    """
    text = before + json.dumps(dict(body), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _parsed(path: Path, lines: bytes, earlier: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    before = _last(earlier)
    for number, line in enumerate(lines.splitlines(), start=len(earlier) + 1):
        try:
            entry = json.loads(line)
            body = {name: value for name, value in entry.items() if name != "check"}
            valid = entry["check"] == _check(body, before) and entry["number"] == number
        except (ValueError, KeyError, TypeError):
            valid = False
        if not valid:
            raise PrivacyError(
                f"{path}, line {number}: was changed after it was written; restore the file from a copy: "
                "without it the spending is unknown"
            )
        before = entry["check"]
        yield entry
