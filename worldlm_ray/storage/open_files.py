"""The limit of open files of a process, and memory-mapped arrays that need no open file.

A map of numpy keeps its file's descriptor, so a thousand clients in one process would need thousands of them.
Here a file is mapped and closed, and the map stays valid.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
import weakref
from functools import cache
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

SPARE = 64
"""Descriptors that are left for other uses of the process."""


def limit() -> int:
    """The present limit of open files of this process."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def raise_limit() -> None:
    """Raise this process's limit of open files to what the system allows. It is often 1,024 before."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft == hard:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):  # macOS reports infinity and allows less
        return


def at_once(most: int, *, each: int) -> int:
    """Parts with `each` open files that may be written at once: `most`, or fewer if the limit of open files is low."""
    return max(1, min(most, (limit() - SPARE) // (2 * each)))


def cure(error: OSError, otherwise: str) -> str:
    """The cure of an error: a higher limit if there are too many open files, else `otherwise`."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"this process may hold {limit():,} files open: raise the limit with `ulimit -n 65536`"
    return otherwise


def mapped(file: BinaryIO, dtype: npt.DTypeLike, *, writable: bool = False) -> npt.NDArray[Any]:
    """A whole file as a memory-mapped array, [bytes of the file / bytes of a value].

    Args:
        file: an open file; it may be closed afterwards.
        dtype: of the values.
        writable: whether writes to the array change the file; otherwise the array is read-only.

    Raises:
        OSError: the system cannot map it.
    """
    size, values = os.fstat(file.fileno()).st_size, np.dtype(dtype)
    if size == 0:
        return np.empty(0, values)
    access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    at = _libc().mmap(None, size, access, mmap.MAP_SHARED, file.fileno(), 0)
    if at == ctypes.c_void_p(-1).value:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), file.name)
    memory: Any = (ctypes.c_char * size).from_address(at)
    weakref.finalize(memory, _libc().munmap, at, size).atexit = False
    array: npt.NDArray[Any] = np.frombuffer(memory, values)
    array.flags.writeable = writable
    return array


@cache
def _libc() -> Any:
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int64,
    ]
    library.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return library
