"""What crosses a border: small msgpack messages, and buffers in leaves that are resumed.

    hello                    what both sides must have alike
    join, done, left, heartbeat, push, pull
                             the parent's methods (worldlm_ray/protocol/child.py)
    GET up/NAME              digests of the leaves of an update that are staged
    PUT up/NAME/N            leaves from N on; NAME is INCARNATION/SEQ/CODEC
    GET down/DIGEST/leaves   digests of a model's leaves
    GET down/DIGEST          a Range of a model
    enrol, renew, resign     a certificate; an end of all certificates
    charter                  the world's charter, for an invitation; members have it by hello

A buffer is cut into leaves of 4 MiB. Its digest is the SHA-256 of its leaves' SHA-256. An upload has a name that is
known before its digest is, so that a side hashes a leaf while it sends another. The size of a buffer follows from the
layout and the codec: any other size is refused before its first byte is read.

Whatever arrives is checked: a message has exactly the fields of its dataclass, each of its type and within its limits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, TypeVar, get_type_hints

import msgpack

from worldlm_ray.errors import MessageError
from worldlm_ray.exchange.compression import nbytes
from worldlm_ray.exchange.limits import LONGEST_PATH, checked, header_bytes, shown, unpacked
from worldlm_ray.exchange.messages import SCHEMA
from worldlm_ray.exchange.replies import Verdict
from worldlm_ray.tensors.layout import Layout

PROTOCOL = 1
"""Version of this protocol. A side refuses another one at hello."""
MESSAGE_BYTES = 65_536
"""Of a message's body, but for residuals in a header."""
ENROL_BYTES = 16_384
"""Of a request for a certificate, which comes from a stranger."""
LEAF_BYTES = 4 * 2**20
DIGEST_BYTES = 32
MOST_LEAVES = 8
"""That one request carries, at most."""
LEAVES_HEADER = "Leaf-Digests"
"""HTTP header with the SHA-256 of the leaves of a PUT, in hexadecimal, one behind the other."""
LONGEST_SIGNATURE = 512
CHARTER_BYTES = 32_768
"""Of a signed charter."""
MOST_NAMES = 64
"""Elements of a list of names."""

M = TypeVar("M")


# ---- messages ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Hello:
    """What a side has; both sides must have it alike."""

    layout: str
    """The layout's hash."""
    protocol: int = PROTOCOL
    schema: int = SCHEMA
    """Of messages between a child and its parent."""
    software: str = ""
    """For an operator; not compared."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What the parent's side answers to a hello."""

    path: str
    """The member's, as its certificate says."""
    now_s: float
    """The time of day, seconds since 1970: a member sees by it whether its clock is right."""
    leaf_bytes: int
    connections: int
    """That a member may use at once for leaves."""
    codecs: tuple[str, ...]
    """That a member may send."""
    charter: bytes = b""
    """The world's charter, signed: see worldlm_ray/gateway/charter.py."""
    run: str = ""
    """Id of the world's run: what a member signs counts in this run alone."""
    software: str = ""


@dataclass(frozen=True, kw_only=True)
class Join:
    """The parent's method of that name."""

    incarnation: int
    seq: int


@dataclass(frozen=True, kw_only=True)
class Joined:
    """A parent's welcome."""

    incarnation: int
    last_seq: int
    durable_seq: int


@dataclass(frozen=True, kw_only=True)
class Call:
    """`done`, `left` and `heartbeat`."""

    incarnation: int
    to: int


@dataclass(frozen=True, kw_only=True)
class Left:
    """The answer to `left`."""

    may_end: bool


