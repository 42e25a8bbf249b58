"""Every rule about a configuration: one that breaks it, and the key that the user is told."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support.worlds import TINY_MODEL

from worldlm_ray.config.loading import from_mapping
from worldlm_ray.errors import ConfigError
from worldlm_ray.plan import backend_checks, border_checks, checks, client_checks, expert_checks, privacy_checks
from worldlm_ray.plan.checks import Rule
from worldlm_ray.plan.plan import Plan, assembled, make_plan

RECORD = {"unit": "record", "noise_multiplier": 1.0}
CLIENT = {"unit": "client", "noise_multiplier": 1.0}
LISTENS = {"listen": "127.0.0.1:8443"}
FED, ALICE = "world.children[0]", "world.children[0].children[0]"


def sound() -> dict[str, Any]:
    """A configuration in order: a federation of two clients, and one client under the world."""
    return {
        "model": dict(TINY_MODEL),
        "budget": {"rounds": 2},
        "data": {"corpus": "licenses"},
        "world": {
            "children": [
                {"federation": "fed", "children": [{"client": "alice"}, {"client": "bob"}]},
                {"client": "carol"},
            ]
        },
    }


@dataclass(frozen=True)
class Case:
    """A change of the sound configuration that breaks a rule."""

    rule: Rule
    key: str
    """What the user is told."""
    top: dict[str, Any] = field(default_factory=dict)
    fed: dict[str, Any] = field(default_factory=dict)
    alice: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        """The broken configuration."""
        raw = deepcopy(sound()) | self.top
        federation = raw["world"]["children"][0]
        federation |= self.fed
        federation["children"][0] |= self.alice
        return raw


SHARED = {"resources": {"clients_per_process": 2}}
MEDIAN = {"robust": {"rule": "median"}}
ZERO = {"training": {"zero_stage": 1}}
OVERLAP = {"exchange": {"overlap": True}}
CASES = [
    Case(
        checks.validated_has_text,
        f"{ALICE}.data.validation_fraction",
        alice={"merge": {"client": "validated"}, "data": {"validation_fraction": 0.0}},
    ),
    Case(
        checks.apart_holds_two_models,
        f"{ALICE}.merge.client",
        alice={"merge": {"client": "apart"}, "privacy": RECORD},
    ),
    Case(border_checks.members_need_a_gateway, "gateway.listen", {"gateway": LISTENS}),
    Case(
        border_checks.members_need_a_gateway, "gateway.listen", fed={"children": [{"client": "alice"}, {"member": "m"}]}
    ),
    Case(
        border_checks.members_have_one_parent,
        "world.children[1].member",
        {"gateway": LISTENS, "world": {"children": [{"federation": "fed"}, {"member": "n"}]}},
        fed={"children": [{"client": "alice"}, {"member": "m"}]},
    ),
    Case(
        border_checks.borders_train,
        "simulation.train",
        {
            "joins": "profile",
            "simulation": {"train": False},
            "world": {"federation": "world/eu", "children": [{"federation": "fed", "children": [{"client": "alice"}]}]},
        },
    ),
    Case(
        backend_checks.ranks_within_the_worlds,
        f"{ALICE}.training.lora_rank",
        alice={"training": {"lora_rank": 2}},
    ),
    Case(expert_checks.sums_of_experts, f"{FED}.aggregation.rule", fed={"aggregation": {"rule": "sums"}}),
    Case(
        client_checks.served_without_choice,
        f"{ALICE}.merge.serve_parent",
        alice={"merge": {"client": "validated", "serve_parent": True}},
    ),
    Case(client_checks.mixture_of_two_models, f"{ALICE}.merge.mixture", alice={"merge": {"mixture": 0.5}}),
    Case(
        client_checks.head_needs_a_body,
        f"{ALICE}.training.head_first",
        alice={"training": {"head_first": 0.5, "local_steps": 1}},
    ),
    Case(
        client_checks.head_needs_a_body,
        f"{ALICE}.training.head_first",
        {"model": TINY_MODEL | {"key_layers": []}},
        alice={"training": {"head_first": 0.5}},
    ),
    Case(
        client_checks.head_first_on_one_device,
        f"{ALICE}.training.head_first",
        alice={"training": {"head_first": 0.5}, "privacy": RECORD},
    ),
    Case(
        client_checks.head_first_on_one_device,
        f"{ALICE}.training.head_first",
        alice={"training": {"head_first": 0.5, "zero_stage": 1}},
    ),
    Case(checks.proximal_in_one_process, f"{ALICE}.merge.proximal", alice={"merge": {"proximal": 0.1}} | ZERO),
    Case(
        checks.best_of_measured_rounds, "evaluation.keep_best", {"evaluation": {"keep_best": True, "every_rounds": 0}}
    ),
    Case(checks.robust_needs_three, f"{FED}.aggregation.robust.rule", fed={"aggregation": MEDIAN}),
    Case(
        checks.robust_without_residuals,
        f"{FED}.aggregation.robust.rule",
        fed={"aggregation": {"trigger": "synchronous", "robust": {"rule": "median"}, "residuals": {"per_round": 1}}},
    ),
    Case(checks.one_vocabulary, "world.children[1].data.tokenizer", alice={"data": {"tokenizer": "bytes"}}),
    Case(privacy_checks.absolute_ledger, "privacy.ledger_dir", {"privacy": {"ledger_dir": "here"}}),
    Case(
        privacy_checks.counted_updates, f"{ALICE}.privacy.max_updates", alice={"privacy": RECORD | {"max_updates": 3}}
    ),
    Case(
        privacy_checks.prv_noise,
        f"{ALICE}.privacy.noise_multiplier",
        alice={"privacy": {"unit": "record", "noise_multiplier": 0.01, "accountant": "prv"}},
    ),
    Case(privacy_checks.pausing_clients, "privacy.on_exhausted", {"privacy": {"on_exhausted": "pause"}}),
    Case(privacy_checks.promise_with_noise, f"{ALICE}.privacy", alice={"privacy": {"unit": "record"}}),
    Case(
        privacy_checks.stricter_below,
        f"{ALICE}.privacy.noise_multiplier",
        fed={"privacy": RECORD},
        alice={"privacy": {"noise_multiplier": 0.5}},
    ),
    Case(
        privacy_checks.no_refusal_by_norm,
        f"{FED}.aggregation.max_update_norm",
        fed={"privacy": CLIENT, "aggregation": {"max_update_norm": 1.0}},
    ),
    Case(
        privacy_checks.no_residuals_of_private_clients,
        f"{FED}.aggregation.residuals.per_round",
        fed={"privacy": CLIENT, "aggregation": {"residuals": {"per_round": 1}}},
    ),
    Case(
        privacy_checks.noise_is_for_a_sum,
        f"{FED}.aggregation.robust.rule",
        fed={"privacy": CLIENT, "aggregation": {"trigger": "synchronous", "robust": {"rule": "median"}}},
    ),
    Case(
        privacy_checks.planned_updates,
        f"{FED}.privacy.noise_multiplier",
        {"budget": {"seconds": 1.0}},
        fed={"privacy": {"unit": "client", "target_epsilon": 3.0}},
    ),
    Case(privacy_checks.kept_by_an_aggregator, f"{ALICE}.privacy.unit", alice={"privacy": CLIENT}),
    Case(
        privacy_checks.one_promise_per_aggregator,
        f"{ALICE}.privacy",
        fed={"privacy": CLIENT},
        alice={"privacy": {"noise_multiplier": 2.0}},
    ),
    Case(
        privacy_checks.planned_steps,
        f"{ALICE}.privacy.noise_multiplier",
        {"budget": {"seconds": 1.0}},
        alice={"privacy": {"unit": "record", "target_epsilon": 3.0}},
    ),
    Case(
        privacy_checks.one_private_text,
        f"{ALICE}.data.pool",
        alice={"privacy": RECORD, "data": {"pool": [{"corpus": "licenses"}, {"corpus": "licenses"}]}},
    ),
    Case(
        privacy_checks.gradients_per_record,
        f"{ALICE}.training.activation_checkpointing",
        alice={"privacy": RECORD, "training": {"activation_checkpointing": True}},
    ),
    Case(
        privacy_checks.lockable_ledger,
        f"{ALICE}.privacy.ledger_dir",
        {"run_dir": "s3://bucket/run"},
        alice={"privacy": RECORD},
    ),
    Case(
        privacy_checks.privacy_of_trained_clients,
        f"{ALICE}.privacy.unit",
        {"simulation": {"train": False}},
        alice={"privacy": RECORD},
    ),
    Case(checks.shared_without_workers, f"{ALICE}.resources.clients_per_process", alice=SHARED | ZERO),
    Case(
        checks.overlap_without_waiting,
        f"{ALICE}.exchange.overlap",
        fed={"aggregation": {"trigger": "synchronous"}},
        alice=OVERLAP,
    ),
    Case(checks.overlap_of_whole_models, f"{ALICE}.exchange.overlap", alice=OVERLAP | ZERO),
    Case(
        checks.overlap_from_own_model,
        f"{ALICE}.exchange.overlap",
        {"simulation": {"train": False}},
        alice=OVERLAP,
    ),
    Case(checks.batches_for_workers, f"{ALICE}.training.batch_size", alice={"training": {"accumulation_steps": 3}}),
    Case(checks.all_train_or_none, f"{ALICE}.simulation.train", alice={"simulation": {"train": False}}),
    Case(
        checks.capped_weights,
        f"{FED}.aggregation.max_share",
        fed={"privacy": CLIENT, "aggregation": {"max_share": 0.75, "trigger": "synchronous"}},
    ),
    Case(
        checks.one_aggregation_rule,
        f"{FED}.aggregation.rule",
        fed={"aggregation": {"rule": "capped", "trigger": "synchronous", "robust": {"rule": "median"}}},
    ),
    Case(checks.caps_that_add_up, f"{FED}.aggregation.max_share", fed={"aggregation": {"max_share": 0.5}}),
    Case(checks.known_faults, "faults[0]", {"faults": ["5s kill world/stranger"]}),
    Case(checks.readable_texts, f"{ALICE}.data.files[0]", alice={"data": {"files": ["no/such/file.txt"]}}),
]


def named(case: Case) -> str:
    return case.rule.__name__


@pytest.mark.parametrize("case", CASES, ids=named)
def test_a_broken_rule_names_its_key(case: Case) -> None:
    errors = list(case.rule(assembled(from_mapping(case.config))))
    assert errors, "the rule finds nothing"
    assert errors[0].key == case.key
    assert errors[0].cure
    with pytest.raises(ConfigError) as caught:
        make_plan(from_mapping(case.config))
    assert str(caught.value) == str(errors[0]), "another rule speaks first"


@pytest.mark.parametrize("rule", [*checks.RULES, *checks.DATA_RULES], ids=lambda rule: rule.__name__)
def test_a_sound_configuration_breaks_no_rule(rule: Rule) -> None:
    assert not list(rule(assembled(from_mapping(sound()))))


def test_every_rule_has_a_case_and_a_reason() -> None:
    rules = {*checks.RULES, *checks.DATA_RULES}
    without = {rule.__name__ for rule in rules - {case.rule for case in CASES}}
    # The others need a model of transformers: test_pretrained.py, test_experts.py, test_smaller_rank_worlds.py.
    assert without == {
        "whole_model_folder",
        "not_under_transformers",
        "exact_parts",
        "one_own_adapter",
        "smaller_rank_in_one_process",
    }
    assert all(rule.__doc__ for rule in rules)


def test_a_damaged_file_beside_the_model_is_told(tmp_path: Path) -> None:
    """`whole_model_folder`: its folder needs weights of the right shape, which test_huggingface.py makes."""
    plan = assembled(from_mapping(sound()))
    (tmp_path / "generation_config.json").write_text("{")
    config = from_mapping(sound() | {"model": {"initial_from": str(tmp_path)}})
    broken = Plan(config=config, root=plan.root, shape=plan.shape, layout=plan.layout)
    assert [error.key for error in checks.whole_model_folder(broken)][:1] == ["model.initial_from"]
