"""Parameters as one flat contiguous fp32 buffer, and the layout that says what lies where.

Backbone parameters come first, key layers after them, so that both parts are one slice each: an aggregation
is a few large memory-bound passes and never a loop over small tensors. All arithmetic on buffers here is
done a block at a time with separately rounded operations, so that its bits depend neither on the number of
threads nor on the width of the vector unit, and so that no temporary as large as the model is made.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache, cached_property
from itertools import chain, pairwise
from math import prod
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from worldlm_ray.errors import ConfigError

Flat = npt.NDArray[np.float32]
"""A one-dimensional, contiguous fp32 buffer."""

BLOCK = 1 << 16
"""Elements per block: 256 KiB, so that a block and its temporary stay in the second-level cache."""
PER_THREAD = 16
"""Blocks that are worth a thread."""
THREADS = min(len(os.sched_getaffinity(0)), 8) if hasattr(os, "sched_getaffinity") else min(os.cpu_count() or 1, 8)
"""Threads for a pass over a large buffer: more than a few do not read memory faster."""

T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """One parameter tensor inside the flat buffer."""

    name: str
    shape: tuple[int, ...]
    offset: int
    """First element, counted in elements."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class KeyLayer:
    """A unit of attention: the key parameters of one module, such as `model.layers.2` or `lm_head`.

    `start` and `stop` count elements from the beginning of the key part, not of the whole buffer.
    """

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Layout:
    """Where every parameter lies in the flat buffer: [backbone | key layers]."""

    entries: tuple[Entry, ...]
    backbone_size: int
    """Elements of the backbone; the key part begins here."""
    key_layers: tuple[KeyLayer, ...] = field(default=())

    @cached_property
    def size(self) -> int:
        """Elements of the whole buffer."""
        return sum(entry.size for entry in self.entries)

    @property
    def key_size(self) -> int:
        """Elements of the key part."""
        return self.size - self.backbone_size

    @property
    def nbytes(self) -> int:
        """Bytes of the whole buffer in fp32."""
        return 4 * self.size

    @cached_property
    def hash(self) -> str:
        """Identity of the layout: two nodes may exchange buffers only when theirs are equal."""
        digest = hashlib.sha256()
        for entry in self.entries:
            digest.update(f"{entry.name}{list(entry.shape)}@{entry.offset};".encode())
        digest.update(f"|{self.backbone_size}|{[layer.name for layer in self.key_layers]}".encode())
        return digest.hexdigest()[:16]

    @cached_property
    def _cuts(self) -> dict[int, tuple[slice, ...]]:
        return {}

    def fragments(self, count: int) -> tuple[slice, ...]:
        """The backbone in so many contiguous parts, which travel in turn.

        Source: Streaming DiLoCo, arXiv 2501.18512, section 2.2. Each cut is the border of two modules (a transformer
        block is one) that lies nearest to where equal parts would end; of two parameters where that leaves a smaller
        largest part, which few and large modules do.

        Raises:
            ValueError: there are fewer parameters.
        """
        if count not in self._cuts:
            self._cuts[count] = _cut(self, count)
        return self._cuts[count]

    def views(self, flat: Flat) -> dict[str, npt.NDArray[np.float32]]:
        """The buffer as named tensors, without a copy."""
        return {e.name: flat[e.offset : e.offset + e.size].reshape(e.shape) for e in self.entries}


