"""A parent's model is checked before it is taken: a child whose parent is broken, or lies, goes on with its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.nodes import a_node, begun
from support.worlds import client, two_levels

from worldlm_ray.aggregation.events import Command, Exchange, Joined, Note, ParentModel, Pull, Push, Serve
from worldlm_ray.aggregation.node import Node
from worldlm_ray.aggregation.serving import Serving
from worldlm_ray.client.client import Client
from worldlm_ray.config.federated import AggregationConfig, MergeConfig
from worldlm_ray.config.schema import BudgetConfig
from worldlm_ray.errors import ConfigError, MessageError
from worldlm_ray.exchange.limits import LARGEST_NORM, MOST_SKIPPED
from worldlm_ray.exchange.messages import Model, Pulled, Update, pack
from worldlm_ray.exchange.parent import Gate, check_model
from worldlm_ray.plan import build
from worldlm_ray.plan.plan import Plan
from worldlm_ray.records import LifeRecord, Record
from worldlm_ray.simulation.simulator import Simulation
from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.tensors.layout import Layout
from worldlm_ray.tracking.tracker import Tracker

UNREADABLE = MessageError("malformed", "the header is not msgpack")


def a_model(values: Flat, **changes: Any) -> Model:
    fields: dict[str, Any] = {"version": 1, "progress": 0.5, "finished": False, "tokens": 10.0, "last_seq": 0}
    return Model(**fields | {"values": values} | changes)


def warnings(records: list[Any]) -> list[str]:
    return [record.detail for record in records if isinstance(record, LifeRecord) and record.event == "warning"]


# ---- the check itself ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        ({"values": math.nan}, "not_finite"),
        ({"values": -math.inf}, "not_finite"),
        ({"values": LARGEST_NORM * 10}, "not_finite"),
        ({"values": 3.0e38}, "not_finite"),
        ({"last_seq": 8 + MOST_SKIPPED}, "implausible_seq"),
        ({"last_seq": 3, "durable_seq": 4}, "implausible_seq"),
        ({"values": 200.0}, "step_exceeded"),
    ],
)
def test_a_lie_is_refused_by_name(layout: Layout, lie: dict[str, Any], reason: str) -> None:
    own = np.arange(1, layout.size + 1, dtype=np.float32)
    values = own.copy()
    values[1] = lie.pop("values", values[1])
    with pytest.raises(MessageError) as caught:
        check_model(a_model(values, **lie), layout, seq=7, own=own, max_step=10.0)
    assert caught.value.reason == reason
    assert "\n" not in str(caught.value)


def test_the_step_is_measured_in_multiples_of_the_own_model(layout: Layout) -> None:
    own = np.arange(1, layout.size + 1, dtype=np.float32)
    model = a_model(1.5 * own)
    check_model(model, layout, seq=0, own=own, max_step=0.501)
    with pytest.raises(MessageError, match=r"^step_exceeded: it lies 0\.5 times .*max_model_step 0\.499$"):
        check_model(model, layout, seq=0, own=own, max_step=0.499)
    check_model(model, layout, seq=0, own=None, max_step=0.499)  # a newcomer has no model yet


def test_a_parent_whose_models_are_refused_or_unreadable_is_warned_of_once_until_one_is_taken(layout: Layout) -> None:
    own = np.arange(1, layout.size + 1, dtype=np.float32)
    gate = Gate("world/f", layout, max_step=0.5)
    far, near = a_model(3.0 * own), a_model(own)
    models = [UNREADABLE, far, far, UNREADABLE, near, far, UNREADABLE, near, UNREADABLE]
    said = [gate.refusal(model, seq=0, own=own, now_s=0.0) is not None for model in models]
    assert said == [True, False, False, False, False, True, False, False, True]


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_step_that_lets_no_model_in_is_refused(tiny: Callable[..., Plan], value: float) -> None:
    with pytest.raises(ConfigError, match=r"^merge\.max_model_step: "):
        tiny(merge={"max_model_step": value})


# ---- a client --------------------------------------------------------------------------------------------------------


@pytest.fixture
def plan(tiny: Callable[..., Plan]) -> Plan:
    return tiny(budget={"rounds": 9}, merge={"max_model_step": 0.5})


@pytest.fixture
def one(plan: Plan) -> Client:
    """A client after its first round."""
    made = Client(plan, plan.root.clients[0])
    made.begin(a_model(build.initial(plan), version=0), now_s=0.0)
    made.train()
    made.update()
    return made


@pytest.mark.parametrize("kind", ["nan", "far away", "no model", "lying about seq"])
def test_a_client_goes_on_with_its_own_model(one: Client, plan: Plan, kind: str) -> None:
    own, before = one.trainer.read(), one.base_version
    broken: dict[str, Pulled] = {
        "nan": a_model(np.full(plan.layout.size, np.nan, np.float32)),
        "far away": a_model(own + np.float32(10.0)),
        "no model": UNREADABLE,
        "lying about seq": a_model(own, last_seq=2**52),
    }
    records = one.begin(broken[kind], now_s=1.0)
    assert one.began
    assert one.trainer.read().tobytes() == own.tobytes()
    assert (one.base_version, one.seq, one.round) == (before, 1, 1)
    [said] = warnings(records)
    assert "refuses the model of its parent world/north (" in said
    one.train()
    update = one.update()
    split = plan.layout.backbone_size
    change = one.trainer.read() - own
    assert change[split:].any()
    assert np.allclose(update.values, change), "the round before is in no update again, key layers included"
    assert one.begin(broken[kind], now_s=2.0) == []  # it was said, and a round has begun
    one.train()
    one.update()
    assert not warnings(one.begin(a_model(one.trainer.read(), version=7), now_s=3.0))
    assert one.base_version == 7


def test_a_client_that_has_diverged_waits_for_a_model_that_can_be_taken(one: Client, plan: Plan) -> None:
    one.start_over = True
    one.begin(a_model(np.full(plan.layout.size, np.inf, np.float32)), now_s=1.0)
    assert one.start_over
    one.train()
    one.update()
    one.begin(a_model(build.initial(plan) * np.float32(3.0)), now_s=2.0)
    assert not one.start_over
    assert one.trainer.read().tobytes() == (build.initial(plan) * np.float32(3.0)).tobytes()


def test_an_exchange_that_brings_a_broken_model_in_mid_round_changes_nothing(
    tiny: Callable[..., Plan], tmp_path: Path
) -> None:
    plan = tiny([client("a", tmp_path, 1), client("b", tmp_path, 2)], exchange={"overlap": True})
    one = Client(plan, plan.root.clients[0])
    one.begin(a_model(build.initial(plan), version=0), now_s=0.0)
    one.train()
    one.update()
    one.begin_ahead()
    asked = iter([False, True])
    one.train(lambda: next(asked))
    own, base = one.trainer.read(), one.link.anchor.copy()
    [said] = warnings(one.merge(a_model(np.full(plan.layout.size, np.nan, np.float32)), now_s=1.0))
    assert "not_finite" in said
    assert (one.step, one.in_flight, one.began) == (1, None, True)
    assert one.trainer.read().tobytes() == own.tobytes()
    one.train()
    change = one.trainer.read() - base
    assert np.allclose(one.update().values, change), "key layers, too, are measured from what was pushed"


# ---- a federation ----------------------------------------------------------------------------------------------------


def a_federation(layout: Layout, **merge: Any) -> Node:
    found = a_node(
        path="world/f",
        children=("a",),
        aggregation=AggregationConfig(),
        merge=MergeConfig(**({"max_model_step": 0.5} | merge)),
        has_parent=True,
        layout=layout,
        initial=np.arange(1, layout.size + 1, dtype=np.float32),
        budget=BudgetConfig(rounds=9),
    )
    found.handle(Joined(child="a", now_s=0.0))
    return found


def a_round(node: Node, seq: int) -> list[Command]:
    values = np.full(node.layout.size, 0.01, np.float32)
    update = Update(sender="a", seq=seq, base_version=node.version, tokens=5, started_tokens=5, values=values)
    return node.handle(Push(sender="a", packed=pack(update, node.layout), now_s=1.0))


def noted(commands: list[Command]) -> list[Record]:
    return [command.record for command in commands if isinstance(command, Note)]


@pytest.mark.parametrize("kind", ["nan", "far away", "no model"])
def test_a_federation_goes_on_with_its_own_model_and_asks_again(layout: Layout, kind: str) -> None:
    node = a_federation(layout)
    a_round(node, 1)
    first = begun(node)
    own = node.theta
    broken: dict[str, Pulled] = {
        "nan": a_model(np.full(layout.size, np.nan, np.float32)),
        "far away": a_model(own * np.float32(2.0)),
        "no model": UNREADABLE,
    }
    records = noted(node.handle(ParentModel(model=broken[kind], now_s=2.0)))
    assert node.theta is own
    assert (node.in_flight, node.parent.is_open, node.parent.base_version) == (None, False, 0)
    [said] = warnings(records)
    assert "refuses the model of its parent world (" in said
    served = node.handle(Pull(child="a", started_tokens=5, now_s=3.0))
    assert [command.model.values is own for command in served if isinstance(command, Serve)] == [True]
    assert any(isinstance(command, Exchange) for command in a_round(node, 2))
    second = begun(node)
    assert np.allclose(second.values, first.values), "key layers, too, are measured from what was pushed"
    node.handle(ParentModel(model=a_model(node.theta + np.float32(0.1), version=4), now_s=4.0))
    assert node.parent.base_version == 4


def test_key_layers_that_rest_move_the_world_once_whatever_the_parent_brings(layout: Layout, tmp_path: Path) -> None:
    """A federation's key layers move by 0.01 in its first round, then rest; it cannot read any model of its parent."""
    node, split = a_federation(layout), layout.backbone_size
    a_round(node, 1)
    world = node.parent.parent_keys + begun(node).values[split:]
    for seq in range(2, 5):
        node.handle(ParentModel(model=UNREADABLE, now_s=float(seq)))
        again = a_federation(layout)
        again.restore(*node.state())  # what is remembered outlives a restart
        node = again
        still = np.zeros(layout.size, np.float32)
        message = Update(sender="a", seq=seq, base_version=node.version, tokens=5, started_tokens=5, values=still)
        node.handle(Push(sender="a", packed=pack(message, layout), now_s=float(seq)))
        world = world + begun(node).values[split:]
    assert np.allclose(world, node.theta[split:])