@dataclass(frozen=True, kw_only=True)
class Push:
    """An update whose leaves are staged."""

    incarnation: int
    to: int
    seq: int
    codec: str
    digest: bytes
    header: bytes
    """As the child has packed it."""
    run: str = ""
    """As the terms name it."""
    signature: bytes = b""
    """Of `manifest`."""
    chain: bytes = b""
    """The signer's certificates, PEM."""

    def manifest(self, world: str, path: str) -> bytes:
        """What the member signs: who sends which bytes to which life of its parent.

        Args:
            world: the world's id.
            path: the member's.
        """
        header = hashlib.sha256(self.header).digest()
        parts = ["worldlm push", PROTOCOL, world, self.run, path, self.to, self.incarnation, self.seq, self.codec]
        return _packb([*parts, self.digest, header])


@dataclass(frozen=True, kw_only=True)
class Judged:
    """The answer to a push: a verdict that is signed, if the parent's side signs."""

    verdict: bytes
    """A packed `Verdict`."""
    signature: bytes = b""
    """Of `receipt`."""
    chain: bytes = b""
    """The signer's certificates, PEM."""


def receipt(manifest: bytes, verdict: bytes) -> bytes:
    """What the parent's side signs: which verdict which push has got.

    Args:
        manifest: of the push.
        verdict: a packed `Verdict`.
    """
    return _packb(["worldlm verdict", PROTOCOL, hashlib.sha256(manifest).digest(), verdict])


@dataclass(frozen=True, kw_only=True)
class Pull:
    """The parent's method of that name."""

    incarnation: int
    to: int
    started_tokens: int


@dataclass(frozen=True, kw_only=True)
class Served:
    """The answer to a pull: the model's header, and which buffer it goes with."""

    header: bytes
    digest: bytes
    """Who has this buffer already need not get it."""
    size: int
    """Bytes."""


@dataclass(frozen=True, kw_only=True)
class Enrol:
    """What a stranger with an invitation sends."""

    request: bytes
    """A certificate signing request, DER."""
    invitation: str
    """Its id."""
    proof: bytes
    """That the stranger knows the invitation's secret, and has made the request."""


@dataclass(frozen=True, kw_only=True)
class Invited:
    """What a stranger with an invitation sends for the charter, before it decides whether to enrol."""

    invitation: str
    """Its id."""
    proof: bytes
    """That the stranger knows the invitation's secret."""


@dataclass(frozen=True, kw_only=True)
class Renew:
    """What a member sends for its next certificate."""

    request: bytes
    """A certificate signing request of a new key, DER."""


@dataclass(frozen=True, kw_only=True)
class Enrolled:
    """The answer to both."""

    path: str
    """The member's."""
    chain: bytes
    """Its certificate and the issuing certificate, PEM."""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """The body of every answer that refuses."""

    reason: str
    """A name as `Verdict` has, or: not_allowed, unreachable, over_quota, bad_signature, wrong_size, wrong_digest,
    gone, unknown_request, busy."""
    detail: str


_LONGEST: dict[str, int] = {
    "detail": LONGEST_PATH,
    "path": LONGEST_PATH,
    "digest": DIGEST_BYTES,
    "signature": LONGEST_SIGNATURE,
    "request": ENROL_BYTES,
    "chain": MESSAGE_BYTES,
    "verdict": MESSAGE_BYTES,
    "codecs": MOST_NAMES,
    "charter": CHARTER_BYTES,
}
"""Fields whose length has another limit than `limits.LONGEST_NAME`; a header may be as long as its message."""
_DIGESTS = ("digest",)


def packed(message: Any) -> bytes:
    """A message as it travels."""
    return _packb({name: list(value) if isinstance(value, tuple) else value for name, value in vars(message).items()})


