"""A border on the loopback: a gateway before a plain node, a member's link, and a line between them that can be cut."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from worldlm_ray.aggregation.events import Admit, Answer, Done, Heartbeat, Joined, Left, Pull, Push, Serve
from worldlm_ray.aggregation.node import Node
from worldlm_ray.errors import MessageError
from worldlm_ray.exchange.messages import Packed, pack
from worldlm_ray.exchange.replies import Verdict, Welcome
from worldlm_ray.gateway import wire
from worldlm_ray.gateway.connections import ConnectionLimits
from worldlm_ray.gateway.link import Link, LinkSettings, hello_of
from worldlm_ray.gateway.server import Gateway, Settings
from worldlm_ray.tensors.layout import Layout

WORLD = "w" * 64
DAY = datetime.timedelta(days=1)


# ---- certificates ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Signed:
    """A certificate and its key."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.DER)

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def write(self, folder: Path, name: str) -> Path:
        """The certificate and its key in one file."""
        form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        (folder / name).write_bytes(self.pem + self.key.private_bytes(*form))
        return folder / name


def signed(
    name: str, by: Signed | None, *names: x509.GeneralName, purpose: Any = None, days: tuple[int, int] = (-1, 2)
) -> Signed:
    """A certificate, by a root or as one."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if by is None else by.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + days[0] * DAY)
        .not_valid_after(now + days[1] * DAY)
        .add_extension(x509.BasicConstraints(ca=by is None, path_length=None), critical=True)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    if purpose is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    return Signed(key, builder.sign(key if by is None else by.key, hashes.SHA256()))


@cache
def root(name: str) -> Signed:
    return signed(name, None)


def member(path: str, *, by: str = "root", days: tuple[int, int] = (-1, 2)) -> Signed:
    uri = x509.UniformResourceIdentifier(f"worldlm://{WORLD}/{path}")
    return signed("member", root(by), uri, purpose=ExtendedKeyUsageOID.CLIENT_AUTH, days=days)


def server_context(folder: Path) -> ssl.SSLContext:
    here = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    own = signed("server", root("root"), here, purpose=ExtendedKeyUsageOID.SERVER_AUTH)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0
    context.verify_mode = ssl.CERT_OPTIONAL
    context.load_verify_locations(cadata=root("root").pem.decode())
    context.load_cert_chain(own.write(folder, "server.pem"))
    return context


def client_context(folder: Path, own: Signed | None, *, trusts: str = "root") -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=root(trusts).pem.decode())
    if own is not None:
        context.load_cert_chain(own.write(folder, f"{own.certificate.serial_number}.pem"))
    return context


class Doorkeeper:
    """Lets in every member of the root that is not refused."""

    def __init__(self) -> None:
        self.refused: set[str] = set()

    def authorise(self, certificate: bytes) -> str:
        found = x509.load_der_x509_certificate(certificate)
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        path = names.get_values_for_type(x509.UniformResourceIdentifier)[0].removeprefix(f"worldlm://{WORLD}/")
        if path in self.refused:
            raise MessageError("not_allowed", f"{path} is no member any more")
        return path

    def enrol(self, request: bytes, invitation: str, proof: bytes) -> Any:
        raise MessageError("not_allowed", f"there is no invitation {invitation}")

    def renew(self, certificate: bytes, request: bytes) -> bytes:
        raise MessageError("not_allowed", "no certificate is renewed here")


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
    doorkeeper: Doorkeeper
    settings: Settings
    gateway: Gateway
    port: int
    line: Line
    links: list[Link] = field(default_factory=list)

    @property
    def staging(self) -> Path:
        return self.settings.staging_dir

    def link(self, path: str = "world/a", *, own: Signed | None = None, direct: bool = False, **changes: Any) -> Link:
        """A member's link, through the line."""
        options = {"tries": 3, "connections": self.settings.connections} | changes
        seal, keep = options.pop("seal", None), options.pop("keep", lambda receipt: None)
        settings = LinkSettings(
            url=f"https://127.0.0.1:{self.port if direct else self.line.port}",
            path=path,
            sizes=options.pop("sizes", self.settings.sizes),
            hello=options.pop("hello", self.settings.hello),
            world=WORLD,
            **options,
        )
        context = client_context(self.folder, own or member(path))
        link = Link(settings, context, seal=seal, keep=keep)
        self.links.append(link)
        return link

    async def restart(self) -> None:
        """Another gateway process, as far as memory goes, at the same port."""
        await self.gateway.stop()
        self.gateway = Gateway(self.parent, self.doorkeeper, self.settings)
        await self.gateway.start(server_context(self.folder), host="127.0.0.1", port=self.port)


def sizes_of(layout: Layout, *, leaf: int, codecs: tuple[str, ...] = ("fp32", "int8")) -> wire.Sizes:
    return wire.Sizes(layout=layout, codecs=codecs, leaf=leaf)


@asynccontextmanager
async def a_border(
    folder: Path,
    parent: Any,
    layout: Layout,
    *,
    leaf: int = 4096,
    limits: ConnectionLimits | None = None,
    seal: Any = None,
    **changes: Any,
) -> AsyncIterator[Border]:
    """A gateway before a parent."""
    sizes = sizes_of(layout, leaf=leaf)
    options: dict[str, Any] = {"staging_bytes": 4 * layout.nbytes, "poll_s": 0.2, "world": WORLD} | changes
    settings = Settings(
        sizes=sizes,
        hello=hello_of(sizes),
        staging_dir=folder / "staging",
        limits=limits or ConnectionLimits(of_member=16, look_s=0.02),
        **options,
    )
    doorkeeper = Doorkeeper()
    gateway = Gateway(parent, doorkeeper, settings, seal=seal)
    port = await gateway.start(server_context(folder), host="127.0.0.1", port=0)
    line = Line(port)
    await line.start()
    border = Border(folder, layout, parent, doorkeeper, settings, gateway, port, line)
    try:
        yield border
    finally:
        for link in border.links:
            await link.close()
        await line.stop()
        await border.gateway.stop()
