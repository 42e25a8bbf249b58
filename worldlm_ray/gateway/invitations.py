"""Invitations that a world has made, in a folder: each is used once.

ID.json         path, public key of the secret, expiry
ID.used         the request that it was used for; its file is created by one process only
ID.approved     when the operator approved it, where that was asked for
ID.pem          the certificates that were the answer
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from worldlm_ray.errors import GatewayError, Refused
from worldlm_ray.gateway.certificates import DAY_S
from worldlm_ray.gateway.invitation import (
    ASKS_CHARTER,
    ID_BYTES,
    SECRET_BYTES,
    Invitation,
    bad_invitation,
    check_proof,
    is_id,
)
from worldlm_ray.gateway.keys import Clock, read_file
from worldlm_ray.storage.filesystem import create_text, flush_folder, make_folder, replace_text

FOLDER = "invitations"
KEPT_S = 30 * DAY_S
"""How long the files of an invitation stay after its time."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What the world keeps of an invitation."""

    id: str
    path: str
    """The member's."""
    verifier: str
    """Public key of the secret."""
    created_s: float
    expires_s: float
    """Unix seconds."""
    approve: bool
    """Whether an operator must approve the key that comes."""
    by: str
    """The operator who made it."""


@dataclass(frozen=True, kw_only=True)
class Use:
    """The request that an invitation was used for."""

    request: str
    """SHA-256 of the certificate signing request, in hex."""
    fingerprint: str
    """Of its key."""


