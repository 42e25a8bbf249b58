"""File systems of a run folder: one that all machines mount, or an object store.

    /mnt/shared/runs/europe         a pathlib.Path
    s3://bucket/runs/europe         a path of universal_pathlib, over fsspec: s3://, gs://, az://, ...

Both have the same interface here. An object store replaces objects as a whole, so no file is renamed into place. A file
that grows by a few lines at a time (`Growing`) becomes a sequence of objects. The store's library finds credentials and
endpoints, such as in the environment or by the machine's role.

Object stores raise many kinds of errors. `refusals` turns them into the OSError that a file system would raise.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from worldlm_ray.errors import RunError, WorldLMError

SEGMENT_BYTES = 1_000_000
"""Bytes at which a growing file begins a new object, since each addition rewrites the newest object."""


def place(text: str) -> Path:
    """The path that a user has given. A local path becomes absolute.

    Returns:
        A pathlib.Path, or for `protocol://...` a path of universal_pathlib, which is used like one.

    Raises:
        RunError: no installed package supports this protocol.
    """
    if "://" not in text:
        return expanded(text).absolute()
    from upath import UPath

    try:
        # Other processes write there, too: listings must not be cached.
        found: Any = UPath(text.rstrip("/"), use_listings_cache=False)
        found.fs  # noqa: B018  # made on first use: an error must show now
    except (ImportError, ValueError) as error:
        protocol = text.split("://", 1)[0]
        raise RunError(
            f"{text}: cannot use {protocol}://: {error}; install its fsspec package, such as "
            "`pip install 'worldlm_ray[s3]'` or `'worldlm_ray[gcs]'`, on every machine"
        ) from error
    return found  # type: ignore[no-any-return]


def expanded(text: str) -> Path:
    """A local path with `~` as the home folder. A `~name` without such a user is a file name."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def is_remote(path: Path) -> bool:
    """Whether a path lies in an object store."""
    return not isinstance(path, Path)


@contextmanager
def refusals(path: Path) -> Iterator[None]:
    """Turn every error of an object store into an OSError."""
    try:
        yield
    except (OSError, WorldLMError):
        raise
    except Exception as error:
        if not is_remote(path):
            raise
        raise OSError(f"{type(error).__name__}: {error}") from error


def is_lfs_pointer(begin: bytes) -> bool:
    """Whether a file that begins like this is a pointer of git-lfs, whose content has not been fetched."""
    return begin.startswith(b"version https://git-lfs.github.com/spec/")


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A local file that replaces `path` once it is complete and on disk. After an error `path` is unchanged.

    It keeps mode 0600: what a client caches may be private.
    """
    # delete=False: on success the file is renamed away from its temporary name. A process that is killed here leaves a
    # .tmp- file, which is never read.
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".tmp-", delete=False) as handle:
        try:
            yield cast(BinaryIO, handle)
            handle.flush()
            os.fsync(handle.fileno())
            os.replace(handle.name, path)
        except BaseException:
            os.unlink(handle.name)
            raise


def replace_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Replace a file as a whole: a reader sees the old one or the new one.

    Args:
        path: the file.
        text: the new content.
        durable: whether to return only when it is on disk. An object always is.

    Raises:
        OSError: the storage refused.
    """
    if is_remote(path):
        with refusals(path):
            path.write_bytes(text.encode())
        return
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    temporary.replace(path)


def create_exclusively(path: Path) -> None:
    """Create a file that no process can create a second time.

    Raises:
        FileExistsError: another process was faster.
        OSError: the storage refused.
    """
    if not is_remote(path):
        path.touch(exist_ok=False)
        return
    remote: Any = path
    with refusals(path):
        remote.fs.pipe_file(remote.path, b"1", mode="create")


