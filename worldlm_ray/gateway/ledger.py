"""Files of receipts as they are read: each line is checked by the signature in it, and no clock is asked.

A file may come from another organisation: what it says counts only as far as signatures of the world and of its member
go. A line that a kill has cut short is passed over; any other that is not as it was written is a finding.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography import x509

from worldlm_ray.errors import GatewayError, MessageError, Refused
from worldlm_ray.exchange.limits import LONGEST_PATH, checked, unpacked
from worldlm_ray.exchange.replies import Verdict
from worldlm_ray.gateway import wire
from worldlm_ray.gateway.certificates import read_pem, world_id
from worldlm_ray.gateway.receipts import RUN
from worldlm_ray.gateway.seals import check_push, check_verdict

LONGEST_LINE = 4 * wire.MESSAGE_BYTES
"""Characters; ours have less than 4,000."""
_KINDS = {"certificates": {"id"}, "push": {"signature", "by"}, "verdict": {"of", "signature", "by"}}
"""Fields of each kind of line, beside the one that names it."""
_MANIFEST: dict[str, type] = {
    "what": str,
    "protocol": int,
    "world": str,
    "run": str,
    "path": str,
    "to": int,
    "incarnation": int,
    "seq": int,
    "codec": str,
    "digest": bytes,
    "header": bytes,
}
"""See `wire.Push.manifest`."""


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """A push that its member has signed."""

    manifest: bytes
    world: str
    run: str
    path: str
    """The member's."""
    to: int
    """Incarnation of the parent."""
    incarnation: int
    """Of the member."""
    seq: int
    digest: bytes
    """Of the update."""

    @property
    def name(self) -> str:
        """For people."""
        return f"update {self.seq} of {self.path} (incarnation {self.incarnation}, to {self.to})"


@dataclass(frozen=True)
class Finding:
    """Something that receipts say, and that cannot be."""

    kind: str
    """damaged, forged, altered, missing, doubled, unknown or lost."""
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


@dataclass
class Ledger:
    """What the receipts of one side say about one member, in order."""

    pushes: dict[bytes, Pushed] = field(default_factory=dict)
    """By manifest."""
    verdicts: dict[tuple[bytes, bytes], Verdict] = field(default_factory=dict)
    """By manifest and packed verdict."""

    def of(self, runs: Collection[str]) -> Ledger:
        """What of it belongs to some runs of the world."""
        pushes = {manifest: pushed for manifest, pushed in self.pushes.items() if pushed.run in runs}
        return Ledger(pushes, {key: verdict for key, verdict in self.verdicts.items() if key[0] in pushes})

    @property
    def runs(self) -> set[str]:
        """Ids of the runs that it speaks of."""
        return {pushed.run for pushed in self.pushes.values()}


@dataclass
class Ledgers:
    """What files of receipts say, by the member's path."""

    members: dict[str, Ledger] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    torn: int = 0
    """Lines that a kill has cut short."""


def roots_of(folder: Path) -> dict[str, x509.Certificate]:
    """The roots that a side believes, by world id, from its folder of receipts.

    Raises:
        GatewayError: a file is not the root that its name says.
    """
    found: dict[str, x509.Certificate] = {}
    for path in sorted(folder.glob("*.pem")):
        [found[path.stem], *_] = read_pem(path.read_bytes(), path)
        if world_id(found[path.stem]) != path.stem:
            raise GatewayError(f"{path}: is not the root that its name says; restore it from a copy")
    return found


def run_of(folder: Path) -> str:
    """The id of a world's run, from its folder of receipts; empty if there is none."""
    path = folder / RUN
    return path.read_text(encoding="utf-8", errors="replace")[:32] if path.is_file() else ""


def read(files: Iterable[Path], roots: Mapping[str, x509.Certificate]) -> Ledgers:
    """Read files of receipts.

    Args:
        files: of one side.
        roots: that are believed, by world id.

    Raises:
        GatewayError: a file cannot be read.
    """
    found = Ledgers()
    for path in files:
        reader = _Reader(roots, found)
        try:
            with path.open("rb") as file:
                for number, line in enumerate(_lines(file), 1):
                    reader.take(line, f"{path} line {number}")
        except OSError as error:
            raise GatewayError(f"{path}: {error.strerror or error}; give a file of receipts") from error
    return found


def _lines(file: Any) -> Iterator[bytes]:
    """Lines of a file; of one that is too long, its beginning."""
    while line := file.readline(LONGEST_LINE):
        rest = line
        while rest and not rest.endswith(b"\n"):
            rest = file.readline(LONGEST_LINE)
        yield line


