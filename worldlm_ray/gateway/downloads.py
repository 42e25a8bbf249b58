"""`down/...`: models on their way out, of which all members read the same buffer."""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor
from contextlib import suppress
from typing import Any

from aiohttp import web

from worldlm_ray.errors import MessageError
from worldlm_ray.gateway.requests import Member, range_of, send_bytes
from worldlm_ray.gateway.traffic import Traffic
from worldlm_ray.gateway.wire import Leaves, digest_of, leaf_digest
from worldlm_ray.tensors.buffers import Flat

MOST_VERSIONS = 4
"""That are kept for members that are reading them."""
KEPT_S = 60.0
"""An older version goes when no member has asked for a part of it for so long."""


class Version:
    """One published buffer.

    Args:
        values: the buffer; must not change.
        leaf: bytes of a leaf.
    """

    def __init__(self, values: Flat, leaf: int) -> None:
        self.values = values
        """Kept, so that nothing else comes to lie at its address."""
        self.view = _bytes_of(values)
        self.leaves = Leaves(len(self.view), leaf)
        self.digests: list[bytes] = []
        self.digest = b""
        self.used_s = 0.0
        self.readers = 0

    def part(self, index: int) -> memoryview:
        """The bytes of a leaf."""
        return self.view[self.leaves.start(index) : self.leaves.start(index + 1)]


def _bytes_of(values: Any) -> memoryview:
    """A buffer's bytes, read-only, without a copy."""
    return memoryview(values).cast("B").toreadonly()


class Downloads:
    """Gives versions out.

    Args:
        leaf: bytes of a leaf.
        threads: hash.
        traffic: limits what goes.
    """

    def __init__(self, leaf: int, threads: Executor, traffic: Traffic) -> None:
        self._leaf, self._threads, self._traffic = leaf, threads, traffic
        self._versions: dict[int, asyncio.Task[Version]] = {}
        """By the address of their buffers; the newest is the last."""

    async def publish(self, values: Flat) -> Version:
        """Make a buffer ready to be read; returns it with its digests, which are computed once for all members."""
        address = values.ctypes.data
        task = self._versions.get(address)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._hashed(Version(values, self._leaf)))
            self._versions[address] = task
            self._forget(address)
        version = await asyncio.shield(task)
        version.used_s = asyncio.get_running_loop().time()
        return version

    async def leaves(self, digest: bytes) -> web.Response:
        """The digests of a model's leaves."""
        return web.Response(body=b"".join(self._find(digest).digests))

    async def give(self, request: web.BaseRequest, member: Member, digest: bytes) -> Any:
        """A part of a model.

        Raises:
            MessageError: gone: there is a newer one; malformed; over_quota.
        """
        self._traffic.check(member.path)
        version = self._find(digest)
        begin, end = range_of(request, version.leaves.size)
        headers = {"Content-Range": f"bytes {begin}-{end - 1}/{version.leaves.size}"}
        way = member.meter.down
        version.readers += 1

        async def paced(nbytes: int) -> None:
            way.count(nbytes)
            await self._traffic.moved(member.path, nbytes)

        try:
            with way.moving():
                return await send_bytes(request, version.view[begin:end], headers=headers, status=206, paced=paced)
        finally:
            version.readers -= 1

    async def _hashed(self, version: Version) -> Version:
        loop = asyncio.get_running_loop()
        work = [loop.run_in_executor(self._threads, leaf_digest, version.part(n)) for n in range(version.leaves.count)]
        version.digests = list(await asyncio.gather(*work))
        version.digest = digest_of(version.digests)
        return version

    def _find(self, digest: bytes) -> Version:
        for task in self._versions.values():
            if task.done() and not task.cancelled() and task.result().digest == digest:
                version = task.result()
                version.used_s = asyncio.get_running_loop().time()
                return version
        raise MessageError("gone", "this model is not given out any more: pull again")

    def _forget(self, newest: int) -> None:
        """Let go of versions that no member reads; at most MOST_VERSIONS stay."""
        now_s = asyncio.get_running_loop().time()
        for address, task in list(self._versions.items()):
            version = None
            with suppress(asyncio.InvalidStateError, asyncio.CancelledError):
                version = task.result()
            if address == newest or version is None:
                continue
            is_used = version.readers > 0 or now_s - version.used_s < KEPT_S
            if not is_used or len(self._versions) > MOST_VERSIONS:
                del self._versions[address]