class Invitations:
    """The invitations of one world.

    Args:
        folder: of the gateway.
        clock: Unix seconds.
    """

    def __init__(self, folder: Path, *, clock: Clock = time.time) -> None:
        self.folder, self.clock = folder / FOLDER, clock

    def create(self, path: str, *, url: str, world: str, expires_s: float, approve: bool, by: str) -> Invitation:
        """Make an invitation. Older ones for the same path are taken back.

        Args:
            path: the member's.
            url: of the gateway.
            world: the world's id.
            expires_s: seconds that it is good for.
            approve: see `Kept`.
            by: see `Kept`.

        Raises:
            GatewayError: the storage refused.
        """
        self.cancel(path)
        self._tidy()
        invitation = Invitation(
            url=url,
            world=world,
            path=path,
            id=secrets.token_hex(ID_BYTES),
            secret=secrets.token_bytes(SECRET_BYTES),
        )
        now_s = self.clock()
        kept = Kept(
            id=invitation.id,
            path=path,
            verifier=invitation.verifier,
            created_s=now_s,
            expires_s=now_s + expires_s,
            approve=approve,
            by=by,
        )
        try:
            make_folder(self.folder)
            replace_text(self._file(kept.id, "json"), json.dumps(asdict(kept)), durable=True)
        except OSError as error:
            raise GatewayError(f"{self.folder}: {error.strerror or error}; make it writable") from error
        return invitation

    def check(self, invitation: str, proof: bytes) -> None:
        """Refuse a stranger without an invitation; none is used up.

        Args:
            invitation: its id.
            proof: by `Invitation.proof` of `ASKS_CHARTER`.

        Raises:
            Refused: bad_invitation.
            GatewayError: its file is damaged.
        """
        kept = self.get(invitation)
        check_proof(kept.verifier, kept.id, proof, ASKS_CHARTER)

    def get(self, invitation: str) -> Kept:
        """What is kept of an invitation.

        Raises:
            Refused: bad_invitation: there is none.
            GatewayError: its file is damaged.
        """
        if not is_id(invitation) or not self._file(invitation, "json").exists():
            raise bad_invitation()
        return Kept(**_read(self._file(invitation, "json"), Kept))

    def all(self) -> list[Kept]:
        """Every invitation of which files are left, the oldest first."""
        names = sorted(path.stem for path in self.folder.glob("*.json")) if self.folder.is_dir() else []
        return sorted((self.get(name) for name in names if is_id(name)), key=lambda kept: kept.created_s)

    def use_of(self, invitation: str) -> Use | None:
        """What an invitation was used for; None before."""
        path = self._file(invitation, "used")
        return Use(**_read(path, Use)) if path.exists() else None

    def use(self, kept: Kept, request: bytes, fingerprint: str) -> Use:
        """Use an invitation for a request. The same request may come again in the invitation's time.

        Where the operator approves the key, that time begins anew with the approval.

        Args:
            kept: the invitation.
            request: the certificate signing request, in DER.
            fingerprint: of its key.

        Returns:
            What it is used for: perhaps another request, which came first.

        Raises:
            Refused: invitation_expired.
            GatewayError: the storage refused.
        """
        mine = Use(request=hashlib.sha256(request).hexdigest(), fingerprint=fingerprint)
        used = self.use_of(kept.id)
        if self.clock() >= (kept.expires_s if used is None else self._answered_until(kept)):
            over = f"the invitation of {kept.path} is over since {_when(kept.expires_s)}"
            raise Refused("invitation_expired", f"{over}; ask the world's operator for a new one")
        if used is not None:
            return used
        try:
            create_text(self._file(kept.id, "used"), json.dumps(asdict(mine)))
            flush_folder(self.folder)
        except FileExistsError:
            return self.use_of(kept.id) or mine
        except OSError as error:
            raise GatewayError(f"{self.folder}: {error.strerror or error}; make it writable") from error
        return mine

    def approve(self, invitation: str) -> None:
        """Let the request that an invitation was used for have its certificate."""
        replace_text(self._file(invitation, "approved"), json.dumps({"at_s": self.clock()}), durable=True)

    def is_approved(self, kept: Kept) -> bool:
        """Whether nothing stands between its request and a certificate."""
        return not kept.approve or self._file(kept.id, "approved").exists()

    def waiting(self) -> list[tuple[Kept, Use]]:
        """Requests that an operator is to approve."""
        found = [(kept, self.use_of(kept.id)) for kept in self.all() if not self.is_approved(kept)]
        return [(kept, use) for kept, use in found if use is not None]

    def answer_of(self, invitation: str) -> bytes | None:
        """The certificates that were the answer; None before."""
        path = self._file(invitation, "pem")
        return read_file(path) if path.exists() else None

    def answer(self, invitation: str, chain_pem: bytes) -> None:
        """Keep the answer, in case it is lost on its way."""
        replace_text(self._file(invitation, "pem"), chain_pem.decode(), durable=True)

    def cancel(self, path: str) -> int:
        """Take back all invitations for a path; returns how many could still have let a member in."""
        open_ = 0
        for kept in self.all():
            if kept.path == path:
                may_come = self.clock() < kept.expires_s or self.use_of(kept.id) is not None
                open_ += may_come and self.answer_of(kept.id) is None
                self._remove(kept.id)
        return open_

    def _answered_until(self, kept: Kept) -> float:
        if not kept.approve:
            return kept.expires_s
        path = self._file(kept.id, "approved")
        if not path.exists():
            return float("inf")  # the operators are still on the telephone
        return float(json.loads(read_file(path))["at_s"]) + kept.expires_s - kept.created_s

    def _tidy(self) -> None:
        for kept in self.all():
            if self.clock() > kept.expires_s + KEPT_S:
                self._remove(kept.id)

    def _remove(self, invitation: str) -> None:
        # The one without which nothing can be asked for goes first.
        for ending in ("json", "pem", "approved", "used"):
            self._file(invitation, ending).unlink(missing_ok=True)

    def _file(self, invitation: str, ending: str) -> Path:
        return self.folder / f"{invitation}.{ending}"


def _read(path: Path, kind: type[Any]) -> dict[str, Any]:
    try:
        found = json.loads(read_file(path))
        kind(**found)
    except (ValueError, TypeError) as error:
        raise GatewayError(f"{path}: is damaged; remove it, and invite again") from error
    return dict(found)


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
