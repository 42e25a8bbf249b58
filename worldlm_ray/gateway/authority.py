"""Who is let in at a world's border: what its operator decides, and what its server answers.

    operator    invite, approve, revoke, readmit
    server      authorise (every request), enrol, renew

All of it lies in the gateway's folder, so that the command line and the server need not know of each other. A refusal
changes nothing. `authorise` reads no file that has not changed; `enrol` and `renew` wait for the disk, so that a server
runs them in a thread.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from cryptography import x509

from worldlm_ray.config.values import one_of
from worldlm_ray.errors import GatewayError, Refused
from worldlm_ray.gateway import certificates
from worldlm_ray.gateway.certificates import LEAF_DAYS, checked_path
from worldlm_ray.gateway.identity import Identity
from worldlm_ray.gateway.invitation import Invitation, check_proof
from worldlm_ray.gateway.invitations import Invitations, Kept
from worldlm_ray.gateway.keys import Clock, PublicKey, certificate_key, fingerprint, spoken
from worldlm_ray.gateway.registry import Member, MemberKey, Registry, State
from worldlm_ray.storage.filesystem import Growing

JOURNAL = "journal.jsonl"
MOST_KEYS = 8
"""Keys of one member that are good at a time. A correct member has two at most, around a renewal."""
MOST_RECORDED = 100
"""Refused uses of invitations that one process writes into the journal."""
LONGEST_EXPIRY_S = 90 * certificates.DAY_S


@dataclass(frozen=True)
class Enrolled:
    """The answer to an enrolment."""

    path: str
    """The member's."""
    chain_pem: bytes
    """Its certificate and the issuing certificate."""


@dataclass(frozen=True)
class _Peer:
    """What a certificate says of its owner."""

    world: str
    path: str
    fingerprint: str
    begin_s: float
    end_s: float


