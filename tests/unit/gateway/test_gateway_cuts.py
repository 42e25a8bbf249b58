"""A line that is cut, a gateway that begins again, a disk that is full: what has arrived is not sent again."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.borders import Border, Line, NodeAsParent, a_border, run
from support.nodes import a_node

from worldlm_ray.errors import MessageError
from worldlm_ray.exchange.messages import Update, pack_header, unpack_model
from worldlm_ray.exchange.replies import Verdict
from worldlm_ray.gateway import staging
from worldlm_ray.gateway.link import Link
from worldlm_ray.tensors.layout import make_layout

LEAF = 65_536
LAYOUT = make_layout([("body.weight", (500_000,))], [], layers=0)
LEAVES = -(-LAYOUT.nbytes // LEAF)


pytestmark = pytest.mark.usefixtures("quick")


def a_parent() -> NodeAsParent:
    initial = np.random.default_rng(1).normal(size=LAYOUT.size).astype(np.float32)
    return NodeAsParent(a_node(layout=LAYOUT, initial=initial, children=("a", "b")))


def an_update(sender: str = "a", seq: int = 1) -> Update:
    values = np.random.default_rng(seq).normal(size=LAYOUT.size).astype(np.float32) / 100
    return Update(sender=sender, seq=seq, base_version=0, tokens=10, started_tokens=10, values=values)


async def push(link: Link, update: Update, *, incarnation: int = 1) -> Verdict:
    return await link.push(update.sender, incarnation, 1, pack_header(update, LAYOUT), update.values)


def cut_every(line: Line, way: str, nbytes: int, *, most: int) -> None:
    """Cut the line whenever so many more bytes have gone one way."""
    last = line.bytes[way]

    def is_due() -> bool:
        nonlocal last
        if line.cuts >= most or line.bytes[way] - last < nbytes:
            return False
        last = line.bytes[way]
        return True

    line.cut_when = is_due


@pytest.mark.parametrize("leaves", [1.5, 6.0])
def test_an_update_gets_over_a_line_that_is_cut_again_and_again(tmp_path: Path, leaves: float) -> None:
    async def work() -> None:
        async with a_border(tmp_path, a_parent(), LAYOUT, leaf=LEAF) as border:
            link = border.link(tries=8)
            await link.join("a", 1, 0)
            cut_every(border.line, "up", int(leaves * LEAF), most=1_000)
            update = an_update()
            assert (await push(link, update)).accepted
            cuts, came = border.line.cuts, border.gateway.members["world/a"].meter.up.bytes
            assert cuts >= LAYOUT.nbytes / (leaves * LEAF) - 1
            assert came - LAYOUT.nbytes <= cuts * border.settings.connections * LEAF
            assert border.parent.accepted == [("a", 1)]

    run(work())


@pytest.mark.parametrize("leaves", [1.5, 6.0])
def test_a_model_gets_over_a_line_that_is_cut_again_and_again(tmp_path: Path, leaves: float) -> None:
    async def work() -> None:
        async with a_border(tmp_path, a_parent(), LAYOUT, leaf=LEAF) as border:
            link = border.link(tries=8)
            await link.join("a", 1, 0)
            cut_every(border.line, "down", int(leaves * LEAF), most=1_000)
            model = unpack_model(await link.pull("a", 1, 1, 0), LAYOUT)
            cuts = border.line.cuts
            assert np.array_equal(model.values, border.parent.node.theta)
            assert cuts >= LAYOUT.nbytes / (leaves * LEAF) - 1
            assert link.transfer.meter.down.bytes - LAYOUT.nbytes <= cuts * border.settings.connections * LEAF

    run(work())


def count_to(count: int, then: Callable[[], None]) -> Callable[[], bool]:
    """For `Line.cut_when`: after so many pieces, once, do something; it cuts nothing itself."""
    left = count

    def step() -> bool:
        nonlocal left
        left -= 1
        if left == 0:
            then()
        return False

    return step


async def half_staged(border: Border, link: Link) -> None:
    """Push an update over a line that breaks in the middle."""
    await link.join("a", 1, 0)

    def break_down() -> None:
        border.line.is_down = True
        border.line.cut()

    last = border.line.bytes["up"]
    border.line.cut_when = lambda: border.line.bytes["up"] - last > LAYOUT.nbytes // 2 and bool(break_down()) is None
    with pytest.raises(MessageError, match="unreachable"):
        await push(link, an_update())
    border.line.cut_when, border.line.is_down = lambda: False, False


def test_a_gateway_that_begins_again_has_kept_what_was_staged(tmp_path: Path) -> None:
    async def work() -> None:
        async with a_border(tmp_path, a_parent(), LAYOUT, leaf=LEAF) as border:
            link = border.link(tries=2)
            await half_staged(border, link)
            await border.restart()
            other = border.link()  # of a member's process that begins again, too
            assert (await push(other, an_update())).accepted
            assert other.transfer.meter.up.bytes < 0.75 * LAYOUT.nbytes
            assert border.parent.accepted == [("a", 1)]

    run(work())


def test_a_file_that_was_damaged_meanwhile_is_sent_again(tmp_path: Path) -> None:
    async def work() -> None:
        async with a_border(tmp_path, a_parent(), LAYOUT, leaf=LEAF) as border:
            link = border.link(tries=2)
            await half_staged(border, link)
            [file] = border.settings.staging_dir.rglob("1-1-fp32")
            await border.gateway.stop()
            raw = bytearray(file.read_bytes())
            raw[100] ^= 1
            file.write_bytes(raw)
            await border.restart()
            local = a_parent()
            update = an_update()
            header = pack_header(update, LAYOUT)
            assert (await push(border.link(), update)).accepted
            assert (await local.push("a", 1, 1, header, update.values)).accepted
            assert np.array_equal(border.parent.node.theta, local.node.theta)

    run(work())


def test_a_new_update_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    async def work() -> None:
        async with a_border(tmp_path, a_parent(), LAYOUT, leaf=LEAF) as border:
            link = border.link(tries=2)
            await half_staged(border, link)
            await link.join("a", 2, 0)
            assert (await push(link, an_update(), incarnation=2)).accepted
            assert (await push(link, an_update(seq=2), incarnation=2)).accepted
            [file] = [file for file in border.settings.staging_dir.rglob("*") if file.is_file()]
            assert file.name == "2-2-fp32"

    run(work())


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        async with a_border(tmp_path, a_parent(), LAYOUT, leaf=LEAF) as border:
            link = border.link(tries=2)
            await link.join("a", 1, 0)

            def full(*_: Any) -> int:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            with monkeypatch.context() as patched:
                patched.setattr(staging.os, "pwrite", full)
                with pytest.raises(MessageError, match="over_quota: the staging folder is full"):
                    await push(link, an_update())
            assert border.gateway.members["world/a"].meter.refusals["over_quota"]
            assert (await push(link, an_update())).accepted

    run(work())


def test_members_share_the_room_of_the_staging_folder(tmp_path: Path) -> None:
    async def work() -> None:
        async with a_border(tmp_path, a_parent(), LAYOUT, leaf=LEAF, staging_bytes=LAYOUT.nbytes) as border:
            a, b = border.link("world/a", tries=2), border.link("world/b", tries=2)
            await half_staged(border, a)
            await b.join("b", 1, 0)
            with pytest.raises(MessageError, match=r"over_quota: .* try again later"):
                await push(b, an_update("b"))
            assert (await push(a, an_update())).accepted  # judged: its file goes when room is needed
            assert (await push(b, an_update("b"))).accepted
            assert len(list(border.settings.staging_dir.rglob("*-fp32"))) == 1

    run(work())


def test_an_update_of_another_size_is_refused_before_a_byte_goes(tmp_path: Path) -> None:
    async def work() -> None:
        async with a_border(tmp_path, a_parent(), LAYOUT, leaf=LEAF) as border:
            link, update = border.link(), an_update()
            with pytest.raises(MessageError, match="wrong_shape"):
                await link.push("a", 1, 1, pack_header(update, LAYOUT), update.values[:-1])
            assert link.transfer.meter.up.bytes == 0

    run(work())
