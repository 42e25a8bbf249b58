"""A private client: what it pays, what leaves it, and which configurations are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from support.worlds import client

from worldlm_ray.client.client import Client
from worldlm_ray.errors import ConfigError, PrivacyError
from worldlm_ray.exchange.messages import Model, pack, read_header
from worldlm_ray.plan import build
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.rundir import create
from worldlm_ray.records import OwnModelRecord, ProgressRecord, Record, RoundRecord, StartRecord
from worldlm_ray.reports import spending
from worldlm_ray.simulation.simulator import simulate

Tiny = Callable[..., Plan]


def private_plan(tiny: Tiny, tmp_path: Path, *, training: dict[str, Any] | None = None, **changes: Any) -> Plan:
    privacy = {"unit": "record", "noise_multiplier": 0.8, "target_epsilon": 3.0, "grad_sample_mode": "hooks"}
    private = client("a", tmp_path, 1, privacy=privacy | changes, training=training or {})
    return tiny([private, client("b", tmp_path, 2)], budget={"rounds": 200})


def model_of(plan: Plan) -> Model:
    return Model(
        version=0,
        progress=0.0,
        finished=False,
        tokens=0.0,
        last_seq=0,
        residuals=(),
        values=build.initial(plan),
    )


def test_a_round_is_paid_for_before_it_begins_and_never_twice(tiny: Tiny, tmp_path: Path) -> None:
    plan = private_plan(tiny, tmp_path)
    one = Client(plan, plan.root.clients[0])
    assert one.account is not None
    one.begin(model_of(plan), now_s=0.0)
    assert len(one.account.ledger.entries()) == 1
    again = Client(plan, plan.root.clients[0])  # a crash: the round is lost, the charge is not
    again.begin(model_of(plan), now_s=0.0)
    assert len(one.account.ledger.entries()) == 2
    again.train()
    again.update()
    assert len(one.account.ledger.entries()) == 2


def test_a_client_stops_before_its_budget_would_break(tiny: Tiny, tmp_path: Path) -> None:
    plan = private_plan(tiny, tmp_path, noise_multiplier=1.5, training={"batch_size": 40})
    one = Client(plan, plan.root.clients[0])
    assert one.account is not None
    rounds = 0
    while not one.is_done:
        one.begin(model_of(plan), now_s=0.0)
        one.began, rounds = False, rounds + 1
    assert rounds > 3
    assert one.account.epsilon() <= 3.0
    assert one.account.epsilon(rounds=1) > 3.0
    one.begin(model_of(plan), now_s=0.0)
    assert not one.began
    assert len(one.account.ledger.entries()) == rounds


def test_the_rest_of_a_round_from_a_checkpoint_is_paid_for_again(tiny: Tiny, tmp_path: Path) -> None:
    plan = private_plan(tiny, tmp_path)
    one = Client(plan, plan.root.clients[0])
    one.begin(model_of(plan), now_s=0.0)
    answers = iter([False, False, True])
    one.train(lambda: next(answers))
    state = one.state()
    other = Client(plan, plan.root.clients[0])
    other.restore(*state)
    assert (other.began, other.step) == (True, 2)
    other.train()
    assert other.step == other.training.local_steps
    # Any number of processes may continue from one checkpoint, each with its own records and noise.
    entries = other.account.ledger.entries()  # type: ignore[union-attr]
    assert [entry["steps"] for entry in entries] == [4, 2]
    assert state[0]["loss_sum"] == 0.0


def test_a_ledger_that_has_lost_its_end_is_noticed(tiny: Tiny, tmp_path: Path) -> None:
    plan = private_plan(tiny, tmp_path)
    one = Client(plan, plan.root.clients[0])
    one.begin(model_of(plan), now_s=0.0)
    state = one.state()
    one.account.ledger.path.unlink()  # type: ignore[union-attr]
    with pytest.raises(PrivacyError, match="holds 0 of the 1 charges"):
        Client(plan, plan.root.clients[0]).restore(*state)


def test_noise_chosen_from_a_budget_stays_the_same_over_restarts(tiny: Tiny, tmp_path: Path) -> None:
    privacy = {"unit": "record", "target_epsilon": 50.0}
    plan = tiny([client("a", tmp_path, 1, privacy=privacy), client("b", tmp_path, 2)], budget={"rounds": 3})
    one = Client(plan, plan.root.clients[0])
    assert one.account is not None
    assert one.account.epsilon(rounds=3) <= 50.0
    one.begin(model_of(plan), now_s=0.0)
    other = Client(plan, plan.root.clients[0])
    assert other.account is not None
    assert other.account.noise == one.account.noise


SAYS_NOTHING_OF_THE_TEXT = {
    # A loss of any model on the text tells of the text, and no epsilon covers it: a private client measures none.
    OwnModelRecord: set[str](),
    ProgressRecord: {"node", "now_s", "round", "steps", "tokens"},
    # `private` repeats a setting; `heldout_bytes` is 0.
    StartRecord: {"node", "now_s", "heldout_bytes", "private"},
    RoundRecord: {
        "node",
        "now_s",
        "round",
        "steps",
        "tokens",
        "learning_rate",
        "tokens_per_s",
        "busy_fraction",
        "epsilon",
    },
}


def test_what_leaves_a_private_client(tiny: Tiny, tmp_path: Path) -> None:
    """Every message and every record of a private client, field by field."""
    plan = private_plan(tiny, tmp_path, target_epsilon=None)
    plan = create(replace(plan, config=replace(plan.config, budget=replace(plan.config.budget, rounds=2))))
    records: list[Record] = []
    outcome = simulate(plan, on_record=records.append)
    own = [record for record in records if "world/a" in (record.node, getattr(record, "by", ""))]
    for record in own:
        allowed = SAYS_NOTHING_OF_THE_TEXT.get(type(record))
        if allowed is None:
            continue
        for each in fields(record):
            if each.name not in allowed:
                assert getattr(record, each.name) is None, f"{type(record).__name__}.{each.name}"
    starts = [record for record in own if isinstance(record, StartRecord)]
    rounds = [record for record in own if isinstance(record, RoundRecord)]
    assert [record.heldout_bytes for record in starts] == [0]
    configured = plan.root.settings.training
    assert [record.tokens for record in rounds] == [
        configured.local_steps * configured.batch_size * plan.shape.context * n for n in (1, 2)
    ]
    summary = outcome.summary["nodes"]["world/a"]
    assert summary["loss"] is summary["loss_start"] is summary["perplexity"] is None
    assert summary["private"]
    assert not outcome.summary["nodes"]["world"]["private"]
    assert outcome.summary["nodes"]["world/b"]["loss"] is not None
    assert outcome.summary["nodes"]["world"]["loss"] is not None  # of the other's text alone

    one = Client(plan, plan.root.clients[0])
    one.begin(model_of(plan), now_s=0.0)
    one.train()
    header = read_header(pack(one.update(), plan.layout).header)
    assert header["tokens"] == one.round_tokens
    numbers = {"seq", "base_version", "base_incarnation", "tokens", "started_tokens"}
    assert set(header) == {"schema", "kind", "layout", "sender", "codec", "residuals"} | numbers


def test_losses_are_reported_where_that_is_asked_for(tiny: Tiny, tmp_path: Path) -> None:
    plan = private_plan(tiny, tmp_path, report_metrics=True)
    assert Client(plan, plan.root.clients[0]).start_record(now_s=0.0).loss is not None


PROMISE = {"unit": "record", "target_epsilon": 4.0, "noise_multiplier": 1.0, "delta": 1e-6}


@pytest.mark.parametrize(
    ("below", "name"),
    [
        ({"unit": "none", "target_epsilon": None, "noise_multiplier": None}, "unit"),
        ({"target_epsilon": 5.0}, "target_epsilon"),
        ({"target_epsilon": None}, "target_epsilon"),
        ({"noise_multiplier": 0.9}, "noise_multiplier"),
        ({"noise_multiplier": None}, "noise_multiplier"),
        ({"delta": 1e-5}, "delta"),
        ({"report_metrics": True}, "report_metrics"),
        ({"ledger_dir": "/elsewhere"}, "ledger_dir"),
    ],
)
def test_no_node_weakens_the_promise_of_the_node_above(
    tiny: Tiny, tmp_path: Path, below: dict[str, Any], name: str
) -> None:
    tree = [{"federation": "f", "privacy": PROMISE, "children": [client("a", tmp_path, 1, privacy=below)]}]
    with pytest.raises(ConfigError, match="weakens the promise of the node above") as caught:
        tiny(tree)
    assert caught.value.key == f"world.children[0].children[0].privacy.{name}"


def test_a_child_may_promise_more(tiny: Tiny, tmp_path: Path) -> None:
    more = {"target_epsilon": 2.0, "noise_multiplier": 3.0, "delta": 1e-7, "max_grad_norm": 9.0, "accountant": "prv"}
    tree = [{"federation": "f", "privacy": PROMISE, "children": [client("a", tmp_path, 1, privacy=more)]}]
    assert tiny(tree).root.clients[0].settings.privacy.target_epsilon == 2.0


@pytest.mark.parametrize(
    ("privacy", "changes", "key"),
    [
        ({"unit": "record"}, {}, "privacy"),
        ({"unit": "records", "noise_multiplier": 1.0}, {}, "privacy.unit"),
        ({"target_epsilon": 3.0}, {}, "privacy.target_epsilon"),
        ({"unit": "record", "target_epsilon": -1.0}, {}, "privacy.target_epsilon"),
        ({"unit": "record", "noise_multiplier": -0.1}, {}, "privacy.noise_multiplier"),
        ({"unit": "record", "noise_multiplier": 1.0, "delta": 1.0}, {}, "privacy.delta"),
        ({"unit": "record", "noise_multiplier": 1.0, "max_grad_norm": 0.0}, {}, "privacy.max_grad_norm"),
        ({"unit": "record", "noise_multiplier": 1.0, "accountant": "gdp"}, {}, "privacy.accountant"),
        ({"unit": "record", "noise_multiplier": 1.0, "epsilon": 3.0}, {}, "privacy.epsilon"),
        ({"unit": "record", "target_epsilon": 3.0}, {"budget": {"seconds": 9.0}}, "privacy.noise_multiplier"),
        (
            {"unit": "record", "noise_multiplier": 1.0},
            {"training": {"activation_checkpointing": True}},
            "training.activation_checkpointing",
        ),
        (
            {"unit": "record", "noise_multiplier": 1.0},
            {"resources": {"workers": 3}},
            "training.batch_size",
        ),
    ],
)
def test_wrong_privacy_is_one_line_by_its_key(
    tiny: Tiny, tmp_path: Path, privacy: dict[str, Any], changes: dict[str, Any], key: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny([client("a", tmp_path, 1, privacy=privacy)], **changes)
    assert caught.value.key == f"world.children[0].{key}"
    assert "\n" not in str(caught.value)


def test_a_text_with_fewer_records_than_a_step_takes(tiny: Tiny, tmp_path: Path) -> None:
    short = client("a", tmp_path, 1, training={"batch_size": 4_000})
    plan = tiny([short | {"privacy": {"unit": "record", "noise_multiplier": 1.0}}])
    with pytest.raises(ConfigError, match="lower it, or give the client more text"):
        Client(plan, plan.root.clients[0])


def test_a_statement_says_what_was_spent_and_finds_what_was_not_paid(tiny: Tiny, tmp_path: Path) -> None:
    plan = private_plan(tiny, tmp_path, target_epsilon=None)
    plan = create(replace(plan, config=replace(plan.config, budget=replace(plan.config.budget, rounds=2))))
    [expected] = spending.planned(plan)
    simulate(plan)
    [statement] = spending.statements(plan)
    assert (statement.charges, statement.steps, statement.nodes) == (2, 8, ("world/a",))
    assert statement.epsilon == pytest.approx(expected.epsilon)
    assert spending.unpaid(plan) == []
    audit = plan.run_dir / "audit" / "world.jsonl"
    line = {"node": "world", "sender": "a", "seq": 3, "verdict": "accepted"}
    audit.write_text(audit.read_text() + json.dumps(line) + "\n")
    assert spending.unpaid(plan) == ["world/a: 3 updates were accepted, 2 rounds were paid for"]
