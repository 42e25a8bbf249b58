"""Opening a file of text: decompression, lines, and failures that name the file."""

from __future__ import annotations

import bz2
import gzip
import importlib
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from worldlm_ray.errors import DataError
from worldlm_ray.storage import open_files


@contextmanager
def numbered_lines(path: Path) -> Iterator[Iterator[tuple[int, str]]]:
    """Numbered lines, from 1, of a text file that may be compressed.

    Raises:
        DataError: the file is damaged, or a line is not UTF-8; it names the file and the line.
    """
    number = 0

    def lines(handle: BinaryIO) -> Iterator[tuple[int, str]]:
        nonlocal number
        for number, raw in enumerate(handle, 1):
            # utf-8-sig drops the mark that some editors write at the start of a file.
            yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")

    with damage_named(path):
        try:
            with decompressed(path) as handle:
                yield lines(handle)
        except UnicodeDecodeError as error:
            problem = f"is not valid UTF-8 (byte {error.start} of the line)"
            raise DataError(f"{path}:{number}: {problem}; convert the file to UTF-8") from error


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turn what a damaged or unreadable file raises into a `DataError` that names it."""
    try:
        yield
    except (
        OSError,
        EOFError,
        zlib.error,
        lzma.LZMAError,
    ) as error:  # a truncated gzip raises EOFError, a damaged one the others
        detail = " ".join(str(error).split()) or type(error).__name__
        cure = "restore or remove the file"
        if isinstance(error, OSError):
            cure = open_files.cure(error, cure)
        raise DataError(f"{path}: cannot be read ({detail}); {cure}") from error


@contextmanager
def decompressed(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed by its suffix.

    Raises:
        DataError: it needs zstandard, which is not installed, or is a damaged .zst file.
    """
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    suffix = path.suffix.lower()
    if suffix in openers:
        with openers[suffix](path) as handle:
            yield cast(BinaryIO, handle)
    elif suffix == ".zst":
        try:
            zstandard = importlib.import_module("zstandard")
        except ImportError as error:
            raise DataError(f"{path}: reading .zst needs zstandard; pip install zstandard") from error
        try:
            with path.open("rb") as raw, io.BufferedReader(_ZstReader(raw, zstandard)) as handle:
                yield cast(BinaryIO, handle)
        except zstandard.ZstdError as error:
            raise DataError(f"{path}: cannot be read ({error}); restore or remove the file") from error
    else:
        with path.open("rb") as handle:
            yield handle


class _ZstReader(io.RawIOBase):
    """Decompresses all frames of a file. zstandard's reader accepts a file that was cut off."""

    def __init__(self, raw: BinaryIO, zstandard: Any) -> None:
        self._raw = raw
        self._context = zstandard.ZstdDecompressor()
        self._frame: Any = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            compressed = self._raw.read(1 << 17)
            if not compressed:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError("it ends in the middle of a frame")
                return 0
            parts = []
            while compressed:
                if self._frame is None or self._frame.eof:
                    self._frame = self._context.decompressobj()
                parts.append(self._frame.decompress(compressed))
                compressed = self._frame.unused_data if self._frame.eof else b""
            self._ready = memoryview(b"".join(parts))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]  # a view, not a copy: a few compressed bytes may become gigabytes
        return count
