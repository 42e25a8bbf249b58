"""A member's buffers on their way over a border: leaves by several connections, resumed after a cut.

A worker takes the next run of leaves, hashes it in a thread and sends it, while the others send theirs. After a cut all
workers stop; what the other side has meanwhile is asked for, and the rest goes on its way. So at most the leaves that
were under way are sent again: one for each connection.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import Executor

from worldlm_ray.errors import MessageError
from worldlm_ray.gateway.http import Failures, Http, Later
from worldlm_ray.gateway.meter import Way
from worldlm_ray.gateway.wire import (
    DIGEST_BYTES,
    LEAVES_HEADER,
    MOST_LEAVES,
    Leaves,
    digest_of,
    leaf_digest,
    split_digests,
)

_ABSENT = bytes(DIGEST_BYTES)


class Transfer:
    """What uploads and downloads have in common.

    Args:
        http: carries requests.
        threads: hash.
        connections: workers.
    """

    def __init__(self, http: Http, threads: Executor, *, connections: int) -> None:
        self._http, self._threads, self._connections = http, threads, connections
        self._run, self._workers = 1, connections
        """Leaves of a request, and requests at once: more while all goes well, fewer on a bad line."""
        self.meter = http.meter
        """Counts bytes of leaves, those that were sent again included."""

    async def send(self, place: str, view: memoryview, leaves: Leaves) -> bytes:
        """Have a buffer staged.

        Args:
            place: `up/INCARNATION/SEQ/CODEC`.
            view: the buffer's bytes.
            leaves: how it is cut.

        Returns:
            The buffer's digest.

        Raises:
            MessageError: unreachable, or as the other side refuses.
        """
        digests: dict[int, bytes] = {}
        begun: set[int] = set()

        async def missing() -> list[int]:
            raw = await self._http.call("GET", place, most=DIGEST_BYTES * leaves.count)
            there = split_digests(raw, leaves.count)
            for index, found in enumerate(there):
                if found != _ABSENT and index not in digests:
                    digests[index] = await self._hash(view, leaves, index)
            return [index for index, found in enumerate(there) if found == _ABSENT or found != digests[index]]

        async def move(run: list[int]) -> None:
            for index in run:
                if index not in digests:
                    digests[index] = await self._hash(view, leaves, index)
            headers = {LEAVES_HEADER: b"".join(digests[index] for index in run).hex()}
            body = view[leaves.start(run[0]) : leaves.start(run[-1] + 1)]
            self.meter.resumed += len(begun.intersection(run))
            begun.update(run)
            await self._http.put(f"{place}/{run[0]}", body, headers=headers, count=self.meter.up.count)

        await self._move_all(missing, move, self.meter.up)
        return digest_of([digests[index] for index in range(leaves.count)])

    async def fetch(self, digest: bytes, leaves: Leaves, into: memoryview, there: set[int]) -> None:
        """Get a buffer.

        Args:
            digest: of the buffer.
            leaves: how it is cut.
            into: where it goes.
            there: leaves that are there; grows.

        Raises:
            MessageError: gone, wrong_digest, unreachable, or as the other side refuses.
        """
        place = f"down/{digest.hex()}"
        expected = split_digests(
            await self._http.call("GET", f"{place}/leaves", most=DIGEST_BYTES * leaves.count), leaves.count
        )
        if digest_of(expected) != digest:
            raise MessageError("wrong_digest", "the digests of the leaves are not those of the model")
        begun: set[int] = set()

        async def missing() -> list[int]:
            return [index for index in range(leaves.count) if index not in there]

        async def move(run: list[int]) -> None:
            begin, end = leaves.start(run[0]), leaves.start(run[-1] + 1)
            checks: list[asyncio.Task[None]] = []
            self.meter.resumed += len(begun.intersection(run))
            begun.update(run)

            def arrived(moved: int, at: int) -> None:
                self.meter.down.count(moved)
                while len(checks) < len(run) and at >= leaves.start(run[len(checks)] + 1):
                    index = run[len(checks)]
                    checks.append(asyncio.create_task(self._check(into, leaves, index, expected[index], there)))

            try:
                await self._http.get_range(place, into, begin, end, arrived=arrived)
            finally:
                found = await asyncio.gather(*checks, return_exceptions=True)
            for error in found:
                if isinstance(error, BaseException):
                    raise error

        await self._move_all(missing, move, self.meter.down)

    async def _check(self, into: memoryview, leaves: Leaves, index: int, expected: bytes, there: set[int]) -> None:
        if await self._hash(into, leaves, index) != expected:
            raise MessageError("wrong_digest", f"leaf {index} of the model is not what its digest says")
        there.add(index)

    async def _hash(self, view: memoryview, leaves: Leaves, index: int) -> bytes:
        part = view[leaves.start(index) : leaves.start(index + 1)]
        return await asyncio.get_running_loop().run_in_executor(self._threads, leaf_digest, part)

    # ---- workers -----------------------------------------------------------------------------------------------

    async def _move_all(
        self, missing: Callable[[], Awaitable[list[int]]], move: Callable[[list[int]], Awaitable[None]], way: Way
    ) -> None:
        """Move leaves until none is missing; for as long as some arrive between two cuts.

        Raises:
            MessageError: unreachable; or what the other side refuses, other than leaves that were damaged on the way.
        """
        left, again = await missing(), self._http.backoff()
        while left:
            try:
                with way.moving():
                    await self._work(deque(self._runs(left)), move)
                self._run, self._workers = min(2 * self._run, MOST_LEAVES), self._connections
            except (*Failures, Later, MessageError) as error:
                if isinstance(error, MessageError) and error.reason not in ("wrong_digest", "busy", "unreachable"):
                    raise
                self._run, before = max(self._run // 2, 1), len(left)
                seconds = error.seconds if isinstance(error, Later) else 0.0
                await again.wait(error.refusal if isinstance(error, Later) else error, at_least_s=seconds)
                left = await missing()
                if len(left) < before:
                    again = self._http.backoff()
                else:  # so little comes through at once that it must be the rest of one leaf
                    self._workers = max(self._workers // 2, 1)
            else:
                left = await missing()

    async def _work(self, runs: deque[list[int]], move: Callable[[list[int]], Awaitable[None]]) -> None:
        """Move runs by as many workers as there are connections; the first error stops all of them."""

        async def worker() -> None:
            while runs:
                await move(runs.popleft())

        workers = [asyncio.ensure_future(worker()) for _ in range(min(self._workers, len(runs)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for each in workers:
                each.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    def _runs(self, left: Iterable[int]) -> list[list[int]]:
        """Leaves that follow each other, so many at a time."""
        runs: list[list[int]] = []
        for index in left:
            if runs and runs[-1][-1] == index - 1 and len(runs[-1]) < self._run:
                runs[-1].append(index)
            else:
                runs.append([index])
        return runs
