"""Members of a world: the file that counts.

    members.json    path -> state, keys, admissions; replaced as a whole, on disk before a change is known
    members.lock    held while one process changes the file
    seen.json       when each member was last there: lost without harm

A certificate alone is not enough: its key must stand here. So no list of revoked certificates is needed. The server
looks at the file at every request, and a change by the command line counts at the next one.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from worldlm_ray.errors import GatewayError
from worldlm_ray.gateway.keys import Clock, read_file
from worldlm_ray.storage.filesystem import flush_folder, replace_text

FORMAT = 1
FILE, LOCK, SEEN = "members.json", "members.lock", "seen.json"
SEEN_EVERY_S = 60.0
"""Seconds between two writings of when members were there."""


class State(StrEnum):
    """Whether a member is let in."""

    ACTIVE = "active"
    PAUSED = "paused"
    """For now: its key stays good."""
    REVOKED = "revoked"
    """Its keys are never good again."""


@dataclass(frozen=True, kw_only=True)
class MemberKey:
    """A key for which the world has made a certificate."""

    fingerprint: str
    """SHA-256 of the public key, in hex."""
    serial: str
    """Of its newest certificate, in hex."""
    begins_s: float
    """Unix seconds."""
    expires_s: float
    """Unix seconds."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """What the world knows of one member."""

    path: str
    state: State = State.ACTIVE
    keys: tuple[MemberKey, ...] = ()
    """The newest is last. None between a readmission and the enrolment after it."""
    invited_by: str = ""
    """The operator who made the invitation."""
    since_s: float = 0.0
    """When it enrolled first, in Unix seconds."""
    admissions: int = 1
    """How often it was admitted, readmissions included. When it rises, a thief's incarnations count no more."""


class Registry:
    """The members of one world.

    Args:
        folder: of the gateway.
        clock: Unix seconds.
    """

    def __init__(self, folder: Path, *, clock: Clock = time.time) -> None:
        self.folder, self.clock = folder, clock
        self._path = folder / FILE
        self._stamp: tuple[int, ...] = ()
        self._members: dict[str, Member] = {}
        self._owners: dict[str, str] = {}
        self._seen: dict[str, float] = {}
        self._seen_next_s = 0.0

    def members(self) -> Mapping[str, Member]:
        """All members by path, as the file has them now: read again only if it has changed.

        Raises:
            GatewayError: the file is missing or damaged. No member is let in then.
        """
        self._look()
        return self._members

    def owner(self, fingerprint: str) -> str | None:
        """Path of the member that has a key; None if there is none.

        Raises:
            GatewayError: as `members`.
        """
        self._look()
        return self._owners.get(fingerprint)

    @contextmanager
    def changing(self) -> Iterator[dict[str, Member]]:
        """Change the members: what is in the mapping at the end is on disk when the context closes.

        After an error inside nothing is written. One process at a time.

        Raises:
            GatewayError: as `members`, or the storage refused.
        """
        with self._locked():
            members = dict(self.members())
            yield members
            if members != self._members:
                self._write(members)

    def create(self) -> None:
        """Write a registry without members, unless there is one."""
        with self._locked():
            if not self._path.exists():
                self._write({})

    def saw(self, path: str) -> None:
        """A member has asked something. Written once a minute."""
        now_s = self.clock()
        self._seen[path] = now_s
        if now_s < self._seen_next_s:
            return
        self._seen_next_s = now_s + SEEN_EVERY_S
        with suppress(OSError):  # a full disk must not shut members out
            replace_text(self.folder / SEEN, json.dumps(self.seen() | self._seen))

    def seen(self) -> dict[str, float]:
        """Unix seconds at which each member was last there, as far as is known."""
        with suppress(OSError, ValueError):
            found = json.loads((self.folder / SEEN).read_text(encoding="utf-8"))
            if isinstance(found, dict):
                return {path: float(at) for path, at in found.items() if isinstance(at, int | float)}
        return {}

    # ---- the file --------------------------------------------------------------------------------------------

    def _look(self) -> None:
        try:
            stat = self._path.stat()
        except OSError as error:
            raise GatewayError(f"{self._path}: {error.strerror or error}; restore it from a copy") from error
        stamp = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
        if stamp != self._stamp:
            # Where another process replaces the file in between, the stamp is older than the content: read again then.
            self._keep(_read(self._path), stamp)

    def _keep(self, members: dict[str, Member], stamp: tuple[int, ...]) -> None:
        owners = {key.fingerprint: path for path, member in members.items() for key in member.keys}
        self._members, self._owners, self._stamp = members, owners, stamp

    def _write(self, members: dict[str, Member]) -> None:
        rows = {path: {k: v for k, v in asdict(member).items() if k != "path"} for path, member in members.items()}
        text = json.dumps({"format": FORMAT, "members": rows}, indent=2) + "\n"
        try:
            replace_text(self._path, text, durable=True)
            flush_folder(self.folder)  # else the old file may be back after a power cut, and with it a revoked member
        except OSError as error:
            problem = f"{self._path}: {error.strerror or error}; nothing has changed"
            raise GatewayError(f"{problem}: make room, or make it writable") from error
        self._look()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            handle = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise GatewayError(f"{self.folder}: {error.strerror or error}; make it writable") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def _read(path: Path) -> dict[str, Member]:
    try:
        raw = json.loads(read_file(path))
        if raw["format"] != FORMAT:
            raise ValueError
        return {name: _member(name, row) for name, row in raw["members"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise GatewayError(f"{path}: is damaged, so that no member is let in; restore it from a copy") from error


def _member(path: str, row: dict[str, Any]) -> Member:
    keys = tuple(MemberKey(**key) for key in row["keys"])
    for key in keys:
        good = isinstance(key.fingerprint, str) and isinstance(key.serial, str)
        if not good or not all(isinstance(at, int | float) for at in (key.begins_s, key.expires_s)):
            raise TypeError
    return Member(**(row | {"path": path, "state": State(row["state"]), "keys": keys}))
