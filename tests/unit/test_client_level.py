"""Client-level privacy: whole updates clipped, noise on their sum, and no more of them than were paid for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.nodes import a_node
from support.worlds import client

from worldlm_ray.aggregation.events import Answer, Charge, Joined, Note, Pull, Push, Serve, Started
from worldlm_ray.aggregation.node import Node
from worldlm_ray.aggregation.private_fold import ClientPrivacy
from worldlm_ray.config.federated import AggregationConfig, MergeConfig, StalenessConfig
from worldlm_ray.config.schema import BudgetConfig, PrivacyConfig
from worldlm_ray.errors import ConfigError, PrivacyError
from worldlm_ray.exchange.messages import Update, pack
from worldlm_ray.plan import build
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.rundir import create
from worldlm_ray.privacy.contributions import Contributions
from worldlm_ray.privacy.gaussian import composed_epsilon, gaussian_epsilon, gaussian_noise, most_contributions
from worldlm_ray.records import PrivacyRecord, RoundRecord
from worldlm_ray.reports import spending
from worldlm_ray.simulation.simulator import simulate
from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.tensors.layout import Layout

Tiny = Callable[..., Plan]
START = np.array([1.0, 2.0, 3.0, 10.0, 20.0, 30.0, 40.0], np.float32)  # backbone of three, then two key layers


def node(layout: Layout, endless: BudgetConfig, **changes: Any) -> Node:
    promise: dict[str, Any] = {
        "federations": frozenset({"f"}),
        "bound": 1.0,
        "noise": 0.0,
        "delta": 1e-5,
        "limits": {},
        "expected": 2,
        "generator": np.random.default_rng(0),
    }
    rules = changes.pop("rules", {"buffer_size": 2})
    contributions = changes.pop("contributions", None)
    made = a_node(
        path="world",
        children=("a", "b", "f"),
        aggregation=AggregationConfig(staleness=StalenessConfig(fn="constant"), **rules),
        merge=MergeConfig(),
        has_parent=False,
        layout=layout,
        initial=START,
        budget=endless,
        privacy=ClientPrivacy(**promise | changes),
        contributions=contributions,
    )
    for child in ("a", "b", "f"):
        made.handle(Joined(child=child, now_s=0.0))
    return made


def push(to: Node, layout: Layout, sender: str, values: list[float], *, seq: int = 1, tokens: int = 5) -> list[Any]:
    update = Update(
        sender=sender,
        seq=seq,
        base_version=to.version,
        tokens=tokens,
        started_tokens=0,
        values=np.array(values, np.float32),
    )
    return to.handle(Push(sender=sender, packed=pack(update, layout), now_s=1.0))


def reason(commands: list[Any]) -> str:
    [answer] = [command for command in commands if isinstance(command, Answer)]
    return str(answer.verdict.reason)


def moved(theta: Flat) -> list[float]:
    return [float(value) for value in theta - START]


def test_whole_updates_are_clipped_and_divided_by_the_number_that_is_meant_to_be(
    layout: Layout, endless: BudgetConfig
) -> None:
    """By hand: a's norm is 5 (3 in the backbone, 4 in a key layer), clipped to 1; b's is 0.5; three members, K = 2."""
    world = node(layout, endless)
    push(world, layout, "a", [3.0, 0.0, 0.0, 0.0, 4.0, 0.0, 0.0], tokens=1)
    push(world, layout, "b", [0.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0], tokens=1_000_000)
    assert world.version == 1
    share = (1 / 2) * (2 / 3)
    expected = [0.6 * share, 0.5 * share, 0.0, 0.0, 0.8 * share, 0.0, 0.0]
    np.testing.assert_allclose(moved(world.theta), expected, atol=1e-6)


def test_what_a_federation_sends_has_noise_of_its_own_and_is_not_clipped(layout: Layout, endless: BudgetConfig) -> None:
    world = node(layout, endless, rules={"buffer_size": 1}, expected=1)
    commands = push(world, layout, "f", [30.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    assert moved(world.theta)[0] == pytest.approx(30.0 / 3)
    assert not [command for command in commands if isinstance(command, Charge)]


def test_the_noise_has_its_standard_deviation(layout: Layout, endless: BudgetConfig) -> None:
    drawn = []
    for seed in range(400):
        world = node(layout, endless, noise=2.0, bound=0.5, generator=np.random.default_rng(seed))
        for sender in ("a", "b"):
            push(world, layout, sender, [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
        drawn += moved(world.theta)
    assert np.std(drawn) == pytest.approx(2.0 * 0.5 / 3, rel=0.05)  # over K = 2, times the share 2 of 3


def test_a_contribution_is_charged_before_anybody_hears_of_it(layout: Layout, endless: BudgetConfig) -> None:
    world = node(layout, endless, rules={"buffer_size": 1}, noise=1.0)
    world.handle(Pull(child="b", started_tokens=0, now_s=0.0))
    world.handle(Pull(child="a", started_tokens=0, now_s=0.0))
    commands = push(world, layout, "a", [0.1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    assert commands[0] == Charge(child="a")
    [record] = [c.record for c in commands if isinstance(c, Note) and isinstance(c.record, PrivacyRecord)]
    assert (record.node, record.epsilon) == ("world/a", gaussian_epsilon(1.0, 1, delta=1e-5))


def test_nobody_is_in_one_sum_twice(layout: Layout, endless: BudgetConfig) -> None:
    world = node(layout, endless)
    still = [0.1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert reason(push(world, layout, "a", still)) == "accepted"
    again = push(world, layout, "a", still, seq=2)
    assert reason(again) == "too_soon"
    assert not [command for command in again if isinstance(command, Charge)]
    assert world.privacy.contributions == {"a": 1}


def test_a_client_whose_budget_is_spent_is_refused_and_told_to_stop(layout: Layout, endless: BudgetConfig) -> None:
    world = node(layout, endless, rules={"buffer_size": 1}, limits={"a": 2, "b": 2}, contributions={"a": 1})
    still = [0.1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert reason(push(world, layout, "a", still)) == "accepted"
    before = world.theta.copy()
    assert reason(push(world, layout, "a", still, seq=2)) == "privacy_exhausted"
    assert np.array_equal(world.theta, before)
    served = {
        child: command.model.finished
        for child in ("a", "b")
        for command in world.handle(Pull(child=child, started_tokens=0, now_s=2.0))
        if isinstance(command, Serve)
    }
    assert served == {"a": True, "b": False}


def test_a_fold_that_is_open_survives_a_restart(layout: Layout, endless: BudgetConfig) -> None:
    one = node(layout, endless)
    push(one, layout, "a", [0.3, 0.0, 0.0, 0.0, 0.4, 0.0, 0.0])
    other = node(layout, endless)
    other.restore(*one.state())
    for world in (one, other):
        push(world, layout, "b", [0.0, 0.2, 0.0, 0.0, 0.0, 0.0, 0.0])
    assert np.array_equal(one.theta, other.theta)


def test_an_open_sum_is_paid_for_again_after_a_restart(layout: Layout, endless: BudgetConfig) -> None:
    """The life before may have published it, with noise that is forgotten."""
    one = node(layout, endless)
    push(one, layout, "a", [0.3, 0.0, 0.0, 0.0, 0.4, 0.0, 0.0])
    other = node(layout, endless, contributions={"a": 1})
    other.restore(*one.state())
    assert [command for command in other.handle(Started()) if isinstance(command, Charge)] == [Charge(child="a")]
    assert other.privacy.contributions == {"a": 2}
    poor = node(layout, endless, contributions={"a": 1}, limits={"a": 1})
    poor.restore(*one.state())
    assert poor.handle(Started()) == []
    push(poor, layout, "b", [0.0, 0.2, 0.0, 0.0, 0.0, 0.0, 0.0])
    assert poor.version == 0, "the sum with what cannot be paid is gone"


def test_a_ledger_that_has_lost_its_end_is_noticed(layout: Layout, endless: BudgetConfig) -> None:
    one = node(layout, endless)
    push(one, layout, "a", [0.3, 0.0, 0.0, 0.0, 0.4, 0.0, 0.0])
    with pytest.raises(PrivacyError, match="holds 0 of 1 contributions"):
        node(layout, endless, contributions={"a": 0}).restore(*one.state())


def test_somebody_whom_the_plan_does_not_know_is_clipped(layout: Layout, endless: BudgetConfig) -> None:
    world = node(layout, endless, rules={"buffer_size": 1})
    world.handle(Joined(child="stranger", now_s=0.0))
    push(world, layout, "stranger", [1e6, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    assert np.linalg.norm(world.theta - START) <= 1.0


def test_contributions_under_different_noise_add_up(tmp_path: Path) -> None:
    assert composed_epsilon([3.0] * 5, delta=1e-4) == gaussian_epsilon(3.0, 5, delta=1e-4)
    assert composed_epsilon([3.0, 12.0], delta=1e-5) < composed_epsilon([3.0, 3.0], delta=1e-5)
    before = [3.0] * 4
    left = most_contributions(12.0, target_epsilon=3.0, delta=1e-5, before=before)
    assert composed_epsilon([*before, *[12.0] * left], delta=1e-5) <= 3.0
    assert composed_epsilon([*before, *[12.0] * (left + 1)], delta=1e-5) > 3.0
    privacy = PrivacyConfig(unit="client", target_epsilon=3.0, noise_multiplier=3.0, delta=1e-5)
    common: dict[str, Any] = {"node": "world", "clients": ("a",), "rounds": 9, "key": "world"}
    first = Contributions(privacy, tmp_path, run="one", **common)
    for _ in range(4):
        first.charge("a")
    second = Contributions(replace(privacy, noise_multiplier=12.0), tmp_path, run="two", **common)
    assert second.limits() == {"a": 4 + left}
    for _ in range(left):
        second.charge("a")
    with pytest.raises(PrivacyError, match="no further contribution"):
        second.charge("a")


def test_epsilon_of_the_gaussian_mechanism() -> None:
    """Opacus' PRV accountant, delta 1e-4: 2.70 and 6.17 for noise 3, 5 and 20 times; 4.98 for noise 8, 100 times."""
    assert gaussian_epsilon(3.0, 5, delta=1e-4) == pytest.approx(2.70, abs=0.02)
    assert gaussian_epsilon(3.0, 20, delta=1e-4) == pytest.approx(6.17, abs=0.02)
    assert gaussian_epsilon(8.0, 100, delta=1e-4) == pytest.approx(4.98, abs=0.02)
    assert gaussian_epsilon(1.0, 0, delta=1e-5) == 0.0
    assert gaussian_epsilon(0.0, 1, delta=1e-5) == math.inf
    assert gaussian_epsilon(0.05, 1, delta=1e-9) > 200.0  # no overflow far out


