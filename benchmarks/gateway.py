"""An update over a border between organisations and the model back, in copies of the same bytes over plain TCP.

Three processes on this machine: a node, a gateway before it, and a member's link. An update of 128 million parameters
is sent by TLS with client certificates, staged in shared memory, checked, copied to where the node reads it (as
`ray.put` does), and folded; the model comes back. A plain TCP copy of the same bytes into memory that is there already
is taken before and after each. A second child of the node completes each aggregation, beside the measurement: there is
one for all updates in it. Ray is not part of it; at the member, its object store adds one copy each way.

Last comes a profile of the gateway's process: in which work its threads were found, of those that were at work.
"""

from __future__ import annotations

import asyncio
import copy
import multiprocessing
import os
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gateway_processes import LOOK_S, NodeProcess, Samples, layout_of
from worldlm_ray.exchange.compression import encode
from worldlm_ray.exchange.messages import Update, buffer_of, pack_header, unpack_model
from worldlm_ray.gateway import identity, profile, wire
from worldlm_ray.gateway.authority import Authority
from worldlm_ray.gateway.contexts import client_context, server_context
from worldlm_ray.gateway.link import Link, LinkSettings, hello_of
from worldlm_ray.gateway.seals import MemberKey, ServerKey
from worldlm_ray.gateway.server import Gateway, Settings

SIZE, ROUNDS, SAMPLED = 128_000_000, 5, 3
"""Parameters, exchanges of which the median counts, and those behind them that are profiled."""
TARGETS = {"up": 15.0, "down": 10.0, "int8 up": 5.0}
"""In TCP copies of the fp32 bytes."""
MEMORY_MB = {"member": 32, "gateway": 64}
CODECS = ("fp32", "int8")


def sizes_of(size: int) -> wire.Sizes:
    """What may cross."""
    return wire.Sizes(layout=layout_of(size), codecs=CODECS)


class Memory:
    """Private memory of this process, beyond what it had when this began."""

    def __init__(self) -> None:
        self._before = self.most = _private_bytes()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def end(self) -> float:
        """MB at the peak."""
        self._ended.set()
        self._thread.join()
        return (self.most - self._before) / 2**20

    def _look(self) -> None:
        while not self._ended.wait(LOOK_S):
            self.most = max(self.most, _private_bytes())


