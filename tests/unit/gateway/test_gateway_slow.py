"""A peer that does not get on costs a border no more than a connection, for a while."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.border_requests import (
    BODY,
    HEX,
    LIMITS,
    all_is_well,
    at_a_border,
    joined,
)
from support.borders import Border, ByHand, NodeAsParent, a_border, by_hand, run
from support.nodes import a_node

from worldlm_ray.gateway import wire
from worldlm_ray.gateway.connections import ConnectionLimits
from worldlm_ray.tensors.layout import make_layout

pytestmark = pytest.mark.usefixtures("quick")

SOON_WITHOUT_A_HEAD = replace(LIMITS, head_s=0.3)
SOON_WHEN_IDLE = replace(LIMITS, idle_s=0.6)


# ---- slow peers --------------------------------------------------------------------------------------------------


async def says_nothing(border: Border) -> ByHand:
    """No handshake."""
    return ByHand(*await asyncio.open_connection("127.0.0.1", border.port))


async def silent_after_the_handshake(border: Border) -> ByHand:
    return await by_hand(border)


async def dribbles_a_head(border: Border) -> ByHand:
    peer = await by_hand(border)
    peer.writer.write(b"POST /v1/join HTTP/1.1\r\nHost: ")
    return peer


async def dribbles_a_body(border: Border) -> ByHand:
    peer = await by_hand(border)
    peer.send("PUT", "/v1/up/1/1/fp32/0", BODY[:100], Content_Length=str(len(BODY)), Leaf_Digests=HEX)
    return peer


async def silent_after_an_answer(border: Border) -> ByHand:
    peer = await by_hand(border)
    assert (await peer.ask("GET", "/healthz")).status == 200
    return peer


SLOW = [  # the last is the gateway's reason, if the event loop or aiohttp has not closed the connection before it
    (says_nothing, SOON_WITHOUT_A_HEAD, ""),
    (silent_after_the_handshake, SOON_WITHOUT_A_HEAD, "no request"),
    (dribbles_a_head, SOON_WITHOUT_A_HEAD, "no request"),
    (dribbles_a_body, SOON_WHEN_IDLE, "a transfer does not get on"),
    (silent_after_an_answer, SOON_WHEN_IDLE, "idle"),
]


@pytest.mark.parametrize(("kind", "limits", "reason"), SLOW, ids=[kind.__name__ for kind, _, _ in SLOW])
def test_a_peer_that_does_not_get_on_is_closed(
    tmp_path: Path, kind: Any, limits: ConnectionLimits, reason: str
) -> None:
    async def work() -> None:
        async with at_a_border(tmp_path, limits=limits) as border:
            peer = await kind(border)
            dribble = asyncio.create_task(_dribble(peer)) if kind in (dribbles_a_head, dribbles_a_body) else None
            assert await asyncio.wait_for(peer.closed(), 5)
            assert set(border.gateway.connections.closed) <= {reason}
            if dribble is not None:
                dribble.cancel()
            await all_is_well(border)

    run(work())


async def _dribble(peer: ByHand) -> None:
    """A byte now and then, so that the connection is never silent for long."""
    while True:
        peer.writer.write(b"x")
        await asyncio.sleep(0.01)


def test_a_reader_that_does_not_get_on_is_closed(tmp_path: Path) -> None:
    async def work() -> None:
        big = make_layout([("body.weight", (8_000_000,))], [], layers=0)
        node = a_node(layout=big, initial=np.zeros(big.size, np.float32), children=("a",))
        async with a_border(tmp_path, NodeAsParent(node), big, leaf=2**22, limits=SOON_WHEN_IDLE) as border:
            peer = await joined(border)
            asked = wire.Pull(incarnation=1, to=1, started_tokens=0)
            while not (body := (await peer.ask("POST", "/v1/pull", wire.packed(asked))).body):
                pass  # the gateway says now and then that the model is not there yet
            found = wire.parsed(wire.Served, body)
            peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
            peer.send("GET", f"/v1/down/{found.digest.hex()}", Range=f"bytes=0-{big.nbytes - 1}")
            while not border.gateway.connections.closed["a transfer does not get on"]:
                await asyncio.sleep(0.02)
            peer.writer.transport.abort()

    run(work())


def test_connections_are_counted(tmp_path: Path) -> None:
    async def work() -> None:
        async with at_a_border(tmp_path) as border:
            members = [await by_hand(border) for _ in range(LIMITS.of_member)]
            one_more = await by_hand(border)
            assert await members.pop(0).closed(), "it has been silent for longest"
            strangers = [await by_hand(border, None) for _ in range(LIMITS.strangers_of_address)]
            another = await by_hand(border, None)
            assert await another.closed()
            for peer in (*members, one_more, *strangers):
                assert (await peer.ask("GET", "/healthz")).status == 200
            assert border.gateway.connections.closed["too many connections"] == 2

    run(work())
