"""A child over a border is served as a child beside its parent: the same bits, each update once."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.borders import NodeAsParent, a_border, run
from support.nodes import a_node

from worldlm_ray.aggregation.node import Node
from worldlm_ray.config.federated import AggregationConfig
from worldlm_ray.errors import MessageError
from worldlm_ray.exchange.compression import encode_update
from worldlm_ray.exchange.messages import Update, buffer_of, pack_header, unpack_model
from worldlm_ray.exchange.replies import Verdict
from worldlm_ray.tensors.layout import make_layout

LAYOUT = make_layout([("body.weight", (10_000,)), ("head.weight", (77,))], ["head.*"], layers=0)
LEAF = 4_096


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def a_world(children: tuple[str, ...] = ("a", "b")) -> Node:
    initial = np.random.default_rng(1).normal(size=LAYOUT.size).astype(np.float32)
    return a_node(layout=LAYOUT, initial=initial, children=children)


def an_update(sender: str, seq: int, *, base: int = 0, codec: str = "fp32") -> Update:
    values = np.random.default_rng(100 * ord(sender) + seq).normal(size=LAYOUT.size).astype(np.float32) / 100
    encoded, values = encode_update(codec, values, None)
    fields = {"sender": sender, "seq": seq, "base_version": base, "tokens": 10, "started_tokens": 10 * seq}
    return Update(**fields, values=values, codec=codec, encoded=encoded)


async def push(parent: Any, update: Update, *, incarnation: int = 1, to: int = 1) -> Verdict:
    header = pack_header(update, LAYOUT)
    return await parent.push(update.sender, incarnation, to, header, buffer_of(update))


async def exchange(parents: dict[str, Any], *, rounds: int = 3, codec: str = "fp32") -> list[Any]:
    """All children join, pull and push in turn; returns all models and verdicts."""
    found: list[Any] = []
    for name, parent in parents.items():
        found.append(await parent.join(name, 1, 0))
    for seq in range(1, rounds + 1):
        for name, parent in parents.items():
            model = unpack_model(await parent.pull(name, 1, 1, 10 * seq), LAYOUT)
            found += [model.version, model.values.tobytes()]
            found.append(await push(parent, an_update(name, seq, base=model.version, codec=codec)))
    for name, parent in parents.items():
        found.append(await parent.done(name, 1, 1))
    return found


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_an_exchange_over_a_border_has_the_bits_of_a_local_one(tmp_path: Path, codec: str) -> None:
    async def both() -> None:
        local = NodeAsParent(a_world())
        here = await exchange({"a": local, "b": local}, codec=codec)
        async with a_border(tmp_path, NodeAsParent(a_world()), LAYOUT) as border:
            there = await exchange({"a": border.link("world/a"), "b": border.link("world/b")}, codec=codec)
        assert there == here
        assert np.array_equal(border.parent.node.theta, local.node.theta)
        assert border.parent.node.version == 6

    run(both())


def test_a_model_that_a_member_has_does_not_come_again(tmp_path: Path) -> None:
    async def work() -> None:
        async with a_border(tmp_path, NodeAsParent(a_world()), LAYOUT) as border:
            link = border.link()
            await link.join("a", 1, 0)
            first = await link.pull("a", 1, 1, 0)
            moved = link.transfer.meter.down.bytes
            assert moved == LAYOUT.nbytes
            second = await link.pull("a", 1, 1, 0)
            assert second.values is first.values
            assert link.transfer.meter.down.bytes == moved
            await push(link, an_update("a", 1))
            third = await link.pull("a", 1, 1, 10)
            assert third.values is not first.values
            assert not third.values.flags.writeable

    run(work())


def test_a_pull_waits_for_a_parent_that_waits(tmp_path: Path) -> None:
    async def work() -> None:
        rules = AggregationConfig(trigger="synchronous")
        node = a_node(layout=LAYOUT, initial=np.zeros(LAYOUT.size, np.float32), children=("a", "b"), aggregation=rules)
        async with a_border(tmp_path, NodeAsParent(node), LAYOUT, poll_s=0.05) as border:
            a, b = border.link("world/a"), border.link("world/b")
            for name, link in (("a", a), ("b", b)):
                await link.join(name, 1, 0)
                await link.pull(name, 1, 1, 10)
            await push(a, an_update("a", 1))
            waiting = asyncio.create_task(a.pull("a", 1, 1, 20))
            while border.gateway.members["world/a"].answers["pull"] < 4:  # of them two were 202
                await asyncio.sleep(0.01)
            assert not waiting.done()
            await push(b, an_update("b", 1))
            assert unpack_model(await waiting, LAYOUT).version == 1
            assert border.parent.calls["pull"] == 3

    run(work())


def test_what_the_parent_refuses_is_refused_by_the_same_name(tmp_path: Path) -> None:
    async def work() -> None:
        async with a_border(tmp_path, NodeAsParent(a_world()), LAYOUT) as border:
            link = border.link()
            await link.join("a", 1, 0)
            assert (await push(link, an_update("a", 1))).accepted
            assert (await push(link, an_update("a", 1), to=7)).reason == "restarted"
            with pytest.raises(MessageError, match="restarted"):
                await link.pull("a", 1, 7, 0)
            await link.join("a", 2, 1)
            with pytest.raises(MessageError, match="superseded"):
                await link.pull("a", 1, 1, 0)

    run(work())


def test_a_push_that_is_sent_again_counts_once(tmp_path: Path) -> None:
    async def work() -> None:
        async with a_border(tmp_path, NodeAsParent(a_world()), LAYOUT) as border:
            link = border.link()
            await link.join("a", 1, 0)
            first = await push(link, an_update("a", 1))
            moved = link.transfer.meter.up.bytes
            assert await push(link, an_update("a", 1)) == first
            assert link.transfer.meter.up.bytes == moved, "the leaves were there"
            await border.restart()
            assert (await push(link, an_update("a", 1))).reason == "duplicate"
            assert border.parent.accepted == [("a", 1)]
            assert border.parent.node.version == 1

    run(work())


def test_two_equal_pushes_at_once_are_one_call(tmp_path: Path) -> None:
    async def work() -> None:
        async with a_border(tmp_path, NodeAsParent(a_world()), LAYOUT) as border:
            links = [border.link(), border.link()]
            await links[0].join("a", 1, 0)
            one, other = await asyncio.gather(*(push(link, an_update("a", 1)) for link in links))
            assert one == other
            assert one.accepted
            assert border.parent.calls["push"] == 1

    run(work())


def test_a_parent_that_cannot_be_reached_is_unreachable(tmp_path: Path) -> None:
    async def work() -> None:
        async with a_border(tmp_path, NodeAsParent(a_world()), LAYOUT) as border:
            link = border.link(tries=2)
            await link.join("a", 1, 0)

            def away(method: str) -> None:
                raise MessageError("unreachable", "the world does not answer")

            border.parent.before = away
            with pytest.raises(MessageError, match="unreachable: the world does not answer"):
                await link.heartbeat("a", 1, 1)
            with pytest.raises(MessageError, match="unreachable: the world does not answer"):
                await push(link, an_update("a", 1))
            border.parent.before = lambda method: None
            assert (await push(link, an_update("a", 1))).accepted
            border.line.is_down = True
            border.line.cut()
            with pytest.raises(MessageError, match="unreachable"):
                await link.pull("a", 1, 1, 0)

    run(work())


def test_a_member_behind_a_proxy_asks_it_to_connect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        heads: list[str] = []

        async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            heads.append((await reader.readuntil(b"\r\n\r\n")).decode().splitlines()[0])
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", int(heads[-1].split()[1].split(":")[1]))
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            with suppress(ConnectionError):
                while data := await source.read(65_536):
                    sink.write(data)
            sink.close()

        server = await asyncio.start_server(proxy, "127.0.0.1", 0)
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        async with a_border(tmp_path, NodeAsParent(a_world()), LAYOUT) as border:
            link = border.link(direct=True)
            await link.join("a", 1, 0)
            assert (await push(link, an_update("a", 1))).accepted
            assert set(heads) == {f"CONNECT 127.0.0.1:{border.port} HTTP/1.1"}
        server.close()

    run(work())