def parsed(kind: type[M], body: bytes, *, most_bytes: int = MESSAGE_BYTES) -> M:
    """A message that has arrived.

    Args:
        kind: a dataclass of this module, or `Verdict`.
        body: the bytes.
        most_bytes: a longer body is not parsed.

    Raises:
        MessageError: wrong_size, or malformed: it is no mapping with exactly the fields of `kind`, of their types.
    """
    if len(body) > most_bytes:
        raise MessageError("wrong_size", f"the message has {len(body)} bytes, expected at most {most_bytes}")
    found = unpacked(body, "the message")
    kinds = _kinds(kind)  # type: ignore[arg-type]
    if not isinstance(found, dict) or set(found) != set(kinds):
        got = shown(sorted(map(str, found))) if isinstance(found, dict) else type(found).__name__
        raise MessageError("malformed", f"the message has the fields {got}, expected {shown(sorted(kinds))}")
    return kind(**{name: _field(name, found[name], kinds[name], most_bytes) for name in kinds})


def parsed_verdict(body: bytes) -> Verdict:
    """A verdict that has arrived.

    Raises:
        MessageError: as `parsed`.
    """
    return parsed(Verdict, body)


def _field(name: str, value: Any, kind: Any, most_bytes: int) -> Any:
    longest = most_bytes if name == "header" else _LONGEST.get(name)
    limits: dict[str, Any] = {} if longest is None else {"longest": longest}
    if kind == tuple[str, ...]:
        return tuple(checked(name, each, str) for each in checked(name, value, list, **limits))
    value = checked(name, value, kind, **limits)
    if name in _DIGESTS and len(value) != DIGEST_BYTES:
        raise MessageError("malformed", f"{name} has {len(value)} bytes, expected {DIGEST_BYTES}")
    return value


@cache
def _kinds(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def _packb(value: Any) -> bytes:
    found: bytes = msgpack.packb(value)
    return found


# ---- buffers -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Leaves:
    """How a buffer is cut.

    Args:
        size: of the buffer, bytes; at least 1.
        leaf: bytes of a leaf; the last one may be shorter.
    """

    size: int
    leaf: int = LEAF_BYTES

    @property
    def count(self) -> int:
        """Number of leaves."""
        return -(-self.size // self.leaf)

    def start(self, index: int) -> int:
        """Where a leaf begins; the buffer's end, of the index behind the last one."""
        return min(index * self.leaf, self.size)

    def nbytes(self, first: int, count: int) -> int:
        """Bytes of so many leaves from `first` on."""
        return self.start(first + count) - self.start(first)


def digest_of(leaves: Sequence[bytes]) -> bytes:
    """The digest of a buffer: SHA-256 over the SHA-256 of its leaves."""
    return hashlib.sha256(b"".join(leaves)).digest()


def leaf_digest(leaf: Any) -> bytes:
    """SHA-256 of one leaf; lets other threads run meanwhile."""
    return hashlib.sha256(leaf).digest()


def split_digests(raw: bytes, count: int) -> list[bytes]:
    """Digests that lie one behind the other.

    Raises:
        MessageError: wrong_size: these are not `count`.
    """
    if len(raw) != count * DIGEST_BYTES:
        raise MessageError("wrong_size", f"{len(raw)} bytes of digests, expected {count * DIGEST_BYTES}")
    return [raw[at : at + DIGEST_BYTES] for at in range(0, len(raw), DIGEST_BYTES)]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large what crosses a border is."""

    layout: Layout
    codecs: tuple[str, ...] = ("fp32",)
    """That a member may send."""
    residuals: int = 0
    """That an update or a model may bring, at most."""
    leaf: int = LEAF_BYTES

    def update(self, codec: str) -> Leaves:
        """An update's buffer.

        Raises:
            MessageError: malformed: there is no such codec, or none that may be sent.
        """
        if codec not in self.codecs:
            raise MessageError("malformed", f"codec is {shown(codec)}, expected one of {', '.join(self.codecs)}")
        return Leaves(nbytes(codec, self.layout.size), self.leaf)

    @property
    def model(self) -> Leaves:
        """A model's buffer."""
        return Leaves(self.layout.nbytes, self.leaf)

    @property
    def message_bytes(self) -> int:
        """Of a message with a header in it, at most."""
        return MESSAGE_BYTES + header_bytes(self.layout, self.residuals)
