"""Checkpoints of nodes: safetensors beside JSON, versioned, atomic, never pickle.

    checkpoints/world/europe/italy/@/
        0002-000041-7f3a/       one checkpoint: the writer's incarnation, a number, a random part
            arrays.safetensors
            meta.json           written last; holds the sizes and the SHA-256 of the arrays
        incarnations/2          how often the node has been started

A checkpoint is written under a temporary name, flushed to disk and renamed. An object store cannot rename: there a
checkpoint counts once its meta.json exists. Loading takes the newest whole checkpoint, and warns of each newer damaged
one.

After the cluster has lost a machine, two processes may run one node for a while. Each has claimed its
incarnation, by creating a file that can be created only once. The older process learns of the newer one when it saves:
before it writes, and again before it relies on what it has written. The newer process has either read that checkpoint
or will never read it, since checkpoints are ordered by incarnation first.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import struct
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from worldlm_ray.errors import CheckpointError, SupersededError
from worldlm_ray.storage import filesystem
from worldlm_ray.tensors.buffers import Flat

FORMAT = 5
STORAGE_AGAIN_S = 2.0
"""How long a node that cannot go on without its storage waits before it asks again; virtual in a simulation."""
_INCARNATIONS, _META = "incarnations", "meta.json"
_NAME = re.compile(r"(\d+)-(\d+)-[0-9a-f]+")
CURE = "restore the folder from a copy, run the version of worldlm_ray that wrote it, or begin a new run"
_DTYPES = {"float32": "F32", "int64": "I64"}
"""What buffers hold, by safetensors' names."""


class _NotWholeError(Exception):
    """One checkpoint is damaged or of another format: an older one may do, so that this error stays in here."""


def folder(run_dir: Path, path: str) -> Path:
    """The folder of a node's checkpoints."""
    return run_dir / "checkpoints" / path / "@"


def claim(place: Path) -> int:
    """Claim a new incarnation of a node. No other process has its number or will have it.

    Raises:
        CheckpointError: the storage refused.
    """
    folder = place / _INCARNATIONS
    try:
        with filesystem.refusals(place):
            filesystem.make_folder(folder)
            number = newest_incarnation(place) + 1
            while True:
                try:
                    filesystem.create_exclusively(folder / str(number))
                    break
                except FileExistsError:
                    number += 1
            filesystem.flush_folder(folder)
            for path in folder.iterdir():
                if path.name.isdigit() and int(path.name) < number:
                    path.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot write to {place}: {error}; free the storage") from error
    return number


def newest_incarnation(place: Path) -> int:
    """The newest incarnation of a node; 0 if it has never been started."""
    folder = place / _INCARNATIONS
    if not folder.is_dir():
        return 0
    return max((int(path.name) for path in folder.iterdir() if path.name.isdigit()), default=0)


def save(
    place: Path,
    meta: Mapping[str, Any],
    arrays: Mapping[str, Flat],
    *,
    incarnation: int = 1,
    keep: int = 2,
    changing: Collection[str] = (),
    on_steady: Callable[[], None] = lambda: None,
) -> Path:
    """Write a checkpoint and drop the oldest.

    Args:
        place: the node's folder; made if need be.
        meta: JSON values.
        arrays: flat buffers.
        incarnation: the writer's.
        keep: checkpoints to keep, this one included.
        changing: names of buffers that must not change before they are written. They come first.
        on_steady: called when those are written, while the rest is still being written.

    Returns:
        The folder of the new checkpoint.

    Raises:
        CheckpointError: the storage refused. No partial checkpoint has a final name.
        SupersededError: a newer process runs this node. The checkpoint does not count.
    """
    temporary = place / f".writing-{secrets.token_hex(4)}"
    try:
        with filesystem.refusals(place):
            filesystem.make_folder(place)
            check_newest(place, incarnation)
            old = _numbered(place)
            number = max((number for (_, number), _ in old), default=0) + 1
            final = place / f"{incarnation:04d}-{number:06d}-{secrets.token_hex(2)}"
            if filesystem.is_remote(place):
                temporary = final  # no renaming there: a checkpoint counts once its meta.json exists
            filesystem.make_folder(temporary)
            _write(temporary, meta, arrays, changing=changing, on_steady=on_steady)
            if temporary is not final:
                temporary.rename(final)
            filesystem.flush_folder(place)
            check_newest(place, incarnation)
    except OSError as error:
        filesystem.remove_tree(temporary)
        with suppress(OSError), filesystem.refusals(place):
            check_newest(place, incarnation)  # a newer incarnation removes unfinished checkpoints of an older one
        raise CheckpointError(f"cannot write a checkpoint to {place}: {error}; free the storage") from error
    with suppress(OSError), filesystem.refusals(place):
        for path in place.iterdir():
            if path.name.startswith(".writing-") or _is_leftover(path, before=(incarnation, number)):
                filesystem.remove_tree(path)  # of a writer that was killed
    for _, stale in old[: max(len(old) + 1 - keep, 0)]:
        filesystem.remove_tree(stale)
    return final


