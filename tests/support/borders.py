"""A border on the loopback: a gateway before a plain node, a member's link, and a line between them that can be cut."""

from __future__ import annotations

import asyncio
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.gateway import make_member, make_world
from worldlm_ray.aggregation.events import Admit, Answer, Done, Heartbeat, Joined, Left, Pull, Push, Serve
from worldlm_ray.aggregation.node import Node
from worldlm_ray.exchange.messages import Packed, pack
from worldlm_ray.exchange.replies import Verdict, Welcome
from worldlm_ray.gateway import wire
from worldlm_ray.gateway.authority import Authority
from worldlm_ray.gateway.charter import impose
from worldlm_ray.gateway.connections import ConnectionLimits
from worldlm_ray.gateway.contexts import client_context, joining_context, server_context
from worldlm_ray.gateway.link import Link, LinkSettings, hello_of
from worldlm_ray.gateway.profile import Profile
from worldlm_ray.gateway.receipts import FOLDER, RECEIVED, SENT, Receipts
from worldlm_ray.gateway.seals import MemberKey, ServerKey
from worldlm_ray.gateway.server import Gateway, Settings
from worldlm_ray.tensors.layout import Layout

ALIKE = {"budget.rounds": "2", "model.parameters": "10077"}
IMPOSED = {"exchange.codecs": "fp32 int8", "fields": "tokens started_tokens"}
"""What the charter of a border's world says, unless a test says otherwise."""
BESIDE = ("seal", "receipts", "say", "check_server", "check_charter")
"""Arguments of a link that are no settings."""


def run(work: Coroutine[Any, Any, None]) -> None:
    """Run a test's coroutine; one that does not end fails."""
    asyncio.run(asyncio.wait_for(work, 60))


# ---- the parent --------------------------------------------------------------------------------------------------


class NodeAsParent:
    """A node as its children call it (actors/inner.py), without Ray.

    Args:
        node: the state machine.
        copies: whether models and updates are copied, as the object store does.
    """

    def __init__(self, node: Node, *, copies: bool = True) -> None:
        self.node, self.calls, self.now_s, self._copies = node, Counter[str](), 0.0, copies
        self.accepted: list[tuple[str, int]] = []
        self._pulls: dict[str, asyncio.Future[Packed]] = {}
        self._published: tuple[Any, Any] = (None, None)
        self.before: Callable[[str], Any] = lambda method: None
        """Called before a method; what it raises, the method raises."""

    async def join(self, child: str, incarnation: int, seq: int) -> Welcome:
        commands = self._take("join", Joined(child=child, incarnation=incarnation, seq=seq, now_s=self._now()))
        [welcome] = [command.welcome for command in commands if isinstance(command, Admit)]
        return welcome

    async def push(self, sender: str, incarnation: int, to: int, header: bytes, values: Any) -> Verdict:
        packed = Packed(header, values.copy() if self._copies else values)
        event = Push(sender=sender, packed=packed, incarnation=incarnation, to=to, now_s=self._now())
        [verdict] = [command.verdict for command in self._take("push", event) if isinstance(command, Answer)]
        if verdict.accepted:
            self.accepted.append((sender, verdict.seq))
        return verdict

    async def pull(self, child: str, incarnation: int, to: int, started_tokens: int) -> Packed:
        future = self._pulls.setdefault(child, asyncio.get_running_loop().create_future())
        who = {"child": child, "incarnation": incarnation, "to": to, "now_s": self._now()}
        self._take("pull", Pull(**who, started_tokens=started_tokens))
        return await asyncio.shield(future)

    async def done(self, child: str, incarnation: int, to: int) -> None:
        self._take("done", Done(child=child, incarnation=incarnation, to=to, now_s=self._now()))

    async def left(self, child: str, incarnation: int, to: int) -> bool:
        self._take("left", Left(child=child, incarnation=incarnation, to=to, now_s=self._now()))
        return self.node.children[child].left_durable

    async def heartbeat(self, child: str, incarnation: int, to: int) -> None:
        self._take("heartbeat", Heartbeat(child=child, incarnation=incarnation, to=to, now_s=self._now()))

    def _take(self, method: str, event: Any) -> list[Any]:
        self.calls[method] += 1
        self.before(method)
        commands = self.node.handle(event)
        for command in commands:
            if isinstance(command, Serve) and (future := self._pulls.pop(command.child, None)) is not None:
                future.set_result(Packed(pack(command.model, self.node.layout).header, self._publish()))
        return commands

    def _publish(self) -> Any:
        """One copy of a version, as all children get it."""
        if self._published[0] is not self.node.theta:
            self._published = (self.node.theta, self.node.theta.copy() if self._copies else self.node.theta)
        return self._published[1]

    def _now(self) -> float:
        self.now_s += 1.0
        return self.now_s