def create_text(path: Path, text: str) -> None:
    """Create a file with its text in one step. Of two processes at once, one succeeds.

    Raises:
        FileExistsError: the file exists.
        OSError: the storage refused.
    """
    if is_remote(path):
        remote: Any = path
        with refusals(path):
            remote.fs.pipe_file(remote.path, text.encode(), mode="create")
        return
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    temporary.write_text(text, encoding="utf-8")
    try:
        # A link fails if the name exists, and the text is complete: a crash leaves no empty file.
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        with path.open("x", encoding="utf-8") as file:  # a file system without hard links
            file.write(text)
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Make a folder and those above it. An object store needs no folders, and no bucket is created."""
    if not is_remote(path):
        path.mkdir(parents=True, exist_ok=True)


def remove_tree(path: Path) -> None:
    """Remove a folder and its content, as far as possible."""
    if not is_remote(path):
        shutil.rmtree(path, ignore_errors=True)
        return
    remote: Any = path
    with suppress(OSError), refusals(path):
        remote.fs.rm(remote.path, recursive=True)


def flush_folder(path: Path) -> None:
    """Flush the names in a folder to disk. An object store needs no flush."""
    if is_remote(path):
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def local_copy(path: Path) -> Iterator[Path]:
    """A file on this machine with the same contents, as long as the context is open.

    Raises:
        OSError: the storage refused.
    """
    if not is_remote(path):
        yield path
        return
    remote: Any = path
    with tempfile.TemporaryDirectory(prefix="worldlm-") as folder:
        copy = Path(folder) / path.name
        with refusals(path):
            remote.fs.get_file(remote.path, str(copy))
        yield copy


def for_arrow(path: Path) -> tuple[str, Any]:
    """A path for a library that takes file systems of pyarrow, and the file system; None for the local one."""
    if not is_remote(path):
        return str(path), None
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    remote: Any = path
    return str(remote.path), PyFileSystem(FSSpecHandler(remote.fs))


class Growing:
    """A file to which pieces are added, each as a whole or not at all.

    In an object store it is a sequence of objects, `name.0000-MARK.ending`, `name.0001-MARK.ending` and so on. An
    addition rewrites the newest object. Readers take the files of a folder in the order of their names.

    Args:
        path: the file. Its folder is made when needed.
        closing: written before a piece if the file does not end with it, as after a kill inside a line.
        durable: whether a piece is on disk, and not in the system's memory, when `add` returns. An object always is.
    """

    def __init__(self, path: Path, *, closing: bytes = b"", durable: bool = False) -> None:
        self._path, self._closing, self._durable = path, closing, durable
        self._segment, self._number, self._mark = b"", -1, secrets.token_hex(2)

    def add(self, piece: bytes) -> None:
        """Add a piece.

        Raises:
            OSError: the storage refused, and no part was added.
        """
        if is_remote(self._path):
            with refusals(self._path):
                self._add_remote(piece)
            return
        make_folder(self._path.parent)
        # Opened for each piece: after an outage of the storage the file may be another one. Unbuffered: a killed
        # process loses nothing.
        with self._path.open("ab+", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            if self._closing and size:
                file.seek(-len(self._closing), os.SEEK_END)
                if file.read() != self._closing:
                    piece = self._closing + piece
            try:
                written = 0
                while written < len(piece):  # an unbuffered file may write a part only
                    written += file.write(piece[written:])
                if self._durable:
                    os.fsync(file.fileno())
            except OSError:
                with suppress(OSError):
                    os.truncate(self._path, size)
                raise
        if self._durable and not size:
            flush_folder(self._path.parent)

    def _add_remote(self, piece: bytes) -> None:
        if self._number < 0 or len(self._segment) > SEGMENT_BYTES:
            segment, number = b"", self._next_number()
        else:
            segment, number = self._segment, self._number
        # The mark separates two incarnations that write at once, while the older one does not know of the newer yet.
        name = f"{self._path.stem}.{number:04d}-{self._mark}{self._path.suffix}"
        self._path.with_name(name).write_bytes(segment + piece)
        self._segment, self._number = segment + piece, number

    def _next_number(self) -> int:
        """The number after those of this incarnation and of earlier ones."""
        name = re.compile(rf"{re.escape(self._path.stem)}\.(\d+)-[0-9a-f]+{re.escape(self._path.suffix)}")
        folder = self._path.parent
        found = [name.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
        return max([self._number, *(int(match[1]) for match in found if match)]) + 1
