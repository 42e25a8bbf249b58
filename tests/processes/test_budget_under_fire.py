"""A privacy budget holds however often the client that spends it is killed."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.nodes import pulled
from support.worlds import client

from worldlm_ray.client.client import Client
from worldlm_ray.plan import build
from worldlm_ray.plan.plan import Plan
from worldlm_ray.storage import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.alone]
Tiny = Callable[..., Plan]
KILLS = 20


def live(plan: Plan, place: Path) -> None:
    """A client's life as its actor leads it: continue from the checkpoint, train round by round, save."""
    one = Client(plan, plan.root.clients[0])
    found = checkpoint.load(place)
    if found is not None:
        one.restore(*found)
    initial = pulled(build.initial(plan), 0, tokens=0.0)
    while one.began or not one.is_done:
        if not one.began:
            one.begin(initial, now_s=0.0)
        one.train()
        one.update()
        checkpoint.save(place, *one.state())


def test_a_budget_of_three_holds_over_twenty_kills(tiny: Tiny, tmp_path: Path) -> None:
    privacy = {"unit": "record", "target_epsilon": 3.0, "noise_multiplier": 2.0, "grad_sample_mode": "hooks"}
    private = client("a", tmp_path, 1, privacy=privacy, training={"batch_size": 40, "local_steps": 2})
    plan = tiny([private], budget={"rounds": 100_000})
    place = tmp_path / "checkpoints"
    # Forked from a server that has imported everything and done nothing: a life begins within a tenth of a second.
    context, chance = multiprocessing.get_context("forkserver"), random.Random(0)
    context.set_forkserver_preload(["worldlm_ray.client.client", "worldlm_ray.training.private", "opacus.accountants"])
    accounts = Client(plan, plan.root.clients[0]).account
    assert accounts is not None
    killed_while_training = 0
    for _ in range(KILLS):
        process = context.Process(target=live, args=(plan, place), daemon=True)
        process.start()
        assert process.pid is not None
        time.sleep(chance.uniform(0.02, 0.4))
        killed_while_training += process.is_alive()
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert accounts.epsilon() <= 3.0
    assert killed_while_training == KILLS, "the budget was spent before the last kill: nothing was tested"
    process = context.Process(target=live, args=(plan, place), daemon=True)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert 2.9 < accounts.epsilon() <= 3.0
    found = checkpoint.load(place)
    assert found is not None
    assert len(accounts.ledger.entries()) >= found[0]["round"]