# ---- the line ----------------------------------------------------------------------------------------------------


class Line:
    """Forwards connections to a port, and cuts all of them when it is told to.

    Args:
        port: of the gateway, on this machine.
    """

    def __init__(self, port: int) -> None:
        self._to, self.port, self.bytes = port, 0, Counter[str]()
        self.cuts = 0
        self.cut_when: Callable[[], bool] = lambda: False
        """Asked after every piece that is forwarded."""
        self.is_down = False
        """Whether new connections are refused."""
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._join, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    def cut(self) -> None:
        """Abort every connection."""
        self.cuts += 1
        for writer in list(self._writers):
            writer.transport.abort()

    async def stop(self) -> None:
        self._server.close()
        self.cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.is_down:
            writer.transport.abort()
            return
        try:
            to_reader, to_writer = await asyncio.open_connection("127.0.0.1", self._to)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, to_writer}
        for way, source, sink in (("up", reader, to_writer), ("down", to_reader, writer)):
            task = asyncio.create_task(self._pump(way, source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(self, way: str, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(65_536):
                sink.write(data)
                self.bytes[way] += len(data)
                if self.cut_when():
                    self.cut()
                await sink.drain()
        with suppress(OSError):
            sink.close()
        self._writers.discard(sink)


# ---- all of it ---------------------------------------------------------------------------------------------------


@dataclass
class Border:
    """A gateway that listens, and what stands at both sides of it."""

    folder: Path
    layout: Layout
    parent: Any
    world: Authority
    settings: Settings
    gateway: Gateway
    port: int
    line: Line
    context: ssl.SSLContext
    kept: dict[str, Any] = field(default_factory=dict)
    """Options of the gateway beside its settings."""
    links: list[Link] = field(default_factory=list)
    peers: list[ByHand] = field(default_factory=list)

    def member(self, path: str = "world/a") -> Profile:
        """A member's profile; it enrols when it is first asked for."""
        place = self.folder / path.replace("/", "-")
        return Profile(place) if place.exists() else make_member(self.world, place, path)

    def link(self, path: str = "world/a", *, direct: bool = False, **changes: Any) -> Link:
        """A member's link, through the line."""
        context = changes.pop("context", None) or client_context(self.member(path))
        options: dict[str, Any] = {"path": path, "sizes": self.settings.sizes, "hello": self.settings.hello}
        options |= {"tries": 3, "connections": self.settings.connections, "world": self.world.identity.world}
        others = {name: changes.pop(name) for name in BESIDE if name in changes}
        url = f"https://127.0.0.1:{self.port if direct else self.line.port}"
        link = Link(LinkSettings(**({"url": url} | options | changes)), context, **others)
        self.links.append(link)
        return link

    def sealed_link(self, path: str = "world/a", *, run_dir: Path | None = None, **changes: Any) -> Link:
        """A member's link that signs, and keeps receipts in its run folder: `run-NAME`, unless given."""
        member, run_dir = self.member(path), run_dir or self.folder / f"run-{path.rpartition('/')[2]}"
        receipts = Receipts(run_dir / FOLDER, SENT, root=member.root)
        return self.link(path, seal=MemberKey(member), receipts=receipts, **changes)

    async def restart(self) -> None:
        """Another gateway, which knows no more than a new process would, at the same port."""
        await self.gateway.stop()
        self.gateway = Gateway(self.parent, self.world, self.settings, **self.kept)
        await self.gateway.start(self.context, host="127.0.0.1", port=self.port)


@asynccontextmanager
async def a_border(
    folder: Path, parent: Any, layout: Layout, *, leaf: int = 4096, sealed: bool = False, **changes: Any
) -> AsyncIterator[Border]:
    """A gateway before a parent; with `sealed`, pushes and verdicts are signed.

    `node`, `alike` and `imposed` are what its charter says.
    """
    sizes = wire.Sizes(layout=layout, codecs=("fp32", "int8"), leaf=leaf)
    world = make_world(folder / "gateway")
    options: dict[str, Any] = {
        "sizes": sizes,
        "hello": hello_of(sizes),
        "staging_dir": folder / "staging",
        "staging_bytes": 4 * layout.nbytes,
        "poll_s": 0.2,
        "limits": ConnectionLimits(of_member=16, look_s=0.02),
        "world": world.identity.world,
        "root_pem": world.identity.root_pem,
    }
    terms = changes.pop("alike", ALIKE), changes.pop("imposed", IMPOSED)
    options["charter"] = impose(world.identity, changes.pop("node", "world"), *terms).raw
    kept = {name: changes.pop(name) for name in ("traffic", "warn") if name in changes}
    settings, context = Settings(**(options | changes)), server_context(world.identity)
    if sealed:
        kept["seal"] = ServerKey(world.identity)
        kept["receipts"] = Receipts(folder / "run" / FOLDER, RECEIVED, root=world.identity.root)
    gateway = Gateway(parent, world, settings, **kept)
    port = await gateway.start(context, host="127.0.0.1", port=0)
    line = Line(port)
    await line.start()
    border = Border(folder, layout, parent, world, settings, gateway, port, line, context, kept)
    try:
        yield border
    finally:
        for peer in border.peers:
            peer.writer.transport.abort()
        for link in border.links:
            await link.close()
        await line.stop()
        await border.gateway.stop()


# ---- by hand -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reply:
    """What a gateway has answered."""

    status: int
    body: bytes

    @property
    def refusal(self) -> wire.Refusal:
        return wire.parsed(wire.Refusal, self.body)

    @property
    def reason(self) -> str:
        return self.refusal.reason


class ByHand:
    """One connection to a gateway, and requests as bytes.

    Args:
        reader: of the connection.
        writer: of the connection.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def ask(self, method: str, place: str, body: bytes = b"", **headers: str) -> Reply:
        """Send a whole request, and read its answer."""
        self.send(method, place, body, **headers)
        return await self.answer()

    def send(self, method: str, place: str, body: bytes = b"", **headers: str) -> None:
        """Send a request; `Content_Length` and the like say otherwise than the body."""
        lines = {"Host": "gateway", "Content-Length": str(len(body))}
        lines |= {name.replace("_", "-"): value for name, value in headers.items()}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value)
        self.writer.write(f"{method} {place} HTTP/1.1\r\n{head}\r\n".encode() + body)

    async def answer(self) -> Reply:
        """The next answer."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        lines = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        body = await self.reader.readexactly(int(lines.get("content-length", "0")))
        return Reply(int(head[0].split()[1]), body)

    async def closed(self) -> bool:
        """Wait until the other side closes the connection."""
        with suppress(ConnectionError, ssl.SSLError):
            while await self.reader.read(65_536):
                pass
        self.writer.transport.abort()
        return True


async def by_hand(border: Border, path: str | None = "world/a", context: ssl.SSLContext | None = None) -> ByHand:
    """A connection of a member, or of a stranger (None)."""
    if context is None and path is None:
        invitation = border.world.invite("world/stranger", expires_s=60.0)
        context = joining_context(invitation, border.world.identity.root_pem)
    context = context or client_context(border.member(path or ""))
    border.peers.append(ByHand(*await asyncio.open_connection("127.0.0.1", border.port, ssl=context)))
    return border.peers[-1]
