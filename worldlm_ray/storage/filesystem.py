"""Where a run folder lies: a file system that all machines mount, or an object store.

    /mnt/shared/runs/europe         a pathlib.Path
    s3://bucket/runs/europe         a path of universal_pathlib, over fsspec: s3://, gs://, az://, ...

Both are used alike. What an object store cannot do is done here in another way: an object is replaced as a whole, so
nothing is renamed into place, and what grows by a few lines at a time (`Growing`) becomes a row of objects. Credentials
and endpoints come from where the store's own library looks for them, such as the environment or the machine's role.

Errors of object stores are of many kinds; `refusals` makes them the OSError that a file system would raise.
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
from typing import Any

from worldlm_ray.errors import RunError, WorldLMError

SEGMENT_BYTES = 1_000_000
"""Of an object that grows: it is written anew with every addition, and a new one is begun at this size."""


def place(text: str) -> Path:
    """The path that a user wrote down: a local one becomes absolute.

    Returns:
        A pathlib.Path, or for `protocol://...` a path of universal_pathlib, which is used like one.

    Raises:
        RunError: nothing is installed that speaks this protocol.
    """
    if "://" not in text:
        return expanded(text).absolute()
    from upath import UPath

    try:
        # Other processes write there too: what was listed once must be listed again.
        found: Any = UPath(text.rstrip("/"), use_listings_cache=False)
        found.fs  # noqa: B018  # made on first use, and it is now that we want to know
    except (ImportError, ValueError) as error:
        protocol = text.split("://", 1)[0]
        raise RunError(
            f"{text}: cannot use {protocol}://: {error}; install its fsspec package, such as "
            "`pip install 'worldlm_ray[s3]'` or `'worldlm_ray[gcs]'`, on every machine"
        ) from error
    return found  # type: ignore[no-any-return]


def expanded(text: str) -> Path:
    """A local path with `~` as the home folder; a `~name` that is no user's is the name of a file."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def is_remote(path: Path) -> bool:
    """Whether a path lies in an object store."""
    return not isinstance(path, Path)


@contextmanager
def refusals(path: Path) -> Iterator[None]:
    """Whatever an object store raises becomes an OSError."""
    try:
        yield
    except (OSError, WorldLMError):
        raise
    except Exception as error:
        if not is_remote(path):
            raise
        raise OSError(f"{type(error).__name__}: {error}") from error


def is_lfs_pointer(begin: bytes) -> bool:
    """Whether a file that begins like this is what git-lfs leaves in place of contents that it has not fetched."""
    return begin.startswith(b"version https://git-lfs.github.com/spec/")


def replace_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Replace a file as a whole: a reader sees the old one or the new one.

    Args:
        path: the file.
        text: what it is to hold.
        durable: on disk when this returns. An object always is.

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
    """Make a file that no process can make a second time.

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
    """Make a file with its text in one step, unless it is there: of two processes at once, one succeeds.

    Raises:
        FileExistsError: the file is there already.
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
        # A link fails where the name is taken, and the text is whole: a crash leaves no empty file.
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
    """Make a folder and those above it. An object store needs none, and a new bucket was not asked for."""
    if not is_remote(path):
        path.mkdir(parents=True, exist_ok=True)


def remove_tree(path: Path) -> None:
    """Remove a folder and all that it holds; what cannot be removed stays."""
    if not is_remote(path):
        shutil.rmtree(path, ignore_errors=True)
        return
    remote: Any = path
    with suppress(OSError), refusals(path):
        remote.fs.rm(remote.path, recursive=True)


def flush_folder(path: Path) -> None:
    """Have the names in a folder on disk. An object store has them."""
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
    """A file to which whole pieces are added: all of a piece is there, or nothing of it.

    In an object store it is a row of objects, `name.0000-MARK.ending`, `name.0001-MARK.ending` and so on. Only the
    newest is written anew with an addition; readers take the files of a folder in the order of their names.

    Args:
        path: the file. Its folder is made when needed.
        closing: put before a piece if the file does not end with it, such as after a kill in the middle of a line.
    """

    def __init__(self, path: Path, *, closing: bytes = b"") -> None:
        self._path, self._closing = path, closing
        self._segment, self._number, self._mark = b"", -1, secrets.token_hex(2)

    def add(self, piece: bytes) -> None:
        """Add a piece.

        Raises:
            OSError: the storage refused; nothing was added.
        """
        if is_remote(self._path):
            with refusals(self._path):
                self._add_remote(piece)
            return
        make_folder(self._path.parent)
        # Opened anew every time: storage that was away and is back may be another file. Unbuffered: a killed process
        # loses nothing.
        with self._path.open("ab+", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            if self._closing and size:
                file.seek(-len(self._closing), os.SEEK_END)
                if file.read() != self._closing:
                    piece = self._closing + piece
            try:
                written = 0
                while written < len(piece):  # an unbuffered file may take less than it is given
                    written += file.write(piece[written:])
            except OSError:
                with suppress(OSError):
                    os.truncate(self._path, size)
                raise

    def _add_remote(self, piece: bytes) -> None:
        if self._number < 0 or len(self._segment) > SEGMENT_BYTES:
            segment, number = b"", self._next_number()
        else:
            segment, number = self._segment, self._number
        # The mark keeps two lives apart that write at the same time: the older one has not heard of the newer yet.
        name = f"{self._path.stem}.{number:04d}-{self._mark}{self._path.suffix}"
        self._path.with_name(name).write_bytes(segment + piece)
        self._segment, self._number = segment + piece, number

    def _next_number(self) -> int:
        """After those of this life, and those of the lives before."""
        name = re.compile(rf"{re.escape(self._path.stem)}\.(\d+)-[0-9a-f]+{re.escape(self._path.suffix)}")
        folder = self._path.parent
        found = [name.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
        return max([self._number, *(int(match[1]) for match in found if match)]) + 1
