"""What benchmarks/gateway.py has beside a gateway and a member: a node in another process, and a look at threads."""

from __future__ import annotations

import asyncio
import multiprocessing
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from worldlm_ray.aggregation.events import Admit, Answer, Joined, Pull, Push, Serve, Shared
from worldlm_ray.aggregation.node import Node
from worldlm_ray.aggregation.node_setup import NodePlace, NodeRules
from worldlm_ray.config.federated import AggregationConfig, MergeConfig
from worldlm_ray.config.schema import BudgetConfig
from worldlm_ray.exchange.messages import Packed, Update, pack, pack_header
from worldlm_ray.exchange.replies import Verdict, Welcome
from worldlm_ray.tensors.layout import Layout, make_layout

LOOK_S = 0.01


def layout_of(size: int) -> Layout:
    """A model of one tensor, all backbone."""
    return make_layout([("body.weight", (size,))], [], layers=0)


class NodeProcess:
    """A node in another process, as a gateway calls it: buffers lie in memory that both share, as in an object store.

    Args:
        folder: for buffers, in memory.
        size: of the model.
        alone: whether the node has one child, and aggregates each of its updates.
    """

    def __init__(self, folder: Path, size: int, *, alone: bool = False) -> None:
        self._folder, self._size, self._update = folder, size, _shared(folder / "update", size)
        self._model: tuple[int, Any] = (-1, None)
        self._pipe, other = multiprocessing.Pipe()
        arguments = (folder, size, other, alone)
        process = multiprocessing.get_context("spawn").Process(target=hold, args=arguments, daemon=True)
        process.start()

    async def join(self, child: str, incarnation: int, seq: int) -> Welcome:
        """See calls.Parent."""
        return Welcome(*await self._ask("join", incarnation, seq))

    async def push(self, sender: str, incarnation: int, to: int, header: bytes, values: Any) -> Verdict:
        """See calls.Parent; the update is copied, as `ray.put` does."""
        raw = self._update.view(np.uint8)[: values.nbytes]
        await asyncio.get_running_loop().run_in_executor(None, _hand_over, raw, values.view(np.uint8))
        fields = await self._ask("push", incarnation, to, header, values.nbytes, values.dtype.str)
        return Verdict(**fields)

    async def pull(self, child: str, incarnation: int, to: int, started_tokens: int) -> Packed:
        """See calls.Parent."""
        header, version = await self._ask("pull", incarnation, to, started_tokens)
        if version != self._model[0]:
            file = self._folder / f"model-{version}"
            self._model = (version, _shared(file, self._size))
            file.unlink()
        return Packed(header, self._model[1])

    async def aggregate(self, seq: int) -> int:
        """Have the other child push its update; returns the version of the model that follows."""
        return int(await self._ask("aggregate", seq))

    async def done(self, child: str, incarnation: int, to: int) -> None:
        """See calls.Parent."""

    async def left(self, child: str, incarnation: int, to: int) -> bool:
        """See calls.Parent."""
        return True

    async def heartbeat(self, child: str, incarnation: int, to: int) -> None:
        """See calls.Parent."""

    async def _ask(self, *what: Any) -> Any:
        def ask() -> Any:
            self._pipe.send(what)
            return self._pipe.recv()

        return await asyncio.get_running_loop().run_in_executor(None, ask)


def _hand_over(there: Any, values: Any) -> None:
    np.copyto(there, values)


def _shared(file: Path, size: int) -> Any:
    return np.memmap(file, np.float32, "r+" if file.exists() else "w+", shape=(size,))


def hold(folder: Path, size: int, pipe: Any, alone: bool) -> None:
    """The process of the node: a world with one child, or with two of which one is here."""
    children = ("a",) if alone else ("a", "b")
    aggregation = AggregationConfig(buffer_size=len(children))
    rules = NodeRules(aggregation=aggregation, merge=MergeConfig(), budget=BudgetConfig(rounds=1_000))
    layout, place = layout_of(size), NodePlace(path="world", children=children, has_parent=False)
    node = Node(place, rules, layout, np.zeros(size, np.float32))
    update, own = _shared(folder / "update", size), np.ones(0 if alone else size, np.float32)
    if not alone:
        node.handle(Joined(child="b", incarnation=1, seq=0, now_s=0.0))

    def publish() -> None:
        """As actors do: the node goes on with the copy in shared memory."""
        there = _shared(folder / f"model-{node.version}", size)
        np.copyto(there, node.theta)
        node.handle(Shared(own=node.theta, copy=there))

    while True:
        try:
            method, incarnation, *rest = pipe.recv()
        except EOFError:  # the gateway's process has ended
            return
        who = {"incarnation": incarnation, "now_s": 0.0}
        if method == "join":
            commands = node.handle(Joined(child="a", seq=rest[0], **who))
            welcome = next(command.welcome for command in commands if isinstance(command, Admit))
            pipe.send((welcome.incarnation, welcome.last_seq, welcome.durable_seq))
        elif method == "push":
            to, header, nbytes, dtype = rest
            packed = Packed(header, update.view(np.uint8)[:nbytes].view(dtype))
            commands = node.handle(Push(sender="a", packed=packed, to=to, **who))
            if alone:
                publish()
            pipe.send(vars(next(command.verdict for command in commands if isinstance(command, Answer))))
        elif method == "aggregate":
            fields: dict[str, Any] = {"sender": "b", "seq": incarnation, "base_version": node.version, "tokens": 10}
            mine = Update(**fields, started_tokens=10 * incarnation, values=own)
            packed = Packed(pack_header(mine, layout), own)
            node.handle(Push(sender="b", packed=packed, to=node.incarnation, incarnation=1, now_s=0.0))
            publish()
            pipe.send(node.version)
        else:
            commands = node.handle(Pull(child="a", to=rest[0], started_tokens=rest[1], **who))
            model = next(command.model for command in commands if isinstance(command, Serve))
            pipe.send((pack(model, layout).header, model.version))


WORK = {
    "hash of leaves": ("leaf_digest",),
    "TLS: decrypt": ("SSLObject.read",),
    "TLS: encrypt": ("SSLObject.write",),
    "sockets": (
        "_read_ready__get_buffer",
        "_SelectorSocketTransport.write",
        "_write_ready",
        "writelines",
        "write_send",
    ),
    "staging: write": ("Upload._write",),
    "hand-over to the node": ("_hand_over",),
    "waits": ("select", "wait", "_worker", "recv", "_recv", "accept", "_receive", "_copy_end", "sleep", "ask"),
}
"""What the innermost function of a thread says that it does; everything else is `asyncio, aiohttp and Python`."""


class Samples:
    """Looks at all threads of this process now and then."""

    def __init__(self) -> None:
        self._found: Counter[str] = Counter()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def end(self) -> dict[str, float]:
        """Share of the samples by work, without threads that wait."""
        self._ended.set()
        self._thread.join()
        total = self._found.total()
        return {name: count / total for name, count in self._found.most_common()}

    def _look(self) -> None:
        while not self._ended.wait(LOOK_S):
            for thread, frame in sys._current_frames().items():
                name = frame.f_code.co_qualname
                work = next((work for work, ends in WORK.items() if name.endswith(ends)), "asyncio, aiohttp and Python")
                if thread != self._thread.ident and work != "waits":
                    self._found[work] += 1