def test_noise_and_number_of_contributions_belong_together() -> None:
    noise = gaussian_noise(20, target_epsilon=8.0, delta=1e-4, key="privacy")
    assert noise == pytest.approx(2.43, abs=0.01)
    assert most_contributions(noise, target_epsilon=8.0, delta=1e-4) == 20
    assert most_contributions(0.1, target_epsilon=1.0, delta=1e-5) == 0


def guild(tmp_path: Path, **privacy: Any) -> list[dict[str, Any]]:
    promise = {"unit": "client", "max_grad_norm": 0.1, "delta": 1e-4} | privacy
    members = [client("a", tmp_path, 1), client("b", tmp_path, 2)]
    return [{"federation": "guild", "privacy": promise, "children": members}, client("c", tmp_path, 3)]


def test_a_world_with_a_guild_keeps_its_budget_and_its_secrets(tiny: Tiny, tmp_path: Path) -> None:
    plan = tiny(guild(tmp_path, target_epsilon=8.0, max_updates=3), budget={"rounds": 5})
    plan = create(replace(plan, config=replace(plan.config, run_dir=str(tmp_path / "world"))))
    records: list[Any] = []
    summary = simulate(plan, on_record=records.append).summary
    rows = {row.nodes[0]: row for row in spending.statements(plan)}
    assert set(rows) == {"world/guild/a", "world/guild/b"}
    for row in rows.values():
        assert row.charges == 3
        assert 7.9 < row.epsilon <= 8.0
    assert spending.unpaid(plan) == []
    private = [r for r in records if isinstance(r, RoundRecord) and r.node.startswith("world/guild/")]
    assert private
    assert all(record.train_loss is record.loss is None for record in private)
    assert summary["nodes"]["world/c"]["steps"] == 5 * plan.root.settings.training.local_steps
    # Another life of the aggregator counts on from the ledgers, not from its checkpoint.
    again = build.contributions(plan, plan.node("world/guild"))
    assert again is not None
    assert again.counts() == {"a": 3, "b": 3}
    with pytest.raises(PrivacyError, match="holds no further contribution"):
        again.charge("a")


