"""What a world imposes on its members: its charter, signed by its issuing key. Its epoch only rises.

    charters/0003.json    the charter of epoch 3, with its signature; the same file at the world and at its members

A charter has two parts. What is `alike` a member must have in its configuration, too. What is `imposed` the world does,
whatever a member's configuration says. Both are flat: dotted keys, and values as text. The signature covers the
charter's bytes as they were signed, and depends on no clock.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from worldlm_ray.errors import GatewayError, Refused
from worldlm_ray.gateway import certificates, keys
from worldlm_ray.gateway.identity import Identity, generation
from worldlm_ray.gateway.wire import CHARTER_BYTES
from worldlm_ray.storage.filesystem import create_text, flush_folder, make_folder, replace_text

FOLDER = "charters"
LARGEST_EPOCH = 10**9
MOST_TERMS = 128
LONGEST_TERM = 255
"""Characters of a key or a value."""
_FILE = re.compile(r"(\d{4,10})\.json", re.ASCII)
_SIGNED = b"worldlm charter\n"
"""Before the bytes that are signed: no other signature of the issuing key begins so."""
_DAMAGED = "is no charter of this world"


@dataclass(frozen=True, kw_only=True)
class Charter:
    """The rules of a world."""

    world: str
    """The world's id."""
    node: str
    """Path of the node that members have for a parent."""
    epoch: int
    """Rises with every change, from 1."""
    alike: dict[str, str] = field(default_factory=dict)
    """What both sides must have alike; what a person finds first stands first."""
    imposed: dict[str, str] = field(default_factory=dict)
    """What the world imposes."""

    @property
    def terms(self) -> dict[str, str]:
        """Both parts."""
        return self.alike | self.imposed

    @property
    def codecs(self) -> list[str]:
        """Codecs of which a member may use one."""
        return self.imposed.get("exchange.codecs", "").split()

    @property
    def fields(self) -> list[str]:
        """Fields of an update's header that the world asks for, beside those that no update goes without."""
        return self.imposed.get("fields", "").split()

    def unlike(self, mine: Mapping[str, str], *, who: str) -> Iterator[str]:
        """What of a member's settings differs from what must be alike, one line for each key, with the cure.

        Args:
            mine: the member's settings, by the charter's keys.
            who: the member's path.
        """
        for key, value in self.alike.items():
            if (got := mine.get(key, "not given")) != value:
                text = f"{key} is {got!r} at {who}, and {value!r} in charter {self.epoch} of {self.node}"
                yield f"{text}: have it alike on both sides"


@dataclass(frozen=True, kw_only=True)
class Signed:
    """A charter with its signature."""

    charter: Charter
    body: bytes
    """What is signed: the charter as JSON."""
    signature: bytes
    chain: bytes
    """The issuing certificate, PEM."""

    @property
    def raw(self) -> bytes:
        """As it is stored and sent."""
        parts = {
            "charter": self.body.decode(),
            "signature": base64.b64encode(self.signature).decode(),
            "issuing": self.chain.decode(),
        }
        return json.dumps(parts).encode()

    def check(self, root: x509.Certificate, *, least_generation: int = 1) -> None:
        """Check who has signed it.

        Args:
            root: the world's.
            least_generation: of the newest issuing key that is known.

        Raises:
            Refused: bad_certificate, wrong_world, old_issuing_key or bad_signature.
        """
        try:
            [issuing] = certificates.read_pem(self.chain, "the charter")
            issuing.verify_directly_issued_by(root)
            met = generation(issuing)
        except (GatewayError, InvalidSignature, *certificates.UNREADABLE) as error:
            raise Refused("bad_certificate", "the charter does not come with an issuing key of this world") from error
        if self.charter.world != certificates.world_id(root):
            raise Refused("wrong_world", "the charter is one of another world")
        if met < least_generation:
            got = f"issuing key {met} has signed the charter, and {least_generation} is known"
            raise Refused("old_issuing_key", f"{got}: it may be stolen; ask the world's operator")
        keys.verify(issuing, self.signature, _SIGNED + self.body)


def read(raw: bytes) -> Signed:
    """A signed charter as it came; its signature is not looked at yet.

    Raises:
        Refused: bad_charter.
    """
    try:
        if len(raw) > CHARTER_BYTES:
            raise ValueError
        parts = json.loads(raw)
        body, signature, chain = (parts[name].encode() for name in ("charter", "signature", "issuing"))
        return Signed(charter=_charter(json.loads(body)), body=body, signature=base64.b64decode(signature), chain=chain)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Refused("bad_charter", f"what came {_DAMAGED}: run one version of worldlm_ray on both sides") from error


def checked(raw: bytes, root: x509.Certificate, *, where: str, least_generation: int = 1) -> Signed:
    """A signed charter as it came, once its signature is found to be the world's.

    Args:
        raw: as it came.
        root: the world's.
        where: it came from, for the error.
        least_generation: of the newest issuing key that is known.

    Raises:
        Refused: no_charter, bad_charter, or as `Signed.check`.
    """
    if not raw:
        raise Refused("no_charter", f"{where} shows no charter; its operator runs a newer worldlm_ray")
    signed = read(raw)
    signed.check(root, least_generation=least_generation)
    return signed