def _write(
    folder: Path,
    meta: Mapping[str, Any],
    arrays: Mapping[str, Flat],
    *,
    changing: Collection[str],
    on_steady: Callable[[], None],
) -> None:
    """Write the two files of a checkpoint: the arrays, and then meta.json, which says that they are whole."""
    in_order = sorted(arrays, key=lambda name: name not in changing)
    size, digest = _write_arrays(
        folder / "arrays.safetensors",
        {name: arrays[name] for name in in_order},
        first=sum(name in changing for name in in_order),
        on_steady=on_steady,
    )
    manifest = {
        "format": FORMAT,
        "bytes": size,
        "sha256": digest,
        "meta": dict(meta),
        "meta_sha256": _sha256_of(meta),
    }
    filesystem.replace_text(folder / _META, json.dumps(manifest), durable=True)


def load(place: Path, *, warn: Callable[[str], None] = lambda _: None) -> tuple[dict[str, Any], dict[str, Flat]] | None:
    """The newest whole checkpoint of a node, or None if there is none.

    Args:
        place: the node's folder.
        warn: called with each damaged checkpoint that is skipped.

    Raises:
        CheckpointError: there are checkpoints and none is whole, or the storage refused.
    """
    try:
        with filesystem.refusals(place):
            found = _numbered(place)
    except OSError as error:
        raise CheckpointError(f"cannot read {place}: {error}; make the storage readable") from error
    newest = ""
    for _, path in reversed(found):
        try:
            return _read(path)
        except _NotWholeError as error:
            warn(f"{error}; going back to the one before")
            newest = newest or str(error)
    if found:
        raise CheckpointError(f"{place}: none of {len(found)} checkpoints is whole ({newest}); {CURE}")
    return None


def newest_meta(place: Path) -> dict[str, Any]:
    """Plain values of a node's newest checkpoint whose meta.json is whole; its arrays are not read.

    Returns:
        An empty mapping if there is no such checkpoint.
    """
    with suppress(OSError), filesystem.refusals(place):
        for _, path in reversed(_numbered(place)):
            with suppress(_NotWholeError):
                return dict(_read_manifest(path)["meta"])
    return {}


def _read_manifest(path: Path) -> dict[str, Any]:
    """The content of meta.json, checked.

    Raises:
        _NotWholeError: it is not whole, or of another format.
    """
    try:
        with filesystem.refusals(path):
            manifest: dict[str, Any] = json.loads((path / _META).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise _NotWholeError(f"{path}: checkpoint format {manifest['format']}, this version reads {FORMAT}")
        if _sha256_of(manifest["meta"]) != manifest["meta_sha256"]:
            raise _NotWholeError(f"{path}: {_META} is damaged")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _NotWholeError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error
    return manifest


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Flat]]:
    try:
        manifest = _read_manifest(path)
        with filesystem.local_copy(path / "arrays.safetensors") as file:
            if file.stat().st_size != manifest["bytes"] or _sha256(file) != manifest["sha256"]:
                raise _NotWholeError(f"{path}: the arrays are damaged")
            return manifest["meta"], load_file(file)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise _NotWholeError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error


def _write_arrays(
    file: Path, arrays: Mapping[str, Flat], *, first: int, on_steady: Callable[[], None]
) -> tuple[int, str]:
    """Write flat buffers as safetensors, flushed to disk; returns the size of the file and its SHA-256.

    The writer of safetensors copies every tensor first. This one streams the buffers without a copy, since a node that
    holds three times its model must not need six times its model to save it. safetensors reads the result.
    """
    index, offset = {}, 0
    for name, values in arrays.items():
        index[name] = {
            "dtype": _DTYPES[values.dtype.name],
            "shape": list(values.shape),
            "data_offsets": [offset, offset + values.nbytes],
        }
        offset += values.nbytes
    head = json.dumps(index).encode()
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()
    with file.open("wb") as stream:
        pieces: list[Any] = [struct.pack("<Q", len(head)) + head, *map(np.ascontiguousarray, arrays.values())]
        for number, piece in enumerate(pieces):
            stream.write(piece)
            digest.update(piece)
            if number == first:
                on_steady()
        if not filesystem.is_remote(file):
            stream.flush()
            os.fsync(stream.fileno())
    return 8 + len(head) + offset, digest.hexdigest()


def check_newest(place: Path, incarnation: int) -> None:
    """Check that a process still runs its node.

    Raises:
        SupersededError: a newer one does.
        OSError: the storage refused.
    """
    newest = newest_incarnation(place)
    if newest > incarnation:
        raise SupersededError(f"{place}: incarnation {newest} is there; {incarnation} must end")


def _numbered(place: Path) -> list[tuple[tuple[int, int], Path]]:
    """Checkpoints by incarnation and number, oldest first."""
    if not place.is_dir():
        return []
    found = [(_NAME.fullmatch(path.name), path) for path in place.iterdir() if path.is_dir()]
    if filesystem.is_remote(place):
        found = [(match, path) for match, path in found if match and (path / _META).is_file()]
    return sorted(((int(match[1]), int(match[2])), path) for match, path in found if match)


def _is_leftover(path: Path, *, before: tuple[int, int]) -> bool:
    """Whether a folder in an object store is an unfinished checkpoint of a process that must have ended."""
    match = _NAME.fullmatch(path.name)
    if match is None or not filesystem.is_remote(path) or (int(match[1]), int(match[2])) >= before:
        return False
    return not (path / _META).is_file()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sha256_of(meta: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(dict(meta), sort_keys=True).encode()).hexdigest()