def make_layout(shapes: Sequence[tuple[str, tuple[int, ...]]], key_patterns: Sequence[str], *, layers: int) -> Layout:
    """Lay parameters out: backbone first, key layers after it, each in model order.

    Args:
        shapes: name and shape of every parameter, in model order.
        key_patterns: shell-style patterns of key parameters; `layers.-1` counts blocks from the end.
        layers: number of blocks of the model.

    Raises:
        ConfigError: a pattern matches nothing.
    """
    names = [name for name, _ in shapes]
    keys: set[str] = set()
    for index, pattern in enumerate(key_patterns):
        wanted = _count_from_end(pattern, layers)
        matched = {name for name in names if fnmatchcase(name, wanted)}
        if not matched:
            groups = ", ".join(dict.fromkeys(f"{module_of(name)}.*" for name in names))
            raise ConfigError(
                f"model.key_layers[{index}]",
                f"the pattern {pattern!r} matches no parameter",
                f"there are {groups}",
            )
        keys |= matched
    ordered = [item for item in shapes if item[0] not in keys] + [item for item in shapes if item[0] in keys]
    entries, offset = [], 0
    for name, shape in ordered:
        entries.append(Entry(name, tuple(shape), offset))
        offset += prod(shape)
    backbone_size = sum(entry.size for entry in entries if entry.name not in keys)
    return Layout(tuple(entries), backbone_size, tuple(_key_layers(entries, backbone_size, keys)))


def _count_from_end(pattern: str, layers: int) -> str:
    return re.sub(r"layers\.-(\d+)", lambda match: f"layers.{layers - int(match.group(1))}", pattern)


def module_of(name: str) -> str:
    """The module that a parameter belongs to, as a unit of attention: `model.layers.2`, `lm_head`."""
    match = re.match(r"(.*layers\.\d+)\.", name)
    return match.group(1) if match else name.rsplit(".", 1)[0]


def _key_layers(entries: Iterable[Entry], backbone_size: int, keys: set[str]) -> Iterator[KeyLayer]:
    start, group, stop = 0, None, 0
    for entry in entries:
        if entry.name not in keys:
            continue
        if group is not None and module_of(entry.name) != group:
            yield KeyLayer(group, start, stop)
            start = stop
        group = module_of(entry.name)
        stop = entry.offset + entry.size - backbone_size
    if group is not None:
        yield KeyLayer(group, start, stop)


UNEVEN = 1.25
"""The largest fragment in multiples of an even one, up to which modules stay whole."""


def _cut(layout: Layout, count: int) -> tuple[slice, ...]:
    size = layout.backbone_size
    backbone = [entry for entry in layout.entries if entry.offset + entry.size <= size and entry.size]
    ends = [entry.offset + entry.size for entry in backbone]
    if count == 1:
        return (slice(0, size),)
    if not 1 <= count <= len(ends):
        raise ValueError(f"the backbone has {len(ends)} parameters")
    modules = [module_of(entry.name) for entry in backbone]
    pairs = zip(ends, modules, [*modules[1:], None], strict=True)
    borders = [end for end, module, following in pairs if module != following]
    if len(borders) >= count:
        whole = _nearest(borders, size, count)
        if _largest(whole) * count <= UNEVEN * size:
            return whole
        return min(whole, _nearest(ends, size, count), key=_largest)
    return _nearest(ends, size, count)


def _largest(parts: Sequence[slice]) -> int:
    return max(int(part.stop - part.start) for part in parts)


def _nearest(borders: Sequence[int], size: int, count: int) -> tuple[slice, ...]:
    """Cut at the borders that lie nearest to where equal parts would end; no part is empty."""
    cuts, first = [0], 0
    for number in range(1, count):
        left = range(first, len(borders) - (count - number))
        chosen = min(left, key=lambda index: abs(borders[index] * count - number * size))
        cuts.append(borders[chosen])
        first = chosen + 1
    return tuple(slice(start, stop) for start, stop in pairwise([*cuts, size]))


def params_sha256(flat: Flat) -> str:
    """SHA-256 of the buffer's bytes: equal hashes mean equal bits."""
    return hashlib.sha256(np.ascontiguousarray(flat, dtype="<f4").data).hexdigest()


def frozen(flat: Flat) -> Flat:
    """A read-only view: models that are published or remembered never change in place."""
    view = flat.view()
    view.flags.writeable = False
    return view


def blocks(size: int) -> Iterator[slice]:
    """Slices that cover `size` elements, a cache-sized block each."""
    for start in range(0, size, BLOCK):
        yield slice(start, min(start + BLOCK, size))