def _private_bytes() -> int:
    """Of memory that is no file's: staged updates and models in shared memory do not count."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1_024
    raise OSError("/proc/self/status has no RssAnon")


# ---- the other process -------------------------------------------------------------------------------------------


def serve(folder: str, staging: str, size: int, port: int, asked: Any, alone: bool) -> None:
    """A gateway, and beside it the far end of a plain TCP copy; `alone`: a node of one child, and no copy."""
    if not alone:
        threading.Thread(target=_copy_end, args=(port + 1, 4 * size), daemon=True).start()
    node = NodeProcess(Path(staging), size, alone=alone)
    asyncio.run(_serve(Path(folder), Path(staging), size, port, asked, node))


async def _serve(folder: Path, staging: Path, size: int, port: int, asked: Any, node: NodeProcess) -> None:
    sizes = sizes_of(size)
    authority = Authority(folder)
    settings = Settings(sizes=sizes, hello=hello_of(sizes), staging_dir=staging, staging_bytes=4 * sizes.layout.nbytes)
    seq, gateway = 0, Gateway(node, authority, settings, seal=ServerKey(authority.identity))
    await gateway.start(server_context(authority.identity), host="127.0.0.1", port=port)
    loop, memory, samples = asyncio.get_running_loop(), None, None
    asked.send("ready")
    while (what := await loop.run_in_executor(None, asked.recv)) != "end":
        if what == "begin":
            memory = Memory()
            asked.send(None)
        elif what == "aggregate":
            seq += 1
            asked.send(await node.aggregate(seq))
        elif what == "sample":
            samples = Samples()
            asked.send(None)
        elif what == "memory":
            assert memory is not None
            asked.send(memory.end())
        else:
            assert samples is not None
            asked.send(samples.end())
    await gateway.stop()


def _copy_end(port: int, nbytes: int) -> None:
    buffer = memoryview(bytearray(nbytes))
    with socket.create_server(("127.0.0.1", port)) as listener:
        while True:
            peer, _ = listener.accept()
            with peer, suppress(OSError):
                if peer.recv(1) == b"u":
                    _receive(peer, buffer)
                    peer.sendall(b".")
                else:
                    peer.sendall(buffer)


def _receive(peer: socket.socket, into: memoryview) -> None:
    at = 0
    while at < len(into):
        at += peer.recv_into(into[at : at + 2**20])


def copy_s(port: int, buffer: memoryview, way: bytes) -> float:
    """Seconds of a plain TCP copy, up or down."""
    with socket.create_connection(("127.0.0.1", port)) as peer:
        began = time.perf_counter()
        peer.sendall(way)
        if way == b"u":
            peer.sendall(buffer)
            peer.recv(1)
        else:
            _receive(peer, buffer)
        return time.perf_counter() - began


# ---- measuring ---------------------------------------------------------------------------------------------------


async def exchanges(link: Link, size: int, plain: Callable[[bytes], float], asked: Any) -> dict[str, Any]:
    """All exchanges of all kinds: ratios to the copies around each, and memory."""
    layout, to = layout_of(size), (await link.join("a", 1, 0)).incarnation
    values = np.random.default_rng(0).standard_normal(size, np.float32)
    ratios: dict[str, list[float]] = {name: [] for name in TARGETS}
    seconds: dict[str, list[float]] = {name: [] for name in ("copy up", "copy down", *TARGETS)}
    memory: dict[str, float] = {}

    async def timed(name: str, way: bytes, work: Any) -> Any:
        before, began = plain(way), time.perf_counter()
        found = await work
        took, once = time.perf_counter() - began, (before + plain(way)) / 2
        ratios[name].append(took / once)
        seconds[name].append(took)
        seconds["copy up" if way == b"u" else "copy down"].append(once)
        return found

    async def round_(seq: int, codec: str, base: int) -> int:
        """Push and pull; returns the version that is pulled."""
        encoded = None if codec == "fp32" else encode(codec, values)
        fields: dict[str, Any] = {"sender": "a", "seq": seq, "base_version": base, "tokens": 10}
        update = Update(**fields, started_tokens=10 * seq, values=values, codec=codec, encoded=encoded)
        work = link.push("a", 1, to, pack_header(update, layout), buffer_of(update))
        verdict = await timed("up" if codec == "fp32" else "int8 up", b"u", work)
        assert verdict.accepted, verdict
        asked.send("aggregate")
        asked.recv()
        found = await timed("down", b"d", link.pull("a", 1, to, 10 * seq))
        return unpack_model(found, layout).version

    version, codecs = 0, ["fp32"] + ["fp32", "int8"] * ROUNDS
    for seq, codec in enumerate(codecs, 1):
        version = await round_(seq, codec, version)
        if seq == 1:  # until all memory has been touched
            for each in (*ratios.values(), *seconds.values()):
                each.clear()
    measured = {"ratios": copy.deepcopy(ratios), "seconds": copy.deepcopy(seconds)}
    asked.send("sample")
    asked.recv()
    for seq in range(len(codecs) + 1, len(codecs) + 1 + SAMPLED):
        version = await round_(seq, "fp32", version)
    asked.send("samples")
    shares = asked.recv()
    asked.send("begin")
    asked.recv()
    own = Memory()
    update = Update(
        sender="a", seq=len(codecs) + SAMPLED + 1, base_version=version, tokens=10, started_tokens=10, values=values
    )
    assert (await link.push("a", 1, to, pack_header(update, layout), values)).accepted
    memory["member"] = own.end()
    asked.send("memory")
    memory["gateway"] = asked.recv()
    return {**measured, "profile": shares, "memory_mb": memory}


def run() -> dict[str, Any]:
    """Measure, and print a table."""
    with served(SIZE) as (member, port, asked):
        return _shown(asyncio.run(_member(member, port, asked)))


@contextmanager
def served(size: int, *, alone: bool = False) -> Iterator[tuple[profile.Profile, int, Any]]:
    """A gateway and a node, in a process each.

    Args:
        size: of the model.
        alone: whether the node has one child, and aggregates each of its updates; without, a second child is beside it.

    Yields:
        The profile of the child `a`, the gateway's port, and a pipe to its process.
    """
    with tempfile.TemporaryDirectory() as keys, tempfile.TemporaryDirectory(dir="/dev/shm") as staging:
        port, folder = _two_free_ports(), Path(keys)
        identity.init(folder / "world", "bench", ["127.0.0.1"], "a passphrase")
        world = Authority(folder / "world")
        invitation = world.invite("world/a", expires_s=600.0)
        member = profile.begin(folder / "member", invitation, world.identity.root_pem)
        request = member.request()
        member.install(world.enrol(request, invitation.id, invitation.proof(request)).chain_pem)
        asked, other = multiprocessing.Pipe()
        arguments = (str(folder / "world"), staging, size, port, other, alone)
        server = multiprocessing.get_context("spawn").Process(target=serve, args=arguments)
        server.start()
        try:
            assert asked.recv() == "ready"
            yield member, port, asked
            asked.send("end")
            server.join(10)
        finally:
            server.kill()


def link_to(member: profile.Profile, port: int, size: int) -> Link:
    """The member's link, which signs."""
    sizes = sizes_of(size)
    settings = LinkSettings(url=f"https://127.0.0.1:{port}", path="world/a", sizes=sizes, hello=hello_of(sizes))
    return Link(settings, client_context(member), seal=MemberKey(member), check_server=member.check_server)


