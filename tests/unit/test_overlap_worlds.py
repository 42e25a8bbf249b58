"""Rounds that begin before the exchange of the one before has come back, in simulated worlds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.drift import Drift, drifting
from support.worlds import TINY_MODEL, client

from worldlm_ray.client.client import Client
from worldlm_ray.exchange.messages import Model
from worldlm_ray.plan.plan import Plan
from worldlm_ray.records import LifeRecord, Record, RoundRecord, VerdictRecord
from worldlm_ray.simulation.simulator import Simulation

Tiny = Callable[..., Plan]
OVERLAP = {"overlap": True}
ROUND_TOKENS = 4 * 4 * 16
LINK = {"tokens_per_s": ROUND_TOKENS / 2.0, "latency_s": 0.2}
"""A round takes 2 s, an exchange 0.8 s and a little."""


# ---- simulated worlds ------------------------------------------------------------------------------------------


def run(plan: Plan, **settings: Any) -> tuple[Simulation, list[Record]]:
    records: list[Record] = []

    class Records:
        def record(self, *found: Record) -> None:
            records.extend(found)

    simulation = Simulation(plan, Records(), **settings)  # type: ignore[arg-type]
    assert simulation.run() == "finished"
    return simulation, records


def all_arrives(simulation: Simulation) -> None:
    """Every token that was trained is in the world's model, once."""
    trained = sum(each.round * each.round_tokens for each in simulation.clients.values())
    assert simulation.nodes["world"].published.tokens == trained
    assert all(each.tokens == each.round * each.round_tokens for each in simulation.clients.values())


@pytest.mark.parametrize("merge", [1.0, 0.5, "validated"])
def test_where_exchanges_take_no_time_nothing_changes(tiny: Tiny, merge: Any) -> None:
    at_once = {"latency_s": 0.0, "bandwidth_gbps": 1e300, "tokens_per_s": 256.0}
    found = []
    for overlap in (False, True):
        plan = tiny(exchange={"overlap": overlap}, simulation=at_once, merge={"client": merge}, budget={"rounds": 3})
        simulation, _ = run(plan)
        found.append((simulation.nodes["world"].theta.tobytes(), simulation.now_s))
    assert found[0] == found[1]


def test_an_exchange_that_is_shorter_than_a_round_is_hidden(tiny: Tiny, tmp_path: Path) -> None:
    ends, busy = [], []
    for overlap in (False, True):
        plan = tiny(
            [client("a", tmp_path, 1, simulation=LINK), client("b", tmp_path, 2, simulation=LINK)],
            exchange={"overlap": overlap},
            budget={"rounds": 6},
        )
        simulation, records = run(plan)
        all_arrives(simulation)
        assert [r.round for r in records if isinstance(r, RoundRecord) and r.node == "world/a"] == [1, 2, 3, 4, 5, 6]
        ends.append(simulation.now_s)
        busy.append([r.busy_fraction for r in records if isinstance(r, RoundRecord)][-1])
    assert ends[0] - ends[1] == pytest.approx(5 * 0.8, rel=0.05), "of six exchanges the last one is waited for"
    assert busy[0] < 0.75
    assert busy[1] > 0.95


def test_an_exchange_that_is_longer_than_a_round_is_waited_for(tiny: Tiny, tmp_path: Path) -> None:
    slow = LINK | {"latency_s": 1.0}  # an exchange of 4 s, rounds of 2 s
    plan = tiny([client("a", tmp_path, 1, simulation=slow)], exchange=OVERLAP, budget={"rounds": 4})
    simulation, records = run(plan)
    all_arrives(simulation)
    heard = [record for record in records if isinstance(record, VerdictRecord)]
    assert [(record.seq, record.base_version, record.tau) for record in heard] == [(n, n - 1, 0) for n in range(1, 5)]
    # The first pull, a round, three exchanges, the last push and the final message, each with its answer.
    assert simulation.now_s == pytest.approx(2.0 + 2.0 + 3 * 4.0 + 2.0 + 2.0, rel=0.01)