def test_children_of_a_newcomer_whose_parent_is_broken_are_served_all_the_same(layout: Layout) -> None:
    node = a_federation(layout)
    node.parent.wants_refresh = True
    node.handle(Pull(child="a", started_tokens=5, now_s=1.0))
    commands = node.handle(ParentModel(model=a_model(np.full(layout.size, np.nan, np.float32)), now_s=2.0))
    assert [command.model.version for command in commands if isinstance(command, Serve)] == [0]


def test_a_federation_counts_on_from_what_the_parent_of_a_refused_model_knows(layout: Layout) -> None:
    node = a_federation(layout)
    far = node.theta * np.float32(3.0)
    records = noted(node.handle(ParentModel(model=a_model(far, last_seq=7), now_s=2.0)))
    assert any("has forgotten 7 of its updates" in said for said in warnings(records))
    assert any("step_exceeded" in said for said in warnings(records))
    a_round(node, 1)
    assert begun(node).seq == 8
    node.handle(ParentModel(model=a_model(far, last_seq=2**52), now_s=3.0))
    assert node.seq == 8, "what is not believed is not counted on from"


def test_a_parent_that_says_it_has_aggregated_no_tokens_leaves_the_own_key_layers(layout: Layout) -> None:
    node = a_federation(layout)
    own = node.theta
    node.handle(ParentModel(model=a_model(own * np.float32(1.1), tokens=0.0), now_s=2.0))
    assert node.theta[layout.backbone_size :] == pytest.approx(own[layout.backbone_size :])
    assert node.theta[0] == pytest.approx(1.1 * own[0])


# ---- a run -----------------------------------------------------------------------------------------------------------


class Broken(Serving):
    """Gives NaN to a world's children, always."""

    def model(self, child: str, *, incarnation: int) -> Model:
        given = super().model(child, incarnation=incarnation)
        return replace(given, values=np.full_like(given.values, np.nan), version=max(given.version, 1))


def test_a_simulated_world_bears_a_broken_root(
    tiny: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tiny([*two_levels(tmp_path)[:1], client("c", tmp_path, 5)], budget={"rounds": 2})
    tracker = Tracker(plan.run_dir, kinds=plan.kinds, hparams=plan.hparams(), budget=plan.config.budget)
    records: list[Record] = []
    simulation = Simulation(plan, tracker, on_record=records.append)
    monkeypatch.setattr(simulation.nodes["world"].serving, "__class__", Broken)
    assert simulation.run() == "finished"
    tracker.close()
    assert all(np.isfinite(each.trainer.read()).all() for each in simulation.clients.values())
    assert np.isfinite(simulation.nodes["world/north"].theta).all()
    refusing = {record.node for record in records if isinstance(record, LifeRecord) and record.event == "warning"}
    assert refusing == {"world/north", "world/c"}
    assert {each.round for each in simulation.clients.values()} == {2}
