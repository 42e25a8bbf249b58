"""An inner node's checkpoints, written by a thread beside while the node goes on.

Buffers that change in place (a fold that is under way, an optimizer's) are written first, and only so long events wait
(`steady`). Models, anchors and updates never change, and are written while the node goes on.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

from actors.node_records import NodeRecords
from actors.shared import end_process, write_checkpoint
from worldlm_ray.aggregation import node_checkpoint
from worldlm_ray.aggregation.events import Covered, Saved, Saving
from worldlm_ray.aggregation.node import Node
from worldlm_ray.errors import CheckpointError, SupersededError
from worldlm_ray.plan.plan import Plan
from worldlm_ray.run_clock import RunClock
from worldlm_ray.storage import checkpoint, filesystem
from worldlm_ray.tensors.buffers import Flat

Spawn = Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"]


class NodeCheckpoints:
    """The checkpoints of one inner node.

    Args:
        plan: the run.
        path: of the node.
        node: whose state is written, and which is told what is on disk.
        clock: of the run.
        records: of the node. Each checkpoint flushes their trail first: it knows of no update that the trail does not.
        spawn: begins a task whose errors end the node.
    """

    def __init__(
        self,
        plan: Plan,
        path: str,
        node: Node,
        clock: RunClock,
        records: NodeRecords,
        *,
        spawn: Spawn,
    ) -> None:
        self._plan, self._path, self._node, self._clock = plan, path, node, clock
        self._records, self._spawn = records, spawn
        self._saved_s = clock.now_s()
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._saving: asyncio.Task[None] | None = None
        self._next: asyncio.Task[None] | None = None
        self.refused_s: float | None = None
        """Since when the storage refuses; None while it does not."""
        self._steady = asyncio.Event()
        """Unset while buffers that events change are being written."""
        self._steady.set()

    async def steady(self) -> None:
        """Wait until no buffer is being written that an event changes."""
        while not self._steady.is_set():
            await self._steady.wait()

    @property
    def is_idle(self) -> bool:
        """Whether none is being written."""
        return self._saving is None or self._saving.done()

    def save_if_due(self) -> None:
        """Have one written if `checkpoint.every_s` has passed, unless one still is being written."""
        if self._clock.now_s() - self._saved_s >= self._plan.config.checkpoint.every_s and self.is_idle:
            self.save()

    def save(self) -> asyncio.Task[None]:
        """Have a checkpoint written of the state as it is now, or as it is when the one under way is written.

        Returns:
            A task that ends when it is on disk, or when the storage has refused it: then the run goes on without, and
            what children keep grows until the storage is back.
        """
        if self._saving is None or self._saving.done():
            self._saving = self._begin()
            return self._saving
        if self._next is None:
            self._next = self._spawn(self._save_after(self._saving))
        return self._next

    def save_last(self) -> None:
        """Write one now, when the event loop turns no more; one may be on its way."""
        self._disk.shutdown(wait=True, cancel_futures=True)
        self._records.audit.flush()
        with suppress(CheckpointError, SupersededError):
            self._write(*self._node.state())

    def check_newest(self) -> None:
        """End this process if another one plays the node by now: the world has no parent that would tell it so."""
        place = checkpoint.folder(self._plan.run_dir, self._path)
        try:
            with filesystem.refusals(place):
                newest = checkpoint.newest_incarnation(place)
            if newest > self._node.incarnation:
                end_process(f"{self._path}: incarnation {self._node.incarnation} was replaced")
        except OSError:
            return  # the storage is away

    async def _save_after(self, before: asyncio.Task[None]) -> None:
        await before
        self._saving, self._next = self._begin(), None
        await self._saving

    def _begin(self) -> asyncio.Task[None]:
        self._saved_s = self._clock.now_s()
        self._records.audit.flush()
        self._node.handle(Saving())
        meta, arrays = self._node.state()
        if any(map(node_checkpoint.changes, arrays)):
            self._steady.clear()  # events wait until these are written, and no longer
        # Plain values are copied, which is nothing; buffers are not: the others never change.
        return self._spawn(self._write_beside(self._node.covers(), json.loads(json.dumps(meta)), arrays))

    async def _write_beside(self, covered: Covered, meta: dict[str, Any], arrays: dict[str, Flat]) -> None:
        """Write while the machine goes on."""
        loop = asyncio.get_running_loop()

        def steady() -> None:
            loop.call_soon_threadsafe(self._steady.set)

        try:
            await loop.run_in_executor(self._disk, partial(self._write, meta, arrays, on_steady=steady))
        except SupersededError as error:
            end_process(str(error))
        except CheckpointError as error:
            self.refused_s = self._clock.now_s() if self.refused_s is None else self.refused_s
            self._records.warn(f"no checkpoint: {error}")
        else:
            self.refused_s = None
            self._node.handle(Saved(covered=covered))
        finally:
            self._steady.set()

    def _write(self, meta: dict[str, Any], arrays: dict[str, Flat], **options: Any) -> None:
        write_checkpoint(
            self._plan,
            self._path,
            meta,
            arrays,
            incarnation=self._node.incarnation,
            clock=self._clock,
            changing=[name for name in arrays if node_checkpoint.changes(name)],
            **options,
        )
