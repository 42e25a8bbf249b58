"""Requests of a member at a border, as bytes, and an update that they stage."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import numpy as np

from support.borders import Border, ByHand, NodeAsParent, a_border, by_hand
from support.nodes import a_node
from worldlm_ray.exchange.messages import Update, pack_header
from worldlm_ray.gateway import wire
from worldlm_ray.gateway.connections import ConnectionLimits
from worldlm_ray.tensors.layout import make_layout

LAYOUT = make_layout([("body.weight", (5_000,))], [], layers=0)
LEAF = 4_096
LIMITS = ConnectionLimits(look_s=0.02, of_member=8, strangers=8, strangers_of_address=4)
"""Few connections, and a product's patience: a machine that stalls closes none of them."""
VALUES = np.random.default_rng(1).normal(size=LAYOUT.size).astype(np.float32) / 100
BODY = VALUES.tobytes()
DIGESTS = [wire.leaf_digest(BODY[at : at + LEAF]) for at in range(0, len(BODY), LEAF)]
HEX = b"".join(DIGESTS).hex()


def at_a_border(folder: Path, *, limits: ConnectionLimits = LIMITS, **changes: Any) -> Any:
    node = a_node(layout=LAYOUT, initial=np.zeros(LAYOUT.size, np.float32), children=("a", "b"))
    return a_border(folder, NodeAsParent(node), LAYOUT, leaf=LEAF, limits=limits, **changes)


def an_update(sender: str = "a", seq: int = 1) -> Update:
    return Update(sender=sender, seq=seq, base_version=0, tokens=10, started_tokens=10, values=VALUES)


def a_push(sender: str = "a", seq: int = 1, **changes: Any) -> bytes:
    """The body of a push of the update that `staged` stages."""
    fields: dict[str, Any] = {"incarnation": 1, "to": 1, "seq": seq, "codec": "fp32", "digest": wire.digest_of(DIGESTS)}
    return wire.packed(wire.Push(**(fields | {"header": pack_header(an_update(sender, seq), LAYOUT)} | changes)))


async def joined(border: Border, context: ssl.SSLContext | None = None) -> ByHand:
    peer = await by_hand(border, context=context)
    await peer.ask("POST", "/v1/join", wire.packed(wire.Join(incarnation=1, seq=0)))
    return peer


async def staged(peer: ByHand, seq: int = 1) -> None:
    found = await peer.ask("PUT", f"/v1/up/1/{seq}/fp32/0", BODY, Leaf_Digests=HEX)
    assert found.status == 204


async def all_is_well(border: Border) -> None:
    """A member is served as ever, and nothing that was refused has reached the parent."""
    assert border.parent.accepted == []
    link = border.link("world/b")
    await link.join("b", 1, 0)
    assert (await link.push("b", 1, 1, pack_header(an_update("b"), LAYOUT), VALUES)).accepted
