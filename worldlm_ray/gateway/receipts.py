"""Receipts: what either side of a border keeps of pushes and verdicts, so that it can show them later.

    receipts/run                           id of the world's run, made once; at the world only
    receipts/WORLD ID.pem                  the world's root: each signature leads to it
    receipts/received/world/europe.jsonl   at the world: a line for each signed push and for each signed verdict
    receipts/sent/world/europe.jsonl       at the member: the same

    {"certificates": PEM, "id": SHA-256}                             before the first line that names it
    {"push": manifest, "signature": DER, "by": id}
    {"verdict": verdict, "of": SHA-256 of the manifest, "signature": DER, "by": id}

Bytes stand in Base64. A member writes a push before it sends it, and a verdict before it hands it on. A gateway writes
a push before its node sees it, and a verdict before it answers. So after a kill at any point an accepted update has its
push on both sides. A line is on disk when the next step begins. While the storage refuses, the update waits.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import secrets
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from cryptography import x509

from worldlm_ray.errors import MessageError
from worldlm_ray.gateway import wire
from worldlm_ray.gateway.certificates import pem, world_id
from worldlm_ray.gateway.seals import WorldSeal
from worldlm_ray.storage.filesystem import Growing, create_text, make_folder, replace_text

FOLDER, RUN = "receipts", "run"
SENT, RECEIVED = "sent", "received"
AGAIN_S = 1.0
"""Between two attempts to write, while the storage refuses."""


class Receipts:
    """The receipts of one side.

    Args:
        folder: `receipts` of a run folder.
        side: SENT or RECEIVED.
        root: the world's.
        warn: hears, once for each text, of a member's path and why its updates wait.
    """

    def __init__(
        self,
        folder: Path,
        side: str,
        *,
        root: x509.Certificate,
        warn: Callable[[str, str], None] = lambda path, text: None,
    ) -> None:
        self._folder, self._side, self._root, self._warn = folder, side, root, warn
        self._files: dict[str, Growing] = {}
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._named: set[tuple[str, str]] = set()
        """Paths and certificates that this process has written."""

    async def pushed(self, path: str, manifest: bytes, signature: bytes, chain: bytes) -> None:
        """Keep a signed push.

        Args:
            path: the member's.
            manifest: see `wire.Push.manifest`.
            signature: of it, by the member.
            chain: the member's certificates, PEM.
        """
        await self._add(path, {"push": coded(manifest), "signature": coded(signature)}, chain)

    async def judged(self, path: str, manifest: bytes, judged: wire.Judged) -> None:
        """Keep a signed verdict.

        Args:
            path: the member's.
            manifest: of the push.
            judged: the verdict as it travels.
        """
        of = hashlib.sha256(manifest).hexdigest()
        line = {"verdict": coded(judged.verdict), "of": of, "signature": coded(judged.signature)}
        await self._add(path, line, judged.chain)

    async def _add(self, path: str, line: dict[str, str], chain: bytes) -> None:
        """Write a line, however long the storage takes."""
        mark, said = hashlib.sha256(chain).hexdigest(), ""
        async with self._locks[path]:
            lines: list[dict[str, str]] = [line | {"by": mark}]
            if (path, mark) not in self._named:
                lines.insert(0, {"certificates": chain.decode(errors="replace"), "id": mark})
            piece = b"".join(json.dumps(each).encode() + b"\n" for each in lines)
            while True:
                try:
                    await asyncio.to_thread(self._write, path, piece)
                    break
                except OSError as error:
                    text = f"cannot write its receipts to {self._folder}: {error}; its updates wait: make room"
                    if text != said:
                        said = text
                        self._warn(path, text)
                    await asyncio.sleep(AGAIN_S)
            self._named.add((path, mark))

    def _write(self, path: str, piece: bytes) -> None:
        if path not in self._files:
            make_folder(self._folder)
            replace_text(self._folder / f"{world_id(self._root)}.pem", pem(self._root).decode(), durable=True)
            self._files[path] = Growing(self._folder / self._side / f"{path}.jsonl", closing=b"\n", durable=True)
        self._files[path].add(piece)


class Evidence:
    """What a gateway checks, signs and keeps of pushes.

    Args:
        world: the world's id.
        run: id of its run.
        seal: signs and checks; nothing is signed, and nothing is kept, without.
        receipts: keep what is signed.
    """

    def __init__(
        self, *, world: str = "", run: str = "", seal: WorldSeal | None = None, receipts: Receipts | None = None
    ) -> None:
        self._world, self._run, self._seal, self._receipts = world, run, seal, receipts

    def check(self, asked: wire.Push, path: str) -> bytes:
        """The manifest of a push, which the member has signed.

        Raises:
            MessageError: unreachable: the push is one of another run, so that the member must join again.
            Refused: bad_signature and the like.
        """
        if asked.run != self._run:
            raise MessageError("unreachable", "the world is in another run by now: join again")
        manifest = asked.manifest(self._world, path)
        if self._seal is not None:
            self._seal.verify(path, asked.chain, asked.signature, manifest)
        return manifest

    async def pushed(self, asked: wire.Push, path: str, manifest: bytes) -> None:
        """Keep a push that `check` has let pass."""
        if self._seal is not None and self._receipts is not None:
            await self._receipts.pushed(path, manifest, asked.signature, asked.chain)

    async def judged(self, verdict: bytes, path: str, manifest: bytes) -> wire.Judged:
        """Sign and keep a packed verdict."""
        if self._seal is None:
            return wire.Judged(verdict=verdict)
        signature = self._seal.sign(wire.receipt(manifest, verdict))
        found = wire.Judged(verdict=verdict, signature=signature, chain=self._seal.chain)
        if self._receipts is not None:
            await self._receipts.judged(path, manifest, found)
        return found


def run_id(folder: Path) -> str:
    """The id of the run whose receipts lie in a folder; made when it is asked for first.

    Raises:
        OSError: the storage refused.
    """
    make_folder(folder)
    with suppress(FileExistsError):
        create_text(folder / RUN, secrets.token_hex(16))
    return (folder / RUN).read_text(encoding="utf-8")[:32]


def coded(raw: bytes) -> str:
    """Bytes as a line has them."""
    return base64.b64encode(raw).decode()
