"""What a member's operator has said about its link: files of the profile, which a running proxy looks at all the time.

    standing.json    active, paused, leaving or left
    accepted.json    epoch and digest of the charter that the operator, or the policy, has accepted

    running.lock     locked while a run has this link

Two files, since two processes write them: neither has to read what it replaces.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from enum import StrEnum
from pathlib import Path
from typing import Any

from worldlm_ray.errors import GatewayError
from worldlm_ray.gateway.charter import Signed
from worldlm_ray.gateway.keys import read_facts
from worldlm_ray.storage.filesystem import flush_folder, replace_text

FORMAT = 1
STANDING, ACCEPTED, RUNNING = "standing.json", "accepted.json", "running.lock"


class State(StrEnum):
    """Whether a member's link is open."""

    ACTIVE = "active"
    PAUSED = "paused"
    """Nothing crosses until `resume`."""
    LEAVING = "leaving"
    """The run ends: what is made is pushed, then the world is told."""
    LEFT = "left"
    """The world knows: this profile lets no run begin."""


class Standing:
    """The link of one profile, as its operator wants it.

    Args:
        folder: of the profile.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def state(self) -> State:
        """As the file says now; active where there is none.

        Raises:
            GatewayError: the file is damaged.
        """
        path = self.folder / STANDING
        if not path.exists():
            return State.ACTIVE
        said = _read(path, {"state": str})["state"]
        if said not in list(State):
            raise GatewayError(f"{path}: {said[:40]!r} is no state; run `worldlm gateway resume {self.folder}`")
        return State(said)

    def become(self, state: State) -> None:
        """Write a state.

        Raises:
            GatewayError: the storage refused.
        """
        _write(self.folder / STANDING, {"state": state})

    def run(self) -> None:
        """Mark that a run has this link, for as long as this process lives.

        Raises:
            GatewayError: the storage refused.
        """
        self._locked(fcntl.LOCK_SH)  # waits for a command that is looking

    @property
    def is_running(self) -> bool:
        """Whether a process on this machine has this link.

        Raises:
            GatewayError: the storage refused.
        """
        try:
            os.close(self._locked(fcntl.LOCK_EX | fcntl.LOCK_NB))
        except BlockingIOError:
            return True
        return False

    def _locked(self, kind: int) -> int:
        path = self.folder / RUNNING
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise GatewayError(f"{path}: {error.strerror or error}; make it writable") from error
        try:
            fcntl.flock(handle, kind)
        except OSError:
            os.close(handle)
            raise
        return handle

    @property
    def accepted(self) -> tuple[int, str]:
        """Epoch and digest of the accepted charter; (0, "") before the first.

        Raises:
            GatewayError: the file is damaged.
        """
        path = self.folder / ACCEPTED
        if not path.exists():
            return 0, ""
        found = _read(path, {"epoch": int, "digest": str})
        return found["epoch"], found["digest"]

    def accept(self, signed: Signed) -> None:
        """Write that a charter is accepted.

        Raises:
            GatewayError: the storage refused.
        """
        _write(self.folder / ACCEPTED, {"epoch": signed.charter.epoch, "digest": digest_of(signed)})


def digest_of(signed: Signed) -> str:
    """SHA-256 of what a charter says, in hex."""
    return hashlib.sha256(signed.body).hexdigest()


def _read(path: Path, kinds: dict[str, type]) -> dict[str, Any]:
    return read_facts(path, {"format": int, **kinds}, version=FORMAT, writer="worldlm gateway")


def _write(path: Path, facts: dict[str, Any]) -> None:
    try:
        replace_text(path, json.dumps({"format": FORMAT, **facts}) + "\n", durable=True)
        flush_folder(path.parent)
    except OSError as error:
        raise GatewayError(f"{path}: {error.strerror or error}; make room, or make it writable") from error