class _Reader:
    """Reads one file.

    Args:
        roots: that are believed, by world id.
        found: what it says goes there.
    """

    def __init__(self, roots: Mapping[str, x509.Certificate], found: Ledgers) -> None:
        self._roots, self._found = roots, found
        self._chains: dict[str, bytes] = {}
        self._pushes: dict[str, Pushed] = {}
        """By SHA-256 of the manifest."""
        self._refused: set[str] = set()
        """Pushes that are a finding: their verdicts are not another one."""

    def take(self, line: bytes, where: str) -> None:
        """A line."""
        text = line.strip()
        if not text:
            return
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            if text.endswith(b"}") or not text.startswith(b"{"):
                self._find("damaged", f"{where} is no receipt")
            else:
                self._found.torn += 1
            return
        try:
            kind = _kind(values)
            if kind == "certificates":
                self._certificates(values)
            elif kind == "push":
                self._push(values, where)
            else:
                self._verdict(values, where)
        except (MessageError, binascii.Error, ValueError) as error:
            self._find("damaged", f"{where}: {error}")
        except Refused as error:
            self._find("forged", f"{where}: {error}")

    def _certificates(self, values: Mapping[str, str]) -> None:
        chain = values["certificates"].encode()
        if hashlib.sha256(chain).hexdigest() != values["id"]:
            raise ValueError("the certificates are not those that their id names")
        self._chains[values["id"]] = chain

    def _push(self, values: Mapping[str, str], where: str) -> None:
        manifest = _raw(values["push"])
        mark = hashlib.sha256(manifest).hexdigest()
        self._refused.add(mark)
        pushed = read_manifest(manifest)
        root = self._root(pushed, where)
        if root is None:
            return
        check_push(root, pushed.path, self._chain(values), _raw(values["signature"]), pushed.manifest)
        self._refused.discard(mark)
        self._pushes[mark] = pushed
        self._found.members.setdefault(pushed.path, Ledger()).pushes[pushed.manifest] = pushed

    def _verdict(self, values: Mapping[str, str], where: str) -> None:
        pushed, packed = self._pushes.get(values["of"]), _raw(values["verdict"])
        if values["of"] in self._refused:
            return
        if pushed is None:
            self._find("missing", f"{where}: a verdict without its push")
            return
        root = self._root(pushed, where)
        assert root is not None, "the push has passed"
        check_verdict(root, self._chain(values), _raw(values["signature"]), wire.receipt(pushed.manifest, packed))
        verdict = wire.parsed_verdict(packed)
        if verdict.accepted and verdict.seq != pushed.seq:
            raise ValueError(f"the verdict is on update {verdict.seq}, and the push is update {pushed.seq}")
        self._found.members[pushed.path].verdicts[(pushed.manifest, packed)] = verdict

    def _root(self, pushed: Pushed, where: str) -> x509.Certificate | None:
        root = self._roots.get(pushed.world)
        if root is None:
            self._find("unknown", f"{where}: {pushed.name} is one of world {pushed.world[:16]}, and not of this run's")
        return root

    def _chain(self, values: Mapping[str, str]) -> bytes:
        if values["by"] not in self._chains:
            raise ValueError("no line before it has its signer's certificates")
        return self._chains[values["by"]]

    def _find(self, kind: str, text: str) -> None:
        self._found.findings.append(Finding(kind, text))


def read_manifest(raw: bytes) -> Pushed:
    """What a member has signed.

    Raises:
        MessageError: malformed.
    """
    values = unpacked(raw, "the manifest")
    if not isinstance(values, list) or len(values) != len(_MANIFEST):
        raise MessageError("malformed", f"the manifest has not the {len(_MANIFEST)} values of a push")
    found = {
        name: checked(name, value, kind, longest=LONGEST_PATH)
        for (name, kind), value in zip(_MANIFEST.items(), values, strict=True)
    }
    if found.pop("what") != "worldlm push" or found.pop("protocol") != wire.PROTOCOL:
        raise MessageError("malformed", f"the manifest is not one of protocol {wire.PROTOCOL}")
    return Pushed(manifest=raw, **{name: found[name] for name in found if name not in ("codec", "header")})


def _kind(values: Any) -> str:
    """Which line it is.

    Raises:
        ValueError: none.
    """
    if isinstance(values, dict) and all(isinstance(value, str) for value in values.values()):
        for kind, others in _KINDS.items():
            if set(values) == {kind} | others:
                return kind
    raise ValueError("is no receipt")


def _raw(text: str) -> bytes:
    return base64.b64decode(text, validate=True)
