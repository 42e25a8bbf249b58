"""Checkpoints of nodes: safetensors beside JSON, versioned, atomic, never pickle.

    checkpoints/world/europe/italy/
        000041-7f3a/            one checkpoint: number, then a random part
            arrays.safetensors
            meta.json           written last; holds the sizes and the SHA-256 of the arrays

A checkpoint is written under a temporary name, flushed to disk and renamed; loading takes the newest that is
whole, falls back to the one before if it is not, and says so.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from worldlm_ray.errors import CheckpointError
from worldlm_ray.params import Flat

FORMAT = 1


def folder(run_dir: Path, path: str) -> Path:
    """Where the checkpoints of a node lie."""
    return run_dir / "checkpoints" / path / "@"


def save(place: Path, meta: Mapping[str, Any], arrays: Mapping[str, Flat], *, keep: int = 2) -> Path:
    """Write a checkpoint and drop the oldest.

    Args:
        place: the node's folder; made if need be.
        meta: JSON values.
        arrays: flat buffers.
        keep: checkpoints to keep, this one included.

    Returns:
        The folder of the new checkpoint.

    Raises:
        CheckpointError: the storage refused; nothing half-written is left under a final name.
    """
    try:
        place.mkdir(parents=True, exist_ok=True)
        old = _numbered(place)
        number = (old[-1][0] if old else 0) + 1
        temporary = place / f".writing-{secrets.token_hex(4)}"
        temporary.mkdir()
        file = temporary / "arrays.safetensors"
        digest = _write_arrays(file, arrays)
        manifest = {
            "format": FORMAT,
            "bytes": file.stat().st_size,
            "sha256": digest,
            "meta": dict(meta),
            "meta_sha256": _sha256_of(meta),
        }
        (temporary / "meta.json").write_text(json.dumps(manifest), encoding="utf-8")
        _sync(temporary / "meta.json")
        final = place / f"{number:06d}-{secrets.token_hex(2)}"
        temporary.rename(final)
        _sync(place)
    except OSError as error:
        raise CheckpointError(f"cannot write a checkpoint to {place}: {error}; free the storage") from error
    for unfinished in place.glob(".writing-*"):  # of a writer that was killed
        shutil.rmtree(unfinished, ignore_errors=True)
    for _, stale in old[: max(len(old) + 1 - keep, 0)]:
        shutil.rmtree(stale, ignore_errors=True)
    return final


def load(place: Path, *, warn: Callable[[str], None] = lambda _: None) -> tuple[dict[str, Any], dict[str, Flat]] | None:
    """The newest whole checkpoint of a node, or None if it never wrote one.

    Args:
        place: the node's folder.
        warn: told about every damaged checkpoint that was passed over.

    Raises:
        CheckpointError: there are checkpoints and none is whole.
    """
    found = _numbered(place)
    for _, path in reversed(found):
        try:
            return _read(path)
        except CheckpointError as error:
            warn(f"{error}; going back to the one before")
    if found:
        raise CheckpointError(f"{place}: none of {len(found)} checkpoints is whole")
    return None


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Flat]]:
    try:
        manifest = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        file = path / "arrays.safetensors"
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{path}: checkpoint format {manifest['format']}, this version reads {FORMAT}")
        if file.stat().st_size != manifest["bytes"] or _sha256(file) != manifest["sha256"]:
            raise CheckpointError(f"{path}: the arrays are damaged")
        if _sha256_of(manifest["meta"]) != manifest["meta_sha256"]:
            raise CheckpointError(f"{path}: meta.json is damaged")
        return manifest["meta"], load_file(file)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error


def _write_arrays(file: Path, arrays: Mapping[str, Flat]) -> str:
    """Write flat fp32 buffers as safetensors, flushed to disk; returns the SHA-256 of the file.

    The library's own writer makes a copy of every tensor first. This one streams the buffers as they lie, since
    a node that holds three times its model must not need six to save it; the library reads the result.
    """
    index, offset = {}, 0
    for name, values in arrays.items():
        index[name] = {
            "dtype": "F32",
            "shape": list(values.shape),
            "data_offsets": [offset, offset + values.nbytes],
        }
        offset += values.nbytes
    head = json.dumps(index).encode()
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()
    with file.open("wb") as stream:
        pieces: list[Any] = [struct.pack("<Q", len(head)), head, *map(np.ascontiguousarray, arrays.values())]
        for piece in pieces:
            stream.write(piece)
            digest.update(piece)
        stream.flush()
        os.fsync(stream.fileno())
    return digest.hexdigest()


def _numbered(place: Path) -> list[tuple[int, Path]]:
    if not place.is_dir():
        return []
    found = [(path.name.partition("-")[0], path) for path in place.iterdir() if path.is_dir()]
    return sorted((int(number), path) for number, path in found if number.isdigit())


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sha256_of(meta: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(dict(meta), sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
