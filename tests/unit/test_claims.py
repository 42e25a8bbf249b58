"""What one child says of itself: a lie is refused or bounded, and the other children's work counts as before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from support.nodes import a_node, begun
from support.worlds import client

from worldlm_ray.aggregation.events import Answer, Done, Event, Heartbeat, Joined, Note, ParentModel, Pull, Push
from worldlm_ray.aggregation.node import Node
from worldlm_ray.client.client import Client
from worldlm_ray.config.federated import AggregationConfig, MergeConfig, ResidualsConfig
from worldlm_ray.config.schema import BudgetConfig
from worldlm_ray.errors import MessageError
from worldlm_ray.exchange.limits import HEADER_BYTES, LARGEST_COUNT, MOST_RESTARTS, MOST_SKIPPED
from worldlm_ray.exchange.messages import Packed, Residual, Update, pack, read_header
from worldlm_ray.exchange.outbox import Outbox
from worldlm_ray.exchange.quota import Quota, Quotas
from worldlm_ray.exchange.replies import ACCEPTED, Verdict, Welcome, believed, checked_verdict
from worldlm_ray.plan import build
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.quotas import ROUNDS_APART
from worldlm_ray.records import LifeRecord
from worldlm_ray.simulation.simulator import Simulation
from worldlm_ray.tensors.layout import Layout
from worldlm_ray.tracking.tracker import Tracker

ROUND = 100
"""Tokens of a local round of either client."""
TRILLION = 10**12


@pytest.fixture
def node(layout: Layout) -> Node:
    return small_node(layout)


def small_node(layout: Layout, *, parent: bool = False, **rules: Any) -> Node:
    quota = Quota(update_tokens=ROUND, started_tokens=ROUND, residuals=1)
    own = Quota(update_tokens=3 * ROUND, started_tokens=4 * ROUND) if parent else None
    found = a_node(
        path="world/f" if parent else "world",
        children=("a", "b"),
        aggregation=AggregationConfig(**({"residuals": ResidualsConfig(per_round=1)} | rules)),
        merge=MergeConfig(),
        has_parent=parent,
        layout=layout,
        initial=np.arange(layout.size, dtype=np.float32),
        budget=BudgetConfig(tokens=1_000_000),
        quotas=Quotas(own=own, children={"a": quota, "b": quota}),
    )
    for child in ("a", "b"):
        found.handle(Joined(child=child, now_s=0.0))
    return found


def update(node: Node, seq: int = 1, **changes: Any) -> Update:
    fields: dict[str, Any] = {
        "sender": "a",
        "seq": seq,
        "base_version": node.version,
        "tokens": ROUND,
        "started_tokens": seq * ROUND,
        "values": np.full(node.layout.size, 0.01, np.float32),
    }
    return Update(**fields | changes)


def push(node: Node, message: Update) -> str:
    commands = node.handle(Push(sender=message.sender, packed=pack(message, node.layout), now_s=1.0))
    [reason] = [command.verdict.reason for command in commands if isinstance(command, Answer)]
    return reason


# ---- tokens --------------------------------------------------------------------------------------------------------


def test_more_tokens_than_a_round_has_are_refused_by_name(node: Node) -> None:
    before = node.theta
    commands = node.handle(Push(sender="a", packed=pack(update(node, tokens=10**15), node.layout), now_s=1.0))
    [verdict] = [command.verdict for command in commands if isinstance(command, Answer)]
    assert verdict.reason == "too_many_tokens"
    assert str(10**15) in verdict.detail
    assert f"at most {ROUND}" in verdict.detail
    assert node.theta is before
    assert node.children["a"].last_seq == 0
    assert push(node, update(node)) == ACCEPTED


def test_a_weight_in_a_sum_is_no_more_than_the_tokens_of_a_round(node: Node) -> None:
    assert push(node, update(node, weight=10**15)) == "too_many_tokens"
    assert push(node, update(node, weight=ROUND, values=np.full(node.layout.size, 1e12, np.float32))) == "norm_exceeded"
    assert push(node, update(node, weight=ROUND)) == ACCEPTED


def test_a_residual_has_no_more_tokens_than_its_update_may_have_and_comes_from_below_its_sender(node: Node) -> None:
    layer = node.layout.key_layers[0]
    values = np.zeros(layer.stop - layer.start, np.float32)
    one = Residual(origin="world/a", layer=layer.name, tokens=ROUND, age=1, values=values)
    for residual, reason in (
        (replace(one, tokens=1e12), "too_many_tokens"),
        (replace(one, origin="world/b"), "wrong_origin"),
        (replace(one, origin="world/ab"), "wrong_origin"),
        (replace(one, origin="world/a/deeper"), ACCEPTED),
    ):
        assert push(node, update(node, residuals=(residual,))) == reason


def test_a_federation_claims_no_more_than_its_quota_and_keeps_the_rest_for_the_next_update(layout: Layout) -> None:
    node = small_node(layout, parent=True, push_every=5)
    commands = [
        command
        for seq in range(1, 6)
        for command in node.handle(Push(sender="a", packed=pack(update(node, seq), layout), now_s=1.0))
    ]
    assert "500 tokens have gathered" in warnings(commands)[0].detail
    assert begun(node).tokens == 3 * ROUND
    model = node.serving.model("a", incarnation=1)
    node.handle(ParentModel(model=model, now_s=1.0))
    for seq in range(6, 11):
        push(node, update(node, seq))
    assert begun(node).tokens == 3 * ROUND
    assert node.parent.unpushed_tokens == 4 * ROUND


def test_a_child_that_goes_on_under_a_smaller_round_claims_no_more_than_that() -> None:
    outbox = Outbox()
    outbox.add(Update(sender="a", seq=1, base_version=0, tokens=90, started_tokens=90, values=np.zeros(1, np.float32)))
    outbox.limit_tokens(40)
    assert [kept.tokens for kept in outbox.after(0)] == [40]


def test_the_plan_gives_a_client_one_round_and_a_federation_what_is_below_it(tiny: Callable[..., Plan]) -> None:
    plan = tiny(budget={"seconds": 5.0})
    world = build.inner_node(plan, plan.root, build.initial(plan))
    north = build.inner_node(plan, plan.node("world/north"), build.initial(plan))
    one = plan.round_tokens(plan.node("world/north/a"))
    assert north.children.quotas["a"] == Quota(update_tokens=one, started_tokens=one)
    assert world.children.quotas["north"] == Quota(update_tokens=ROUNDS_APART * 2 * one, started_tokens=4 * one)
    assert (north.to_parent.quota, world.parent) == (world.children.quotas["north"], None)


@pytest.mark.parametrize("timed", ["world/north", "world/north/deep"])
@pytest.mark.parametrize(("budget", "most"), [({"tokens": 10**9}, 10**9), ({"seconds": 5.0}, LARGEST_COUNT)])
def test_a_federation_with_time_up_claims_as_many_short_rounds_as_there_were(
    tiny: Callable[..., Plan], tmp_path: Path, timed: str, budget: dict[str, Any], most: int
) -> None:
    """A window holds any number of rounds; what could not be claimed would be trained and never counted."""
    rules = {"aggregation": {"trigger": "time_up", "time_up_s": 30.0}}
    counted = {"aggregation": {"trigger": "goal_achieved", "buffer_size": 1}}
    deep = {"federation": "deep", "children": [client("a", tmp_path, 1), client("b", tmp_path, 2)]}
    north = {"federation": "north", "children": [deep | (rules if timed.endswith("deep") else counted)]}
    south = {"federation": "south", "children": [client("c", tmp_path, 3)]}
    plan = tiny([north | (counted if timed.endswith("deep") else rules), south | counted], budget=budget)
    world = build.inner_node(plan, plan.root, build.initial(plan))
    assert world.children.quotas["north"].update_tokens == most
    one = plan.round_tokens(plan.node("world/south/c"))
    assert world.children.quotas["south"].update_tokens == ROUNDS_APART * one


def test_no_update_of_a_federation_has_more_tokens_than_the_run(tiny: Callable[..., Plan]) -> None:
    plan = tiny(budget={"rounds": 3})
    world = build.inner_node(plan, plan.root, build.initial(plan))
    assert world.children.quotas["north"].update_tokens == 3 * 2 * plan.round_tokens(plan.node("world/north/a"))


# ---- rounds begun --------------------------------------------------------------------------------------------------


def warnings(commands: list[Any]) -> list[LifeRecord]:
    records = [command.record for command in commands if isinstance(command, Note)]
    return [record for record in records if isinstance(record, LifeRecord) and record.event == "warning"]


def test_a_lie_about_begun_rounds_counts_as_one_round_and_is_said_once(node: Node) -> None:
    first = node.handle(Pull(child="a", started_tokens=TRILLION, now_s=1.0))
    assert node.children["a"].started_tokens == ROUND
    [warning] = warnings(first)
    assert warning.node == "world/a"
    assert str(TRILLION) in warning.detail
    assert not warnings(node.handle(Pull(child="a", started_tokens=TRILLION, now_s=2.0)))
    assert push(node, update(node, started_tokens=TRILLION)) == ACCEPTED
    assert node.children["a"].started_tokens == 2 * ROUND


def test_an_update_that_was_refused_for_its_age_is_spent_once(layout: Layout) -> None:
    """Else a world whose clients have all diverged would never come to the end of its budget."""
    node = small_node(layout, max_staleness=0)
    assert push(node, update(node)) == ACCEPTED
    for _ in range(2):
        assert push(node, update(node, 2, base_version=0)) == "stale"
    node.handle(Pull(child="a", started_tokens=3 * ROUND, now_s=1.0))
    node.handle(Pull(child="a", started_tokens=9 * ROUND, now_s=1.0))
    assert node.children["a"].started_tokens == 3 * ROUND
    again = small_node(layout, max_staleness=0)
    again.restore(*node.state())
    assert (again.children["a"].judged_seq, again.children["a"].judged_tokens) == (2, 2 * ROUND)


def test_a_correct_child_is_counted_as_before(node: Node) -> None:
    for seq in range(1, 6):
        node.handle(Pull(child="a", started_tokens=seq * ROUND, now_s=float(seq)))
        assert node.children["a"].started_tokens == seq * ROUND
        assert push(node, update(node, seq)) == ACCEPTED


class Liar(Client):
    """A client that has begun a great many rounds, by its own word."""

    @property
    def started_tokens(self) -> int:
        return super().started_tokens + (TRILLION if self.spec.name == "a" else 0)


@pytest.mark.parametrize("trigger", ["goal_achieved", "synchronous"])
def test_a_world_with_a_lying_child_spends_its_budget(tiny: Callable[..., Plan], tmp_path: Path, trigger: str) -> None:
    children = [client("a", tmp_path, 1), client("b", tmp_path, 2)]
    plan = tiny(children, budget={"tokens": 2_048}, aggregation={"trigger": trigger})
    tracker = Tracker(plan.run_dir, kinds=plan.kinds, hparams=plan.hparams(), budget=plan.config.budget)
    simulation = Simulation(plan, tracker, make_client=Liar)
    assert simulation.run() == "finished"
    tracker.close()
    assert simulation.nodes["world"].published.tokens >= 2_048


# ---- incarnations and sequence numbers -----------------------------------------------------------------------------


def test_a_join_raises_the_incarnation_by_a_bounded_jump(node: Node) -> None:
    for lie in (2**62, 2**52, MOST_RESTARTS + 2):
        with pytest.raises(MessageError, match=r"^implausible_incarnation: a joins as"):
            node.handle(Joined(child="a", incarnation=lie, now_s=1.0))
    assert push(node, update(node)) == ACCEPTED
    node.handle(Joined(child="a", incarnation=2, now_s=1.0))
    node.handle(Joined(child="a", incarnation=2 + MOST_RESTARTS, now_s=1.0))
    assert node.children["a"].incarnation == 2 + MOST_RESTARTS


def test_a_child_that_is_readmitted_is_not_locked_out_by_the_incarnations_of_a_thief(node: Node) -> None:
    node.handle(Joined(child="a", incarnation=3, now_s=1.0))
    node.handle(Joined(child="a", incarnation=3 + MOST_RESTARTS, now_s=1.0))  # with a stolen key
    with pytest.raises(MessageError, match=r"^superseded: this is incarnation 4, and there is incarnation 1003 of a"):
        node.handle(Joined(child="a", incarnation=4, now_s=2.0))
    with pytest.raises(MessageError, match=r"^implausible_incarnation"):
        node.handle(Joined(child="a", incarnation=2**62, admission=2, now_s=2.0))
    assert node.children["a"].admission == 1  # a refusal changes nothing
    node.handle(Joined(child="a", incarnation=4, admission=2, now_s=2.0))
    assert (node.children["a"].incarnation, node.children["a"].admission) == (4, 2)
    with pytest.raises(MessageError, match=r"^superseded"):  # the same admission again fences as before
        node.handle(Joined(child="a", incarnation=3, admission=2, now_s=3.0))


def test_a_seq_from_far_ahead_does_not_make_later_updates_duplicates(node: Node) -> None:
    assert push(node, update(node, MOST_SKIPPED + 1)) == "implausible_seq"
    assert push(node, update(node, LARGEST_COUNT, started_tokens=0)) == "implausible_seq"
    assert push(node, update(node)) == ACCEPTED
    assert push(node, update(node, MOST_SKIPPED)) == ACCEPTED  # all between were refused elsewhere, or forgotten


def test_a_child_whose_updates_are_all_refused_may_count_on(layout: Layout) -> None:
    node = small_node(layout, max_update_norm=1e-9)
    for seq in range(1, 4):
        assert push(node, update(node, seq * MOST_SKIPPED)) == "norm_exceeded"


@pytest.mark.parametrize(
    ("lie", "last_seq", "durable_seq"),
    [
        ({}, 4, 2),
        ({"last_seq": 2**62}, 3, 0),
        ({"last_seq": 3 + MOST_SKIPPED + 1}, 3, 0),
        ({"durable_seq": 5}, 3, 0),
        ({"last_seq": "4"}, 3, 0),
        ({"durable_seq": -1}, 3, 0),
    ],
)
def test_a_welcome_makes_no_child_skip_or_drop_without_bound(
    lie: dict[str, Any], last_seq: int, durable_seq: int
) -> None:
    told: dict[str, Any] = {"incarnation": 1, "last_seq": 4, "durable_seq": 2} | lie
    welcome, doubt = believed(Welcome(**told), seq=3)
    assert (welcome.last_seq, welcome.durable_seq) == (last_seq, durable_seq)
    assert bool(doubt) == bool(lie)


def test_a_welcome_of_no_incarnation_is_malformed() -> None:
    with pytest.raises(MessageError, match=r"^malformed: welcome\.incarnation"):
        believed(Welcome(incarnation=None, last_seq=0, durable_seq=0), seq=0)  # type: ignore[arg-type]
    for lie in (-1, 0):
        with pytest.raises(MessageError, match=r"^malformed: welcome\.incarnation"):
            believed(Welcome(incarnation=lie, last_seq=0, durable_seq=0), seq=0)
    with pytest.raises(MessageError, match=r"^malformed: the welcome is of type NoneType$"):
        believed(None, seq=0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "lie", [{"durable_seq": "9"}, {"durable_seq": -1}, {"seq": []}, {"reason": 3}, {"detail": None}]
)
def test_a_verdict_that_is_none_is_malformed(lie: dict[str, Any]) -> None:
    fields: dict[str, Any] = {"reason": "accepted", "seq": 1, "base_version": 0, "version": 1, "tau": 0}
    assert checked_verdict(Verdict(**fields)) == Verdict(**fields)
    for found in (Verdict(**(fields | lie)), None, "accepted"):
        with pytest.raises(MessageError, match=r"^malformed: "):
            checked_verdict(found)


# ---- sizes ---------------------------------------------------------------------------------------------------------


def test_a_header_that_is_too_long_is_not_parsed(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack(update(node), node.layout)
    fields = msgpack.unpackb(packed.header) | {"metrics": {f"m{number}": 0.0 for number in range(1_000_000)}}
    header = msgpack.packb(fields)
    assert len(header) > 2**23
    monkeypatch.setattr(msgpack, "unpackb", lambda *_, **__: pytest.fail("it was parsed"))
    commands = node.handle(Push(sender="a", packed=Packed(header, packed.values), now_s=1.0))
    [verdict] = [command.verdict for command in commands if isinstance(command, Answer)]
    assert verdict.reason == "header_too_large"
    with pytest.raises(MessageError, match=rf"^header_too_large: .* at most {HEADER_BYTES}$"):
        read_header(header)


def test_a_header_has_room_for_as_many_residuals_as_the_sender_may_pass_on(node: Node) -> None:
    layer = node.layout.key_layers[0]
    values = np.zeros(layer.stop - layer.start, np.float32)
    deep = "world/a/" + "/".join(["n" * 200] * 15)
    one = Residual(origin=deep, layer=layer.name, tokens=ROUND, age=1, values=values)
    assert push(node, update(node, residuals=(one, replace(one, origin="world/a")))) == "malformed"
    assert push(node, update(node, residuals=(one,))) == ACCEPTED


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sender", "a" * 256),
        ("seq", 2**53),
        ("tokens", 2**63),
        ("started_tokens", 2**64 - 1),
        ("base_version", 2**53),
        ("base_incarnation", 2**60),
        ("codec", "fp32" * 100),
        ("residuals", [[[[[[]]]]]]),
        ("residuals", [{}] * 9),
        ("epsilon", 1.0),
        ("metrics", {}),
    ],
)
def test_a_field_is_limited(node: Node, field: str, value: Any) -> None:
    packed = pack(update(node), node.layout)
    header = msgpack.packb(msgpack.unpackb(packed.header) | {field: value})
    commands = node.handle(Push(sender="a", packed=Packed(header, packed.values), now_s=1.0))
    [verdict] = [command.verdict for command in commands if isinstance(command, Answer)]
    assert verdict.reason == "malformed"
    assert len(verdict.detail) < 300


ODD: list[Any] = [None, True, -1, 2**53, 1.5, "1", [1], {}, b"1", float("nan"), "x" * 256]


@pytest.mark.parametrize("value", ODD, ids=repr)
@pytest.mark.parametrize("name", ["child", "incarnation", "to", "seq", "started_tokens"])
def test_what_a_call_brings_beside_a_message_is_checked(node: Node, name: str, value: Any) -> None:
    given: dict[str, Any] = {"child": "a", "now_s": 1.0}
    events: dict[str, Callable[[dict[str, Any]], Event]] = {
        "child": lambda fields: Done(**fields),
        "incarnation": lambda fields: Joined(**fields),
        "to": lambda fields: Heartbeat(**fields),
        "seq": lambda fields: Joined(**fields),
        "started_tokens": lambda fields: Pull(**fields),
    }
    before = node.state()[0]
    if (name, value) in (("child", "1"), ("incarnation", 2**53)):
        return  # a name that no child has, and what is refused by another name
    with pytest.raises(MessageError, match=r"^malformed: "):
        node.handle(events[name](given | {name: value}))
    assert node.state()[0] == before