async def _member(member: profile.Profile, port: int, asked: Any) -> dict[str, Any]:
    buffer, link = memoryview(bytearray(4 * SIZE)), link_to(member, port, SIZE)
    try:
        return await exchanges(link, SIZE, lambda way: copy_s(port + 1, buffer, way), asked)
    finally:
        await link.close()


def _two_free_ports() -> int:
    """The first of two ports in a row that are free."""
    while True:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            port: int = one.getsockname()[1]
            with suppress(OSError, OverflowError):
                two.bind(("127.0.0.1", port + 1))
                return port


def _shown(found: dict[str, Any]) -> dict[str, Any]:
    load = os.getloadavg()[0]
    print(f"{SIZE / 1e6:.0f}M parameters, {4 * SIZE / 1e6:.0f} MB in fp32; medians of {ROUNDS}; load {load:.1f}")
    print(f"{'':10} {'s':>7} {'TCP copies':>11} {'least':>7} {'most':>7} {'target':>7}")
    rows = []
    for name, ratios in found["ratios"].items():
        took, middle = statistics.median(found["seconds"][name]), statistics.median(ratios)
        rows.append({"way": name, "s": took, "copies": middle, "least": min(ratios), "most": max(ratios)})
        print(f"{name:10} {took:7.2f} {middle:11.1f} {min(ratios):7.1f} {max(ratios):7.1f} {TARGETS[name]:7.0f}")
    for name, target in MEMORY_MB.items():
        print(f"extra memory, {name}: {found['memory_mb'][name]:.0f} MB (target {target})")
    copies = {name: statistics.median(found["seconds"][name]) for name in ("copy up", "copy down")}
    print(f"a TCP copy: {copies['copy up']:.2f} s up, {copies['copy down']:.2f} s down")
    print("the gateway's process, of the samples of threads at work:")
    for work, share in found["profile"].items():
        print(f"{share:6.0%}  {work}")
    return {"rows": rows, "profile": found["profile"], "memory_mb": found["memory_mb"], "copy_s": copies, "load": load}