def test_the_arrival_says_after_how_many_steps(tiny: Tiny, tmp_path: Path) -> None:
    plan = tiny([client("a", tmp_path, 1, simulation=LINK)], exchange=OVERLAP, budget={"rounds": 3})
    asked: list[int] = []

    class Watched(Client):
        def merge(self, model: Model, *, now_s: float) -> list[Record]:
            asked.append(self.step)
            return super().merge(model, now_s=now_s)

    run(plan, make_client=Watched)
    assert asked == [2, 2], "0.8 s and a little are within the second of four steps of 0.5 s"


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_the_seed_decides_the_bits(tiny: Tiny, codec: str) -> None:
    plan = tiny(
        exchange=OVERLAP | {"codec": codec}, simulation=LINK, merge={"client": "validated"}, budget={"rounds": 3}
    )
    other = replace(plan, config=replace(plan.config, seed=1))
    hashes = [run(each)[0].nodes["world"].theta.tobytes() for each in (plan, plan, other)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_budget_in_tokens_is_spent_to_the_round(tiny: Tiny, tmp_path: Path) -> None:
    children = [client("fast", tmp_path, 1, simulation=LINK | {"tokens_per_s": 512.0}), client("slow", tmp_path, 2)]
    children[1]["simulation"] = LINK
    plan = tiny(children, exchange=OVERLAP, budget={"tokens": 10 * ROUND_TOKENS + 1})
    simulation, _ = run(plan)
    all_arrives(simulation)
    assert simulation.nodes["world"].published.tokens == 11 * ROUND_TOKENS


def test_a_round_that_has_begun_is_finished_when_time_is_up(tiny: Tiny, tmp_path: Path) -> None:
    plan = tiny([client("a", tmp_path, 1, simulation=LINK)], exchange=OVERLAP, budget={"seconds": 9.0})
    simulation, _ = run(plan)
    all_arrives(simulation)
    # Rounds end every 2 s; that which began before the end is told of it while it goes on, and is the last.
    assert simulation.clients["world/a"].round == 6


class Diverging(Drift):
    """Diverges once."""

    broken = False

    def run(self, *arguments: Any, **named: Any) -> Any:
        result = super().run(*arguments, **named)
        if self.steps >= 6 and not self.broken:
            self.broken = True
            self.theta[:] = np.nan
        return result


def test_a_world_bears_a_client_that_diverges(tiny: Tiny) -> None:
    plan = tiny(exchange=OVERLAP, simulation=LINK, budget={"rounds": 5}, model=TINY_MODEL | {"key_layers": []})

    def made(plan: Plan, spec: Any, **settings: Any) -> Client:
        if spec.name != "a":
            return drifting(plan, spec, **settings)
        return Client(plan, spec, make_trainer=lambda _: Diverging(plan.layout.size, 1.0), **settings)

    simulation, records = run(plan, make_client=made)
    verdicts = [r.verdict for r in records if isinstance(r, VerdictRecord) and r.sender == "a"]
    assert verdicts.count("not_finite") == 1, "the round after it, trained from the same model, is not even sent"
    assert {each.round for each in simulation.clients.values()} == {5}
    assert np.isfinite(simulation.nodes["world"].theta).all()
    assert np.isfinite(simulation.clients["world/north/a"].trainer.read()).all()


def test_a_client_whose_privacy_is_spent_follows_from_what_it_pushed_last(tiny: Tiny, tmp_path: Path) -> None:
    private = {"unit": "record", "noise_multiplier": 1.0, "target_epsilon": 3.0, "delta": 1e-5}
    children = [
        client("a", tmp_path, 1, privacy=private | {"on_exhausted": "pause"}, training={"batch_size": 40}),
        client("b", tmp_path, 2, simulation=LINK),
    ]
    plan = tiny(children, exchange=OVERLAP, budget={"rounds": 30}, run_dir=str(tmp_path / "private"))
    simulation, records = run(plan)
    spent = simulation.clients["world/a"]
    assert spent.account is not None
    assert spent.is_exhausted
    assert 0 < spent.round < 30
    assert len(spent.account.ledger.entries()) == spent.round, "no round that was paid for was left out"
    assert any(isinstance(r, LifeRecord) and (r.node, r.event) == ("world/a", "paused") for r in records)
    assert spent.base_version > spent.round, "it goes on taking its parent's model"
    assert spent.in_flight is None
    all_arrives(simulation)


def test_a_private_client_pays_before_every_round(tiny: Tiny, tmp_path: Path) -> None:
    private = {"unit": "record", "noise_multiplier": 1.0, "target_epsilon": 1e6, "grad_sample_mode": "hooks"}
    plan = tiny(
        [client("a", tmp_path, 1, privacy=private, simulation=LINK)],
        exchange=OVERLAP,
        budget={"rounds": 3},
        run_dir=str(tmp_path / "private"),
    )
    order: list[str] = []

    class Watched(Client):
        def train(self, should_stop: Any = lambda: False) -> float:
            assert self.account is not None
            order.append(f"{len(self.account.ledger.entries())} paid for round {self.round + 1}")
            return super().train(should_stop)

    simulation, _ = run(plan, make_client=Watched)
    assert order == [f"{n} paid for round {n}" for n in (1, 2, 2, 3, 3)]
    account = simulation.clients["world/a"].account
    assert account is not None
    assert [entry["steps"] for entry in account.ledger.entries()] == [4, 4, 4]
