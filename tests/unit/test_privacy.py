"""Record-level privacy: clipped gradients against brute force, noise, the ledger, and what leaves a client."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.worlds import client
from torch import Tensor, nn
from torch.nn import functional

from worldlm_ray.client.client import Client
from worldlm_ray.config.schema import PrivacyConfig, TrainingConfig
from worldlm_ray.data import prepare
from worldlm_ray.errors import ConfigError, PrivacyError
from worldlm_ray.exchange.messages import Model, pack, read_header
from worldlm_ray.model.decoder import Decoder, cross_entropy
from worldlm_ray.model.initial import initial_parameters
from worldlm_ray.model.shape import ModelShape
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.rundir import create
from worldlm_ray.privacy.accounting import Spend, epsilon, noise_for, rounds_left
from worldlm_ray.privacy.dp_sgd import Mode, RecordGradients, self_test
from worldlm_ray.privacy.ledger import Ledger
from worldlm_ray.records import OwnModelRecord, ProgressRecord, Record, RoundRecord, StartRecord
from worldlm_ray.reports import spending
from worldlm_ray.simulation.simulator import simulate
from worldlm_ray.training.private import PrivateTrainer

Tiny = Callable[..., Plan]
PRIVATE = PrivacyConfig(unit="record", noise_multiplier=1.0, max_grad_norm=0.3)
MODES: list[Mode] = ["ghost", "hooks"]


def trainer(shape: ModelShape, *, mode: Mode = "hooks", noise: float = 0.0, batch_size: int = 6) -> PrivateTrainer:
    privacy = replace(PRIVATE, grad_sample_mode=mode)
    layout = shape.layout([])
    settings = TrainingConfig(batch_size=batch_size, weight_decay=0.0)
    made = PrivateTrainer(shape, layout, settings, privacy, noise=noise, threads=1, device="cpu")
    made.write(initial_parameters(shape, layout, seed=0))
    return made


def text(shape: ModelShape, records: int) -> tuple[Any, Any]:
    drawn = np.random.default_rng(0).integers(0, shape.vocab_size, (records, shape.context + 1))
    return drawn[:, :-1].copy(), drawn[:, 1:].copy()


# ---- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("records", [0, 1, 6, 29])  # 29 is more than one pass takes
def test_a_step_is_that_of_brute_force_clipping(shape: ModelShape, mode: Mode, records: int) -> None:
    private = trainer(shape, mode=mode)
    inputs, targets = text(shape, records)
    model = Decoder(shape)
    model.load_state_dict({name: value.clone() for name, value in private.model.state_dict().items()})
    expected = torch.zeros(private.layout.size)
    clipped = 0
    for index in range(records):
        loss = model.loss(torch.from_numpy(inputs[index : index + 1]), torch.from_numpy(targets[index : index + 1]))
        flat = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        clipped += float(flat.norm()) > PRIVATE.max_grad_norm
        expected += flat * min(1.0, PRIVATE.max_grad_norm / float(flat.norm()))
    private.step(inputs, targets, 0.0)
    in_model_order = torch.cat([p.grad.flatten() for p in private.model.parameters() if p.grad is not None])
    torch.testing.assert_close(in_model_order, expected / 6, atol=1e-6, rtol=0.0)
    assert records == 0 or clipped


def test_the_noise_has_its_standard_deviation(shape: ModelShape) -> None:
    private = trainer(shape, noise=2.0)
    empty = text(shape, 0)
    drawn = torch.cat([private.gradient.clone() for _ in range(20) if private.step(*empty, 0.0) is not None])
    assert float(drawn.std()) == pytest.approx(2.0 * 0.3 / 6, rel=0.01)
    assert abs(float(drawn.mean())) < 5 * 0.1 / math.sqrt(len(drawn))


def test_two_trainers_never_draw_the_same_noise(shape: ModelShape) -> None:
    one, other = trainer(shape, noise=1.0), trainer(shape, noise=1.0)
    one.step(*text(shape, 0), 0.0)
    other.step(*text(shape, 0), 0.0)
    assert not torch.equal(one.gradient, other.gradient)


@pytest.mark.parametrize("mode", MODES)
def test_a_record_that_is_not_finite_counts_for_nothing(shape: ModelShape, mode: Mode) -> None:
    private = trainer(shape, mode=mode)
    inputs, targets = text(shape, 4)
    private.step(inputs[:3], targets[:3], 0.0)
    without = private.gradient.clone()
    bad = int(inputs[3, 0])
    inputs[:3][inputs[:3] == bad] = (bad + 1) % shape.vocab_size
    targets[:3][targets[:3] == bad] = (bad + 1) % shape.vocab_size
    private.step(inputs[:3], targets[:3], 0.0)
    without = private.gradient.clone()
    with torch.no_grad():
        private.model.get_submodule("model.embed_tokens").weight[bad] = math.inf  # type: ignore[index]
    private.step(inputs, targets, 0.0)
    assert torch.isfinite(private.gradient).all()
    torch.testing.assert_close(private.gradient, without, atol=1e-6, rtol=0.0)


class Tied(Decoder):
    """Uses the embedding's weight as a function's argument, which no hook can see."""

    def forward(self, tokens_BT: Tensor) -> Tensor:
        hidden_BTC = self.model(tokens_BT)
        return self.lm_head(hidden_BTC) + functional.linear(hidden_BTC, self.model.embed_tokens.weight)


class Twice(Decoder):
    """Runs its head twice."""

    def forward(self, tokens_BT: Tensor) -> Tensor:
        hidden_BTC = self.model(tokens_BT)
        return self.lm_head(hidden_BTC) + self.lm_head(-hidden_BTC) * 0.5


@pytest.mark.parametrize("mode", MODES)
def test_the_self_test_passes_the_decoder_and_finds_a_functionally_tied_weight(shape: ModelShape, mode: Mode) -> None:
    self_test(Decoder(shape), vocab_size=shape.vocab_size, length=8, mode=mode)
    with pytest.raises(PrivacyError, match="a weight is used outside its module"):
        self_test(Tied(shape), vocab_size=shape.vocab_size, length=8, mode=mode)


def test_models_without_known_per_record_gradients_are_refused(shape: ModelShape) -> None:
    with pytest.raises(PrivacyError, match="more or less than once"):
        self_test(Twice(shape), vocab_size=shape.vocab_size, length=8, mode="hooks")
    shared = Decoder(shape)
    shared.lm_head.weight = shared.model.embed_tokens.weight
    with pytest.raises(PrivacyError, match="shared by 2 modules"):
        RecordGradients(shared, max_grad_norm=1.0, mode="hooks")
    with pytest.raises(PrivacyError, match=r"\(BatchNorm1d\) has no rule"):
        RecordGradients(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), max_grad_norm=1.0, mode="hooks")


def test_losses_of_records_are_means_over_their_tokens(shape: ModelShape) -> None:
    private = trainer(shape)
    inputs, targets = (torch.from_numpy(ids) for ids in text(shape, 3))
    _, loss_B = private._records.norms(inputs, targets)
    expected = [cross_entropy(private.model(inputs[i : i + 1]), targets[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(loss_B, torch.stack(expected).detach())


# ---- sampling ------------------------------------------------------------------------------------------------------


def test_poisson_batches_take_every_record_with_the_same_probability(tmp_path: Path, tiny: Tiny) -> None:
    plan = tiny([client("a", tmp_path, 1)])
    dataset = prepare(plan.root.clients[0].settings.data, context=16, key="data")
    dataset = replace(dataset, train=np.arange(17 * 200 + 5, dtype=np.uint16))  # no two records are alike
    count, rate = dataset.records(context=16), 0.05
    generator = np.random.default_rng(0)
    sizes, seen = [], np.zeros(count)
    records = {dataset.train[i * 17 : i * 17 + 16].tobytes(): i for i in range(count)}
    for inputs, targets in dataset.poisson_batches(generator, steps=400, rate=rate, context=16):
        sizes.append(len(inputs))
        np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
        for row in inputs:
            seen[records[row.astype(dataset.train.dtype).tobytes()]] += 1
    assert np.mean(sizes) == pytest.approx(count * rate, rel=0.05)
    assert np.var(sizes) == pytest.approx(count * rate * (1 - rate), rel=0.2)
    assert seen.min() > 0.3 * 400 * rate
    assert seen.max() < 2.5 * 400 * rate


def test_an_empty_batch_is_possible(tmp_path: Path, tiny: Tiny) -> None:
    plan = tiny([client("a", tmp_path, 1)])
    dataset = prepare(plan.root.clients[0].settings.data, context=16, key="data")
    [(inputs, targets)] = dataset.poisson_batches(np.random.default_rng(0), steps=1, rate=0.0, context=16)
    assert inputs.shape == targets.shape == (0, 16)


# ---- accounting and the ledger -------------------------------------------------------------------------------------


def test_epsilon_of_known_histories() -> None:
    """Figures of Opacus 1.6 for these histories at delta 1e-5."""
    history = [Spend(1.0, 0.01, 1000)]
    assert epsilon(history, delta=1e-5, accountant="rdp") == pytest.approx(2.10, abs=0.01)
    assert epsilon(history, delta=1e-5, accountant="prv") == pytest.approx(1.84, abs=0.01)
    assert epsilon([Spend(1.0, 0.01, 10)] * 100, delta=1e-5, accountant="rdp") == epsilon(
        history, delta=1e-5, accountant="rdp"
    )
    assert epsilon([], delta=1e-5, accountant="prv") == 0.0
    assert epsilon([Spend(0.0, 0.01, 1)], delta=1e-5, accountant="rdp") == math.inf


def test_rounds_of_a_budget_of_three() -> None:
    """Noise 1, rate 0.02, 20 steps a round, delta 1e-5: 22 whole rounds end below 3, the 23rd would not."""
    held = rounds_left([], noise=1.0, rate=0.02, per_round=20, target_epsilon=3.0, delta=1e-5, accountant="rdp")
    spent = [epsilon([Spend(1.0, 0.02, 20 * n)], delta=1e-5, accountant="rdp") for n in (held, held + 1)]
    assert spent[0] <= 3.0 < spent[1]
    assert held == 22


def test_noise_for_what_is_left_of_a_budget() -> None:
    """500 steps at noise 1 are spent, 200 are to come, within 4: 0.899, where a fresh ledger would say 0.795."""
    common: dict[str, Any] = {"rate": 0.02, "steps": 200, "delta": 1e-5, "accountant": "rdp", "key": "privacy"}
    assert noise_for(4.0, spent=[Spend(1.0, 0.02, 500)], **common) == pytest.approx(0.899, abs=0.003)
    with pytest.raises(PrivacyError, match=r"privacy.target_epsilon: no noise keeps 200 steps within 1 "):
        noise_for(1.0, spent=[Spend(1.0, 0.02, 500)], **common)


ENTRY = {"node": "world/a", "run": "r", "noise": 1.0, "rate": 0.02, "steps": 20}


def test_a_ledger_keeps_every_charge_and_refuses_what_is_not_allowed(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledgers", unit="record", text="abc")
    assert ledger.history() == []
    assert ledger.charge(ENTRY, allowed=lambda history: len(history) <= 2)
    assert ledger.charge(ENTRY, allowed=lambda history: len(history) <= 2)
    before = ledger.path.read_bytes()
    assert not ledger.charge(ENTRY, allowed=lambda history: len(history) <= 2)
    assert ledger.path.read_bytes() == before
    assert Ledger.at(ledger.path).history() == [Spend(1.0, 0.02, 20)] * 2


def test_a_line_that_a_crash_cut_short_is_dropped(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, unit="record", text="abc")
    for _ in range(2):
        ledger.charge(ENTRY, allowed=lambda _: True)
    whole = ledger.path.read_bytes()
    for length in range(whole.index(b"\n") + 1, len(whole)):
        ledger.path.write_bytes(whole[:length])
        ledger = Ledger.at(ledger.path)
        assert len(ledger.history()) == 1
    assert ledger.charge(ENTRY, allowed=lambda _: True)
    assert ledger.path.read_bytes() == whole


@pytest.mark.parametrize("change", [("1.0", "9.0"), ('"steps": 20', '"steps": 2'), ('"number": 1', '"number": 2')])
def test_a_ledger_that_was_changed_is_not_believed(tmp_path: Path, change: tuple[str, str]) -> None:
    ledger = Ledger(tmp_path, unit="record", text="abc")
    ledger.charge(ENTRY, allowed=lambda _: True)
    ledger.charge(ENTRY, allowed=lambda _: True)
    changed = ledger.path.read_text().replace(*change, 1)
    ledger.path.write_text(changed)
    with pytest.raises(PrivacyError, match="line 1: was changed after it was written"):
        Ledger.at(ledger.path).charge(ENTRY, allowed=lambda _: True)
    assert ledger.path.read_text() == changed


def test_a_charge_that_was_taken_out_is_noticed(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, unit="record", text="abc")
    for _ in range(3):
        ledger.charge(ENTRY, allowed=lambda _: True)
    lines = ledger.path.read_text().splitlines(keepends=True)
    ledger.path.write_text(lines[0] + lines[2])
    with pytest.raises(PrivacyError, match="line 2"):
        Ledger.at(ledger.path).history()
    with pytest.raises(PrivacyError, match="was shortened while it was in use"):
        ledger.history()


def test_a_ledger_that_cannot_be_written_stops_the_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PrivacyError, match="nothing may be trained"):
        Ledger(tmp_path / "file" / "ledgers", unit="record", text="abc").charge(ENTRY, allowed=lambda _: True)


# ---- a private client ----------------------------------------------------------------------------------------------


def private_plan(tiny: Tiny, tmp_path: Path, *, training: dict[str, Any] | None = None, **changes: Any) -> Plan:
    privacy = {"unit": "record", "noise_multiplier": 0.8, "target_epsilon": 3.0, "grad_sample_mode": "hooks"}
    private = client("a", tmp_path, 1, privacy=privacy | changes, training=training or {})
    return tiny([private, client("b", tmp_path, 2)], budget={"rounds": 200})


def model_of(plan: Plan) -> Model:
    return Model(
        version=0, progress=0.0, finished=False, tokens=0.0, last_seq=0, share=0.0, residuals=(), values=plan.initial()
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
    # From one checkpoint any number of lives may go on, each with records and noise of its own.
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
    numbers = {"seq", "base_version", "base_incarnation", "tokens", "started_tokens", "fragment", "fragments"}
    assert set(header) == {"schema", "kind", "layout", "sender", "codec", "residuals"} | numbers


def test_losses_are_reported_where_that_is_asked_for(tiny: Tiny, tmp_path: Path) -> None:
    plan = private_plan(tiny, tmp_path, report_metrics=True)
    assert Client(plan, plan.root.clients[0]).start_record(now_s=0.0).loss is not None


# ---- configurations ------------------------------------------------------------------------------------------------


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
def test_nobody_weakens_the_promise_of_the_node_above(
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


# ---- statements ----------------------------------------------------------------------------------------------------


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
