"""Updates on their way in: a file for each, of which every leaf is checked when it is there.

A file is as large as its update from the start, with holes. What a process has staged outlives it: the next one hashes
the file again and keeps the leaves that are what the member says. So nothing needs to be written down beside it.

A member has one staged update. A new one takes the place of the one before, except that a verdict on its way still
reads: its file is gone, but its memory stays until nothing reads it.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worldlm_ray.errors import MessageError
from worldlm_ray.gateway.wire import DIGEST_BYTES, Leaves, digest_of, leaf_digest

ABSENT = bytes(DIGEST_BYTES)
"""In place of the digest of a leaf that is not there."""


@dataclass(frozen=True)
class Name:
    """Which update of a member."""

    incarnation: int
    seq: int
    codec: str

    def __str__(self) -> str:
        return f"{self.incarnation}-{self.seq}-{self.codec}"


class Upload:
    """One update that is being staged.

    Args:
        file: where it lies; made if it is not there.
        name: which one it is.
        leaves: how it is cut.
    """

    def __init__(self, file: Path, name: Name, leaves: Leaves) -> None:
        self.file, self.name, self.leaves = file, name, leaves
        self.digests: list[bytes] = [ABSENT] * leaves.count
        """Of the leaves that are there."""
        self._checked: set[int] = set()
        """Leaves that are what their sender says: they stay as they are. Others, which an earlier process has left, the
        sender may write again."""
        self.judged = False
        """Whether there has been a verdict: the file is kept only for as long as there is room."""
        self._writers: dict[int, int] = {}
        """Number of the newest request that writes a leaf."""
        self._requests = 0
        file.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            self.is_old = os.fstat(self._fd).st_size == leaves.size
            """Whether an earlier process has written to it: `recheck` tells what."""
            if not self.is_old:
                os.ftruncate(self._fd, 0)
                os.ftruncate(self._fd, leaves.size)
            self._view = memoryview(mmap.mmap(self._fd, leaves.size, access=mmap.ACCESS_READ))
        except BaseException:
            os.close(self._fd)
            raise

    @property
    def is_whole(self) -> bool:
        """Whether all leaves are there."""
        return ABSENT not in self.digests

    def view(self, index: int = 0, count: int | None = None) -> memoryview:
        """The bytes of some leaves, or of all, without a copy; read-only."""
        until = self.leaves.count if count is None else index + count
        return self._view[self.leaves.start(index) : self.leaves.start(until)]

    def begin(self, first: int, count: int) -> int:
        """A request begins to write leaves; returns its number. It takes them over from a request before it."""
        self._requests += 1
        for index in range(first, first + count):
            self._writers[index] = self._requests
        return self._requests

    def write(self, request: int, offset: int, chunk: Any) -> None:
        """Write bytes of leaves that are not checked yet; leaves that are, stay as they are.

        Args:
            request: what `begin` gave.
            offset: where in the buffer.
            chunk: the bytes.

        Raises:
            MessageError: busy: another request writes this leaf now; over_quota: the disk is full.
        """
        chunk, leaf = memoryview(chunk), self.leaves.leaf
        while chunk:
            index = offset // leaf
            part = chunk[: (index + 1) * leaf - offset]
            if self._writers.get(index) != request:
                raise MessageError("busy", f"leaf {index} of update {self.name} comes by another connection")
            if index not in self._checked:
                self.digests[index] = ABSENT
                self._write(part, offset)
            chunk, offset = chunk[len(part) :], offset + len(part)

    def check(self, request: int, index: int, found: bytes, *, expected: bytes) -> None:
        """A leaf is there.

        Args:
            request: what `begin` gave.
            index: the leaf's.
            found: its digest.
            expected: what its sender says.

        Raises:
            MessageError: wrong_digest, or busy.
        """
        if self._writers.get(index) != request:
            raise MessageError("busy", f"leaf {index} of update {self.name} comes by another connection")
        if found != expected:
            raise MessageError("wrong_digest", f"leaf {index} of update {self.name} is not what its digest says")
        self.digests[index] = found
        self._checked.add(index)

    def has(self, index: int) -> bool:
        """Whether a leaf is there and checked: it is not taken again."""
        return index in self._checked

    def matches(self, digest: bytes) -> bool:
        """Whether the whole update is what a digest says; if so, no byte of it changes any more."""
        if digest_of(self.digests) != digest:
            return False
        self._checked.update(range(self.leaves.count))
        return True

    def recheck(self) -> list[bytes]:
        """Digests of all leaves of a file that an earlier process has left. Takes long: for a thread.

        A leaf that is not there gets the digest of zeros, which its sender tells from the right one.
        """
        return [leaf_digest(self.view(index, 1)) for index in range(self.leaves.count)]

    def close(self) -> None:
        """Let go of the file; who still reads its bytes may go on."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _write(self, part: memoryview, offset: int) -> None:
        if self._fd < 0:
            raise MessageError("busy", f"another update has taken the place of update {self.name}")
        try:
            while part:
                written = os.pwrite(self._fd, part, offset)
                part, offset = part[written:], offset + written
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise MessageError("over_quota", f"the staging folder is full ({error.strerror})") from error
            raise


