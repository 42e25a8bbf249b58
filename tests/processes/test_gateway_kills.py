"""Either side of a border is killed at a step of the protocol: each update counts once, and the bits are the same."""

from __future__ import annotations

import asyncio
import multiprocessing
import signal
import socket
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import pytest
from support.border_processes import LAYOUT, MEMBER, ROUNDS, WORLD, a_world, an_update, member, prepare, world
from support.borders import NodeAsParent
from support.trails import CHECKPOINTS

from worldlm_ray.exchange.messages import pack_header
from worldlm_ray.gateway.receipts import FOLDER, RECEIVED, SENT
from worldlm_ray.reports import receipts
from worldlm_ray.storage import checkpoint

pytestmark = [pytest.mark.slow]

AT_THE_WORLD = [
    "before join",
    "after join",
    "after leaf",
    "before push",
    "before save",
    "after push",
    "before pull",
    "after pull",
    "after pushed",
    "after judged",
]
AT_THE_MEMBER = ["after leaf", "before push", "after push", "after pull", "after pushed", "before judged"]
BOTH = [("after pushed", "before judged")]
"""`pushed` and `judged` write receipts."""
LATE_S = 60.0


def undisturbed() -> bytes:
    """The model after all updates, without a border."""

    async def work() -> bytes:
        parent = NodeAsParent(a_world())
        for seq in range(1, ROUNDS + 1):
            update = an_update(seq, seq - 1)
            assert (await parent.push("a", 1, 1, pack_header(update, LAYOUT), update.values)).accepted
        return bytes(parent.node.theta.tobytes())

    return asyncio.run(work())


@pytest.mark.parametrize(
    ("world_point", "member_point"),
    [*((each, "") for each in AT_THE_WORLD), *(("", each) for each in AT_THE_MEMBER), *BOTH],
)
def test_a_kill_at_a_step_loses_nothing_and_counts_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world_point: str, member_point: str
) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    prepare(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start, kills = multiprocessing.get_context("spawn").Process, {"world": 0, "member": 0}

    def begin(side: str) -> multiprocessing.process.BaseProcess:
        run, point = (world, world_point) if side == "world" else (member, member_point)
        process = start(target=run, args=(tmp_path, port, point), daemon=True)
        process.start()
        return process

    alive = {side: begin(side) for side in kills}
    try:
        while alive["member"].exitcode != 0:
            ended = wait([each.sentinel for each in alive.values()], timeout=LATE_S)
            assert ended, "neither side has come to an end"
            for side, process in alive.items():
                if process.sentinel not in ended:
                    continue
                process.join()
                if process.exitcode != 0:
                    assert process.exitcode == -signal.SIGKILL, f"the {side} broke"
                    kills[side] += 1
                    alive[side] = begin(side)
    finally:
        for process in alive.values():
            process.kill()
            process.join()
    assert kills == {"world": int(bool(world_point)), "member": int(bool(member_point))}
    node = a_world()
    found = checkpoint.load(tmp_path / WORLD / CHECKPOINTS)
    assert found is not None
    node.restore(*found)
    assert node.version == ROUNDS
    assert node.covers().seqs == {"a": ROUNDS}
    assert np.frombuffer(undisturbed(), np.float32).tolist() == node.theta.tolist()
    for own, other, side in ((WORLD, MEMBER, SENT), (MEMBER, WORLD, RECEIVED)):
        border = receipts.look(tmp_path / own, [tmp_path / other / FOLDER / side / "world/a.jsonl"])
        assert border.holds, border.lines()
        assert border.proofs[0].sent == ROUNDS
