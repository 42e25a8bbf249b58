"""A session at a border of which both sides keep receipts, and what each proves by the other one's file."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np

from support.borders import Border, a_border, run
from support.nodes import a_node
from support.trails import TrailedParent
from worldlm_ray.exchange.messages import Update, pack_header
from worldlm_ray.exchange.replies import Verdict
from worldlm_ray.gateway.link import Link
from worldlm_ray.gateway.receipts import FOLDER, run_id
from worldlm_ray.reports import receipts
from worldlm_ray.tensors.layout import make_layout

LAYOUT = make_layout([("body.weight", (1_000,))], [], layers=0)
Work = Callable[[Border], Coroutine[Any, Any, None]]


def a_parent(folder: Path, *, every: int = 1) -> TrailedParent:
    node = a_node(layout=LAYOUT, initial=np.zeros(LAYOUT.size, np.float32), children=("a", "b"))
    return TrailedParent(node, folder / "run", every=every)


def at_a_border(folder: Path, work: Work, *, every: int = 1) -> None:
    async def do() -> None:
        parent = a_parent(folder, every=every)
        options = {"sealed": True, "run": run_id(folder / "run" / FOLDER)}
        async with a_border(folder, parent, LAYOUT, **options) as border:
            await work(border)

    run(do())


async def push(
    link: Link, seq: int, *, to: int = 1, incarnation: int = 1, sender: str = "a", content: int = 0
) -> Verdict:
    values = np.random.default_rng(content or seq).normal(size=LAYOUT.size).astype(np.float32) / 100
    fields = {"sender": sender, "seq": seq, "base_version": 0, "tokens": 10, "started_tokens": 10 * seq}
    return await link.push(sender, incarnation, to, pack_header(Update(**fields, values=values), LAYOUT), values)


def at_world(folder: Path, name: str = "a") -> Path:
    return folder / "run" / FOLDER / "received" / "world" / f"{name}.jsonl"


def at_member(folder: Path, name: str = "a") -> Path:
    return folder / f"run-{name}" / FOLDER / "sent" / "world" / f"{name}.jsonl"


def both(folder: Path) -> tuple[receipts.Border, receipts.Border]:
    """What the world proves by the member's file, and the member by the world's."""
    return receipts.look(folder / "run", [at_member(folder)]), receipts.look(folder / "run-a", [at_world(folder)])


def three_updates(folder: Path) -> None:
    async def work(border: Border) -> None:
        link = border.sealed_link()
        await link.join("a", 1, 0)
        for seq in (1, 2, 3):
            assert (await push(link, seq)).accepted

    at_a_border(folder, work)
