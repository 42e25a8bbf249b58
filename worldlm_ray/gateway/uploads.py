"""`up/...`: an update's leaves arrive, and are staged."""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor

from aiohttp import web

from worldlm_ray.errors import MessageError
from worldlm_ray.gateway.requests import Member, checked_length, pieces
from worldlm_ray.gateway.staging import ABSENT, Name, Staging, Upload
from worldlm_ray.gateway.traffic import Traffic
from worldlm_ray.gateway.wire import LEAVES_HEADER, MOST_LEAVES, Sizes, leaf_digest, split_digests


class Uploads:
    """Takes leaves, and checks each while the next one arrives.

    Args:
        staging: where they go.
        sizes: of what may come.
        threads: hash.
        traffic: limits what comes.
    """

    def __init__(self, staging: Staging, sizes: Sizes, threads: Executor, traffic: Traffic) -> None:
        self._staging, self._sizes, self._threads, self._traffic = staging, sizes, threads, traffic
        self._rechecks: dict[Upload, asyncio.Future[list[bytes]]] = {}
        """Files of an earlier process that are being read."""

    def staged(self, member: Member, name: Name) -> Upload | None:
        """A member's update, if it is there."""
        return self._staging.find(member.path, name)

    def drop(self, member: Member) -> None:
        """Forget what a member has staged."""
        self._staging.drop(member.path)

    async def there(self, member: Member, name: Name) -> web.Response:
        """Which leaves are there: their digests, zeros in place of the others.

        Raises:
            DayIsOver: the member may send none today.
        """
        self._traffic.check(member.path)
        upload = await self._open(member, name)
        return web.Response(body=b"".join(upload.digests))

    async def take(self, request: web.BaseRequest, member: Member, name: Name, first: int) -> web.Response:
        """Leaves from `first` on.

        Raises:
            MessageError: malformed, wrong_size, wrong_digest, over_quota or busy; leaves before the wrong one are kept.
        """
        leaves = self._sizes.update(name.codec)
        self._traffic.check(member.path)
        expected = _digests_of(request)
        if first + len(expected) > leaves.count:
            raise MessageError("malformed", f"leaves {first} to {first + len(expected)} of {leaves.count}")
        checked_length(request, most=leaves.nbytes(first, len(expected)), exactly=True)
        upload = await self._open(member, name)
        member.meter.resumed += sum(upload.has(first + at) for at in range(len(expected)))
        number, offset, done = upload.begin(first, len(expected)), leaves.start(first), 0
        checks: list[asyncio.Task[None]] = []
        way = member.meter.up
        try:
            with way.moving():
                async for piece in pieces(request):
                    upload.write(number, offset, piece)
                    offset += len(piece)
                    way.count(len(piece))
                    await self._traffic.moved(member.path, len(piece))
                    while done < len(expected) and offset >= leaves.start(first + done + 1):
                        checks.append(asyncio.create_task(self._check(upload, number, first + done, expected[done])))
                        done += 1
        finally:
            found = await asyncio.gather(*checks, return_exceptions=True)
        for error in found:
            if isinstance(error, BaseException):
                member.meter.resumed += 1
                raise error
        if done < len(expected):
            raise MessageError("wrong_size", f"the body ended in leaf {first + done}")
        return web.Response(status=204)

    async def _check(self, upload: Upload, number: int, index: int, expected: bytes) -> None:
        found = await asyncio.get_running_loop().run_in_executor(self._threads, leaf_digest, upload.view(index, 1))
        upload.check(number, index, found, expected=expected)

    async def _open(self, member: Member, name: Name) -> Upload:
        upload = self._staging.open(member.path, name, self._sizes.update(name.codec))
        if upload.is_old:
            if upload not in self._rechecks:
                work = asyncio.get_running_loop().run_in_executor(self._threads, upload.recheck)
                self._rechecks[upload] = work
                work.add_done_callback(lambda _: self._rechecks.pop(upload))
            found = await asyncio.shield(self._rechecks[upload])
            if upload.is_old:  # requests that waited, too: the first to come back notes it
                upload.digests, upload.is_old = found, False
        return upload


def _digests_of(request: web.BaseRequest) -> list[bytes]:
    """Digests of the leaves that a request says it carries.

    Raises:
        MessageError: malformed.
    """
    try:
        raw = bytes.fromhex(request.headers.get(LEAVES_HEADER, ""))
    except ValueError:
        raw = b""
    count = len(raw) // len(ABSENT)
    if not 1 <= count <= MOST_LEAVES:
        raise MessageError("malformed", f"{LEAVES_HEADER} names no SHA-256 of 1 to {MOST_LEAVES} leaves")
    digests = split_digests(raw, count)
    if ABSENT in digests:
        raise MessageError("malformed", f"{LEAVES_HEADER} holds zeros, which stand for a leaf that is not there")
    return digests
