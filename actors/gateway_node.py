"""The actor of a node, as the gateway's server before it calls it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError

from actors.shared import Address
from worldlm_ray.errors import MessageError
from worldlm_ray.exchange.messages import Packed
from worldlm_ray.exchange.replies import Verdict, Welcome


class NodeBehind:
    """The node behind a gateway.

    Args:
        address: the run, and the path of the node.
        admissions: how often the member at a path was let in.
    """

    def __init__(self, address: Address, admissions: Callable[[str], int]) -> None:
        self._address, self._admissions = address, admissions
        self._handle: Any = None
        self._pulled: tuple[Any, Any] = (None, None)
        """The newest model's reference and buffer: all members get the same buffer of a version."""

    async def join(self, child: str, incarnation: int, seq: int) -> Welcome:
        """See calls.Parent."""
        admission = self._admissions(f"{self._address.path}/{child}")
        welcome: Welcome = await self._call("join", child, incarnation, seq, admission)
        self._tell(child, "training", "has joined over the border")
        return welcome

    async def push(self, sender: str, incarnation: int, to: int, header: bytes, values: Any) -> Verdict:
        """See calls.Parent."""
        ref = await asyncio.get_running_loop().run_in_executor(None, ray.put, values)
        verdict: Verdict = await self._call("push", sender, incarnation, to, header, [ref])
        return verdict

    async def pull(self, child: str, incarnation: int, to: int, started_tokens: int) -> Packed:
        """See calls.Parent."""
        header, [ref] = await self._call("pull", child, incarnation, to, started_tokens)
        if ref != self._pulled[0]:
            self._pulled = (ref, await self._answer(ref))
        return Packed(header, self._pulled[1])

    async def done(self, child: str, incarnation: int, to: int) -> None:
        """See calls.Parent."""
        await self._call("done", child, incarnation, to)
        self._tell(child, "finished", "")

    async def left(self, child: str, incarnation: int, to: int) -> bool:
        """See calls.Parent."""
        return bool(await self._call("left", child, incarnation, to))

    async def heartbeat(self, child: str, incarnation: int, to: int) -> None:
        """See calls.Parent."""
        await self._call("heartbeat", child, incarnation, to)

    async def _call(self, method: str, *arguments: Any) -> Any:
        if self._handle is None:
            try:
                self._handle = self._address.node(self._address.path)
            except ValueError as error:
                raise MessageError("unreachable", f"{self._address.path} is not there") from error
        return await self._answer(getattr(self._handle, method).remote(*arguments))

    async def _answer(self, ref: Any) -> Any:
        """The value behind a reference.

        Raises:
            MessageError: as the node refuses; unreachable: it has died.
        """
        try:
            return await ref
        except RayTaskError as error:
            if isinstance(error.cause, MessageError):
                raise error.cause from error
            raise
        except (RayActorError, GetTimeoutError, ObjectLostError) as error:
            self._handle = None
            raise MessageError("unreachable", f"{self._address.path} is away ({type(error).__name__})") from error

    def _tell(self, child: str, event: str, detail: str) -> None:
        self._address.tell(f"{self._address.path}/{child}", event, detail)