class Authority:
    """The gateway's folder of one world.

    Args:
        folder: made by `identity.init`.
        clock: Unix seconds.
        days: that a member's certificate is good for.
        most_members: that are enrolled; one more is refused.

    Raises:
        GatewayError: the folder is missing or damaged.
    """

    def __init__(
        self, folder: Path, *, clock: Clock = time.time, days: float = LEAF_DAYS, most_members: int | None = None
    ) -> None:
        self.clock, self.days, self._most_members = clock, days, most_members
        self.identity = Identity(folder, clock=clock)
        self.registry = Registry(folder, clock=clock)
        self.registry.create()
        self.invitations = Invitations(folder, clock=clock)
        self.check_invited = self.invitations.check
        self._journal = Growing(folder / JOURNAL, closing=b"\n")
        self._recorded = 0

    # ---- the server ------------------------------------------------------------------------------------------

    def authorise(self, certificate: bytes, *, path: str | None = None) -> str:
        """The member that a request comes from, by the certificate of its connection.

        TLS has checked the chain before. What counts beside it is the registry, as it is now.

        Args:
            certificate: the peer's, in DER.
            path: that the request says it comes from, if it says one.

        Returns:
            The member's path.

        Raises:
            Refused: bad_certificate, wrong_world, wrong_path, not_yet_valid, expired, unknown, revoked or paused.
            GatewayError: the registry is damaged: no member is let in.
        """
        peer, now_s = _peer(certificate), self.clock()
        who = f"{peer.path} (key {spoken(peer.fingerprint)})"
        if peer.world != self.identity.world:
            raise Refused("wrong_world", f"{who} belongs to another world; join this one by an invitation")
        member = self.registry.members().get(peer.path)
        if member is None:
            raise Refused("unknown", f"{who} is no member; ask the world's operator for an invitation")
        if member.state is State.REVOKED:
            raise Refused("revoked", f"{who} is no member any more; ask the world's operator to readmit it")
        if self.registry.owner(peer.fingerprint) != peer.path:
            raise Refused("unknown", f"{who}: this key is not registered; ask the world's operator for an invitation")
        if now_s < peer.begin_s:
            ahead = f"its certificate begins in {(peer.begin_s - now_s) / 60:.0f} min"
            raise Refused("not_yet_valid", f"{who}: {ahead}; set the clocks of both sides right")
        if now_s >= peer.end_s:
            over = f"its certificate is over for {(now_s - peer.end_s) / certificates.DAY_S:.1f} days"
            raise Refused("expired", f"{who}: {over}; ask the world's operator for a new invitation")
        if member.state is State.PAUSED:
            raise Refused("paused", f"{who} is paused by the world's operator; try again later")
        if path is not None and path != peer.path:
            raise Refused("wrong_path", f"{who} speaks as {path[:80]!r}: a member speaks for itself alone")
        self.registry.saw(peer.path)
        return peer.path

    def admissions(self, path: str) -> int:
        """How often a member was let in, readmissions included: the parent forgets its incarnations when this rises.

        Raises:
            GatewayError: as `authorise`.
        """
        member = self.registry.members().get(path)
        return 1 if member is None else member.admissions

    def enrol(self, request: bytes, invitation: str, proof: bytes) -> Enrolled:
        """Make a member's first certificate. The same request again has the same answer, in the invitation's time.

        Args:
            request: certificate signing request, in DER.
            invitation: its id.
            proof: by `Invitation.proof`.

        Raises:
            Refused: bad_request, bad_invitation, invitation_expired, invitation_used, waiting (for the operator: ask
                again later), revoked, known_key or too_many_members.
            GatewayError: the folder is damaged or cannot be written.
        """
        certificates.check_request_size(request)
        kept = self.invitations.get(invitation)
        check_proof(kept.verifier, kept.id, proof, request)
        key = certificates.read_request(request)  # not before: a stranger's bytes are not parsed
        mark = fingerprint(key)
        used = self.invitations.use(kept, request, mark)
        if used.request != hashlib.sha256(request).hexdigest():
            self._note(kept.path, f"invitation {kept.id} used again, by the key {spoken(mark)}")
            got = f"the invitation of {kept.path} was used by the key {spoken(used.fingerprint)}"
            raise Refused("invitation_used", f"{got}; if that is not yours, tell the world's operator at once")
        if not self.invitations.is_approved(kept):
            cure = f"the operator runs `worldlm gateway approve {kept.path}` and compares the key {spoken(mark)}"
            raise Refused("waiting", f"{kept.path} is to be approved: {cure}")
        return Enrolled(kept.path, self._first(kept, key))

    def renew(self, certificate: bytes, request: bytes) -> bytes:
        """Make a member's next certificate, over its present one.

        Args:
            certificate: the peer's, in DER.
            request: certificate signing request of a new key, in DER.

        Returns:
            The certificate and the issuing certificate, as PEM.

        Raises:
            Refused: as `authorise`, or bad_request, known_key or too_many_keys.
            GatewayError: the folder is damaged or cannot be written.
        """
        path, key = self.authorise(certificate), certificates.read_request(request)
        mark, now_s = fingerprint(key), self.clock()
        if mark == _peer(certificate).fingerprint:
            raise Refused("known_key", f"{path} renews with its old key; make a new one")
        with self.registry.changing() as members:
            member = _admitted(members, path, mark)
            keys = tuple(old for old in member.keys if old.expires_s > now_s and old.fingerprint != mark)
            if len(keys) >= MOST_KEYS:
                got = f"{path} has {len(keys)} keys that are good"
                raise Refused("too_many_keys", f"{got}; its operator revokes and readmits it if they are not its own")
            chain, made = self._issue(key, path)
            members[path] = replace(member, keys=(*keys, made))
        self._record("renewed", path, spoken(mark))
        return chain

    def resign(self, path: str) -> None:
        """`revoke`, as the member has asked for it."""
        self.revoke(path, by="the member itself")

    def _first(self, kept: Kept, key: PublicKey) -> bytes:
        answer, mark = self.invitations.answer_of(kept.id), fingerprint(key)
        with self.registry.changing() as members:
            self.invitations.get(kept.id)  # the operator may have taken it back since it was looked at
            member = _admitted(members, kept.path, mark)
            if answer is None:
                self._check_room(members, kept.path)
                chain, made = self._issue(key, kept.path)
                since_s = member.since_s or self.clock()
                # Keys of before are good no more: a path has one owner.
                members[kept.path] = replace(member, keys=(made,), invited_by=kept.by, since_s=since_s)
        if answer is not None:
            return answer
        self.invitations.answer(kept.id, chain)
        self._record("enrolled", kept.path, spoken(mark))
        return chain

    def _check_room(self, members: dict[str, Member], path: str) -> None:
        counted = [each for each in members.values() if each.keys and each.state is not State.REVOKED]
        others = sum(each.path != path for each in counted)
        if self._most_members is not None and others >= self._most_members:
            text = f"the world has {others} members already; its operator can revoke one, or raise gateway.max_members"
            self._note(path, text)
            raise Refused("too_many_members", text)

    def _note(self, path: str, detail: str) -> None:
        """Record a refusal, unless there were many."""
        if self._recorded < MOST_RECORDED:
            self._recorded += 1
            self._record("refused", path, detail)

    def _issue(self, key: PublicKey, path: str) -> tuple[bytes, MemberKey]:
        issuing, now_s = self.identity.issuing(), self.clock()
        made = certificates.make_member(issuing, key, self.identity.world, path, now_s=now_s, days=self.days)
        entry = MemberKey(
            fingerprint=fingerprint(key),
            serial=f"{made.serial_number:x}",
            begins_s=certificates.begin_of(made),
            expires_s=certificates.end_of(made),
        )
        return certificates.pem(made, issuing.certificate), entry

    # ---- the operator ----------------------------------------------------------------------------------------

    def invite(self, path: str, *, expires_s: float, approve: bool = False, by: str = "") -> Invitation:
        """Make an invitation. Earlier ones for the same path are taken back.

        Args:
            path: of the member to be.
            expires_s: seconds that it is good for.
            approve: whether the operator must approve the member's key.
            by: the operator.

        Raises:
            GatewayError: the path cannot be one, or is a member's already.
        """
        path = checked_path(path)
        member = self.registry.members().get(path)
        if member is not None and member.state is State.ACTIVE and self._good(member):
            cure = f"to give it a new key, run `worldlm gateway readmit {path}`"
            raise GatewayError(f"{path}: is a member already; {cure}")
        if member is not None and member.state is not State.ACTIVE:
            raise GatewayError(f"{path}: is {member.state}; run `worldlm gateway readmit {path}`")
        return self._invite(path, expires_s=expires_s, approve=approve, by=by)

    def revoke(self, path: str, *, pause: bool = False, by: str = "") -> bool:
        """Let a member in no more, from its next request on.

        Args:
            path: the member's.
            pause: for now only: its key stays good, and `readmit` lets it in again.
            by: the operator.

        Returns:
            Whether it was a member; False where only an invitation is taken back.

        Raises:
            GatewayError: there is no such member.
        """
        with self.registry.changing() as members:
            cancelled = 0 if pause else self.invitations.cancel(path)
            member = members.get(path)
            if member is None and not cancelled:
                raise self._no_member(path)
            if member is not None and not (pause and member.state is State.REVOKED):
                members[path] = replace(member, state=State.PAUSED if pause else State.REVOKED)
        self._record("paused" if pause else "revoked", path, by)
        return member is not None

    def readmit(self, path: str, *, expires_s: float, approve: bool = False, by: str = "") -> Invitation | None:
        """Let a member in again.

        Returns:
            An invitation, since all its keys are good no more; None for one that was paused, which keeps its key.

        Raises:
            GatewayError: there is no such member.
        """
        with self.registry.changing() as members:
            member = members.get(path)
            if member is None:
                raise self._no_member(path)
            if member.state is State.PAUSED:
                members[path] = replace(member, state=State.ACTIVE)
            else:
                members[path] = replace(member, state=State.ACTIVE, keys=(), admissions=member.admissions + 1)
        self._record("readmitted", path, by)
        if member.state is State.PAUSED:
            return None
        return self._invite(path, expires_s=expires_s, approve=approve, by=by)

    def approve(self, path: str, *, by: str = "") -> None:
        """Let the key that has come for an invitation have its certificate.

        Raises:
            GatewayError: nothing waits for this path.
        """
        waiting = [kept for kept, _ in self.invitations.waiting() if kept.path == path]
        if not waiting:
            raise GatewayError(f"{path}: no key waits to be approved; see `worldlm gateway members`")
        self.invitations.approve(waiting[-1].id)
        self._record("approved", path, by)

    def rotate(self, passphrase: str, *, by: str = "") -> int:
        """`Identity.rotate`, recorded."""
        number = self.identity.rotate(passphrase)
        self._record("rotated", self.identity.name, f"issuing key {number}, by {by}")
        return number

    def _invite(self, path: str, *, expires_s: float, approve: bool, by: str) -> Invitation:
        if not 0 < expires_s <= LONGEST_EXPIRY_S:
            raise GatewayError("--expires: an invitation is good for 90 days at most; give hours, such as 48h")
        identity = self.identity
        with self.registry.changing():  # while none enrols by an invitation that this takes back
            invitation = self.invitations.create(
                path, url=identity.url, world=identity.world, expires_s=expires_s, approve=approve, by=by
            )
        self._record("invited", path, f"invitation {invitation.id}, by {by}")
        return invitation

    def _good(self, member: Member) -> bool:
        return any(key.expires_s > self.clock() for key in member.keys)

    def _no_member(self, path: str) -> GatewayError:
        members = self.registry.members()
        cure = one_of(path, members) if members else "there is none yet: run `worldlm gateway invite`"
        return GatewayError(f"{path}: is no member; {cure}")

    def _record(self, event: str, path: str, detail: str) -> None:
        line = {"at_s": round(self.clock(), 3), "event": event, "path": path, "detail": detail}
        try:
            self._journal.add(json.dumps(line).encode() + b"\n")
        except OSError as error:
            raise GatewayError(f"{self.identity.folder / JOURNAL}: {error.strerror or error}; make room") from error


def _admitted(members: dict[str, Member], path: str, mark: str) -> Member:
    """The member that may have this key.

    Raises:
        Refused: revoked or known_key.
    """
    member = members.get(path, Member(path=path))
    if member.state is State.REVOKED:
        raise Refused("revoked", f"{path} is no member any more; ask the world's operator to readmit it")
    owner = next((p for p, each in members.items() if any(k.fingerprint == mark for k in each.keys)), path)
    if owner != path:
        raise Refused("known_key", f"the key {spoken(mark)} is that of {owner}; make a new one for {path}")
    return member


@lru_cache(maxsize=256)
def _peer(certificate: bytes) -> _Peer:
    """What a certificate says; of a connection's certificate this is asked at every request."""
    found: x509.Certificate = certificates.read_der(certificate)
    world, path = certificates.member_of(found)
    try:
        begin_s, end_s = certificates.begin_of(found), certificates.end_of(found)
    except certificates.UNREADABLE as error:
        raise Refused("bad_certificate", "the certificate's times cannot be read") from error
    return _Peer(world=world, path=path, fingerprint=fingerprint(certificate_key(found)), begin_s=begin_s, end_s=end_s)