def _charter(found: Any) -> Charter:
    made = Charter(**found)
    texts, terms = (made.world, made.node), (made.alike, made.imposed)
    if isinstance(made.epoch, bool) or not isinstance(made.epoch, int) or not 0 < made.epoch <= LARGEST_EPOCH:
        raise ValueError
    if not all(isinstance(part, dict) and len(part) <= MOST_TERMS for part in terms):
        raise ValueError
    words = [*texts, *(word for part in terms for pair in part.items() for word in pair)]
    if not all(isinstance(word, str) and len(word) <= LONGEST_TERM and word.isprintable() for word in words):
        raise ValueError
    return made


def difference(old: Charter | None, new: Charter) -> list[tuple[str, str | None, str | None]]:
    """What a charter changes: key, old and new value of each term that differs; None where a side has none.

    Args:
        old: the charter before; None for none.
        new: the charter.
    """
    before, after = {} if old is None else old.terms, new.terms
    changed = (key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key))
    return [(key, before.get(key), after.get(key)) for key in changed]


# ---- files -------------------------------------------------------------------------------------------------------


class Charters:
    """Charters by epoch, in a folder of the gateway or of a profile.

    Args:
        folder: of the gateway or the profile.
        root: the world's certificate: a file that it does not answer for is damaged.
    """

    def __init__(self, folder: Path, root: x509.Certificate) -> None:
        self.folder, self._root = folder / FOLDER, root

    def epochs(self) -> list[int]:
        """Epochs of the charters that are there, lowest first."""
        if not self.folder.is_dir():
            return []
        return sorted(int(match[1]) for path in self.folder.iterdir() if (match := _FILE.fullmatch(path.name)))

    def newest(self) -> Signed | None:
        """The charter of the highest epoch; None where there is none.

        Raises:
            GatewayError: its file is damaged.
        """
        epochs = self.epochs()
        return self.get(epochs[-1]) if epochs else None

    def get(self, epoch: int) -> Signed:
        """The charter of an epoch.

        Raises:
            GatewayError: there is none, or its file is damaged.
        """
        path = self._path(epoch)
        if epoch not in (epochs := self.epochs()):
            there = f"there are {_listed(epochs)}" if epochs else "there is none yet"
            raise GatewayError(f"{path}: there is no charter {epoch}; {there}")
        try:
            found = read(keys.read_file(path))
            found.check(self._root)
            if found.charter.epoch != epoch:
                raise Refused("bad_charter", f"it is the charter of epoch {found.charter.epoch}")
        except Refused as error:
            raise GatewayError(f"{path}: {_DAMAGED} ({error.detail}); restore it from a copy") from error
        return found

    def keep(self, signed: Signed, *, anew: bool = False) -> None:
        """Write a charter.

        Args:
            signed: the charter.
            anew: whether one of its epoch may be there, and is replaced.

        Raises:
            GatewayError: there is one of this epoch, or the storage refused.
        """
        path, text = self._path(signed.charter.epoch), signed.raw.decode()
        try:
            make_folder(self.folder)
            if anew:
                replace_text(path, text, durable=True)
            else:
                create_text(path, text)
            flush_folder(self.folder)
        except FileExistsError as error:
            raise GatewayError(f"{path}: another process has just written it; try again") from error
        except OSError as error:
            raise GatewayError(f"{path}: {error.strerror or error}; make room, or make it writable") from error

    def _path(self, epoch: int) -> Path:
        return self.folder / f"{epoch:04d}.json"


def impose(
    identity: Identity, node: str, alike: Mapping[str, str], imposed: Mapping[str, str], *, epoch: int | None = None
) -> Signed:
    """The charter of a world with these terms: the one that is there, or a new one of a higher epoch.

    A charter that an older issuing key has signed is signed again.

    Args:
        identity: the world's.
        node: path of the node that members have for a parent.
        alike: what both sides must have alike.
        imposed: what the world imposes.
        epoch: of a new charter; the next one unless given. After a loss of the folder it is raised above the
            highest that members know.

    Raises:
        GatewayError: the epoch would not rise, a term is too long, or the folder is damaged or cannot be written.
    """
    charters = Charters(identity.folder, identity.root)
    known = charters.newest()
    last = 0 if known is None else known.charter.epoch
    if epoch is not None and not last < epoch <= LARGEST_EPOCH:
        cure = f"give one from {last + 1} to {LARGEST_EPOCH}"
        raise GatewayError(f"--epoch: {epoch} does not rise above {last}, which members may know; {cure}")
    made = Charter(world=identity.world, node=node, epoch=epoch or last + 1, alike=dict(alike), imposed=dict(imposed))
    if known is None or epoch is not None or (known.charter.node, known.charter.terms) != (node, made.terms):
        signed = _sign(identity, made)
        charters.keep(signed)
        return signed
    if known.chain != certificates.pem(identity.issuing().certificate):
        known = _sign(identity, known.charter)
        charters.keep(known, anew=True)
    return known


def _sign(identity: Identity, charter: Charter) -> Signed:
    try:
        _charter(asdict(charter))
    except ValueError as error:
        long = [key for key, value in charter.terms.items() if len(value) > LONGEST_TERM or not value.isprintable()]
        what = ", ".join(long) or "their number"
        raise GatewayError(f"{what}: too long for a charter; give a shorter value") from error
    issuing, body = identity.issuing(), json.dumps(asdict(charter)).encode()
    signature = keys.sign(issuing.key, _SIGNED + body)
    return Signed(charter=charter, body=body, signature=signature, chain=certificates.pem(issuing.certificate))


def _listed(epochs: Iterable[int]) -> str:
    return ", ".join(map(str, epochs))
