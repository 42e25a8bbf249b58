"""Parameters as one flat contiguous fp32 buffer, and the arithmetic on such buffers.

All of it is done a block at a time with separately rounded operations. So its bits depend neither on the number of
threads nor on the width of the vector unit, and no temporary as large as the model is made.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import chain
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Flat = npt.NDArray[np.float32]
"""A one-dimensional, contiguous fp32 buffer."""

BLOCK = 1 << 16
"""Elements per block: 256 KiB, so that a block and its temporary stay in the second-level cache."""
PER_THREAD = 16
"""Blocks per thread, at least: fewer do not pay for a thread."""
THREADS = min(len(os.sched_getaffinity(0)), 8) if hasattr(os, "sched_getaffinity") else min(os.cpu_count() or 1, 8)
"""Threads for a pass over a large buffer: more than a few do not read memory faster."""

T = TypeVar("T")


def params_sha256(flat: Flat) -> str:
    """SHA-256 of the buffer's bytes: equal hashes mean equal bits."""
    return hashlib.sha256(np.ascontiguousarray(flat, dtype="<f4").data).hexdigest()


def frozen(flat: Flat) -> Flat:
    """A read-only view: published and remembered models never change in place."""
    view = flat.view()
    view.flags.writeable = False
    return view


def blocks(size: int) -> Iterator[slice]:
    """Slices that cover `size` elements, a cache-sized block each."""
    for start in range(0, size, BLOCK):
        yield slice(start, min(start + BLOCK, size))


def spread(size: int, work: Callable[[Iterable[slice]], T]) -> list[T]:
    """Let several threads work on `size` elements, each on adjacent blocks.

    Neither the work on an element nor the borders of the blocks depend on the number of threads.

    Args:
        size: elements.
        work: takes the blocks of one thread. numpy releases the interpreter lock while it computes.

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
    """L2 norm to about five digits, with blocks summed in fp32; nan or inf if any element is, or is above 1e16.

    It takes a third of the time of `squared_norm`, but its last bits depend on the processor. Use: limits and records.
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