def spread(size: int, work: Callable[[Iterable[slice]], T]) -> list[T]:
    """Have several threads work on `size` elements, each on blocks that lie side by side.

    What is done with an element, and which elements a block has, does not depend on the number of threads.

    Args:
        size: elements.
        work: takes the blocks of one thread. numpy gives the interpreter free while it computes.

    Returns:
        What every thread's work returned, in the order of the elements.
    """
    threads = min(THREADS, size // (PER_THREAD * BLOCK))
    if threads < 2:
        return [work(blocks(size))]
    found = list(blocks(size))
    share = -(-len(found) // threads)
    return list(_pool().map(work, [found[i : i + share] for i in range(0, len(found), share)]))


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS, thread_name_prefix="blocks")


def add_scaled(target: Flat, values: Flat, scale: float, *, first: tuple[Flat, float] | None = None) -> None:
    """`target += scale * values`, in place; with `first`, `target = first[1] * first[0] + scale * values`."""
    factor = np.float32(scale)

    def work(parts: Iterable[slice]) -> None:
        temporary = np.empty(min(BLOCK, target.size), np.float32)
        for part in parts:
            product = temporary[: part.stop - part.start]
            if first is not None:
                np.multiply(first[0][part], np.float32(first[1]), out=target[part])
            np.multiply(values[part], factor, out=product)
            np.add(target[part], product, out=target[part])

    spread(target.size, work)


def difference(left: Flat, right: Flat, *, out: Flat) -> None:
    """`out = left - right`."""

    def work(parts: Iterable[slice]) -> None:
        for part in parts:
            np.subtract(left[part], right[part], out=out[part])

    spread(left.size, work)


def lerp(own: Flat, other: Flat, weight: float, *, out: Flat) -> None:
    """`out = (1 - weight) own + weight other`; exact copies at weight 0 and 1. `out` may be `own`."""
    if weight in (0.0, 1.0):
        source = other if weight == 1.0 else own
        if source is not out:
            np.copyto(out, source)
        return
    keep, take = np.float32(1.0 - weight), np.float32(weight)

    def work(parts: Iterable[slice]) -> None:
        temporary = np.empty(min(BLOCK, own.size), np.float32)
        for part in parts:
            product = temporary[: part.stop - part.start]
            np.multiply(other[part], take, out=product)
            np.multiply(own[part], keep, out=out[part])
            np.add(out[part], product, out=out[part])

    spread(own.size, work)


def squared_norm(values: Flat, minus: Flat | None = None) -> float:
    """Squared L2 norm of `values` (or of `values - minus`), summed in fp64 over blocks; nan or inf if any is."""

    def work(parts: Iterable[slice]) -> list[float]:
        found = []
        for part in parts:
            block = values[part].astype(np.float64)
            if minus is not None:
                block -= minus[part]
            found.append(float(np.dot(block, block)))
        return found

    return sum(chain.from_iterable(spread(values.size, work)))


def rough_norm(values: Flat) -> float:
    """L2 norm to five digits or so: blocks are summed in fp32; nan or inf if any element is, or is above 1e16.

    A third of the time of `squared_norm`, but its last bits depend on the processor: for limits and for records.
    """

    def work(parts: Iterable[slice]) -> list[float]:
        with np.errstate(over="ignore", invalid="ignore"):
            return [float(np.dot(values[part], values[part])) for part in parts]

    return math.sqrt(sum(chain.from_iterable(spread(values.size, work))))


def inner(a: Flat, b: Flat, *, origin: Flat | None = None) -> float:
    """Dot product of `a` and `b`, or of their displacements from `origin`, in fp64 over blocks."""

    def work(parts: Iterable[slice]) -> list[float]:
        found = []
        for part in parts:
            left, right = a[part].astype(np.float64), b[part].astype(np.float64)
            if origin is not None:
                left -= origin[part]
                right -= origin[part]
            found.append(float(np.dot(left, right)))
        return found

    return sum(chain.from_iterable(spread(a.size, work)))