@pytest.mark.parametrize(
    ("privacy", "changes", "key"),
    [
        ({}, {}, "privacy"),
        ({"noise_multiplier": 1.0, "max_updates": 0}, {}, "privacy.max_updates"),
        ({"unit": "record", "noise_multiplier": 1.0, "max_updates": 3}, {}, "privacy.max_updates"),
        ({"target_epsilon": 1.0}, {"budget": {"seconds": 9.0}}, "privacy.noise_multiplier"),
        (
            {"noise_multiplier": 1.0},
            {"aggregation": {"residuals": {"per_round": 1}}},
            "aggregation.residuals.per_round",
        ),
        ({"noise_multiplier": 1.0}, {"aggregation": {"max_update_norm": 1.0}}, "aggregation.max_update_norm"),
        (
            {"noise_multiplier": 1.0},
            {"aggregation": {"buffer_size": 3, "robust": {"rule": "median"}}},
            "aggregation.robust.rule",
        ),
        ({"noise_multiplier": 0.0}, {}, "privacy.noise_multiplier"),
        ({"noise_multiplier": 1.0, "ledger_dir": "here"}, {}, "privacy.ledger_dir"),
    ],
)
def test_wrong_client_level_privacy_is_one_line_by_its_key(
    tiny: Tiny, tmp_path: Path, privacy: dict[str, Any], changes: dict[str, Any], key: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny(guild(tmp_path, **privacy), **changes)
    assert caught.value.key == f"world.children[0].{key}"


@pytest.mark.parametrize("children", ["alone", "stricter"])
def test_a_client_cannot_promise_to_itself_what_only_its_aggregator_can_keep(
    tiny: Tiny, tmp_path: Path, children: str
) -> None:
    own = {"unit": "client", "target_epsilon": 1.0, "delta": 1e-4, "max_grad_norm": 0.1}
    if children == "alone":
        tree = [client("a", tmp_path, 1, privacy=own)]
        key = "world.children[0].privacy.unit"
    else:
        tree = guild(tmp_path, target_epsilon=8.0)
        tree[0]["children"][0]["privacy"] = {"target_epsilon": 1.0}
        key = "world.children[0].children[0].privacy"
    with pytest.raises(ConfigError) as caught:
        tiny(tree)
    assert caught.value.key == key