class Staging:
    """The folder of all staged updates.

    Args:
        folder: on a local disk, or in memory.
        most_bytes: of all of them together.
    """

    def __init__(self, folder: Path, *, most_bytes: int) -> None:
        self._folder, self._most_bytes = folder, most_bytes
        self._uploads: dict[str, Upload] = {}
        """By the member's path; the one used last is the last."""

    @property
    def nbytes(self) -> int:
        """Of all staged updates, holes included."""
        return sum(upload.leaves.size for upload in self._uploads.values()) + sum(self._leftovers().values())

    def find(self, path: str, name: Name) -> Upload | None:
        """A member's staged update, if this process has it."""
        upload = self._uploads.get(path)
        return upload if upload is not None and upload.name == name else None

    def open(self, path: str, name: Name, leaves: Leaves) -> Upload:
        """A member's staged update: the one that is there, or a new one in place of the one before.

        Args:
            path: the member's.
            name: the update's.
            leaves: how it is cut.

        Raises:
            MessageError: over_quota.
        """
        upload = self.find(path, name)
        if upload is None:
            self.drop(path, but=name)
            self._make_room(leaves.size, keep=self._place(path))
            try:
                upload = Upload(self._place(path) / str(name), name, leaves)
            except OSError as error:
                raise MessageError("over_quota", f"the staging folder takes no file ({error.strerror})") from error
        self._uploads.pop(path, None)
        self._uploads[path] = upload
        return upload

    def drop(self, path: str, *, but: Name | None = None) -> None:
        """Forget what a member has staged.

        Args:
            path: the member's.
            but: an update whose file stays, if an earlier process has left one.
        """
        upload = self._uploads.pop(path, None)
        if upload is not None:
            upload.close()
        place = self._place(path)
        for file in place.iterdir() if place.is_dir() else ():
            if file.name != str(but):
                file.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of all files, which stay for the next process."""
        for upload in self._uploads.values():
            upload.close()
        self._uploads.clear()

    def _make_room(self, size: int, *, keep: Path) -> None:
        """Drop what is judged, and what no member has asked for since this process began, oldest first."""
        for place in sorted(self._leftovers(), key=lambda place: place.stat().st_mtime):
            if self._is_room(size, keep=keep):
                return
            if place != keep:
                shutil.rmtree(place, ignore_errors=True)
        for path, upload in list(self._uploads.items()):
            if self._is_room(size, keep=keep):
                return
            if upload.judged:
                self.drop(path)
        if not self._is_room(size, keep=keep):
            got = (
                f"{size} bytes more than the {self.nbytes} that are staged, expected at most {self._most_bytes} in all"
            )
            raise MessageError("over_quota", f"{got}: try again later")

    def _is_room(self, size: int, *, keep: Path) -> bool:
        """Whether so many bytes fit, in place of what lies in the folder `keep`."""
        return self.nbytes - self._leftovers().get(keep, 0) + size <= self._most_bytes

    def _leftovers(self) -> dict[Path, int]:
        """Bytes in folders of members that have not been heard of since this process began."""
        known = {self._place(path) for path in self._uploads}
        places = [place for place in self._folder.iterdir() if place not in known] if self._folder.is_dir() else []
        return {place: sum(file.stat().st_size for file in place.iterdir()) for place in places if place.is_dir()}

    def _place(self, path: str) -> Path:
        return self._folder / hashlib.sha256(path.encode()).hexdigest()[:32]
