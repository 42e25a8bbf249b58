"""A council of a run's models: who is in it, what it is worth, the text that it generates, and its folder."""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from support import worlds
from support.worlds import client
from typer.testing import CliRunner

from worldlm_ray import huggingface
from worldlm_ray.cli import main as cli
from worldlm_ray.client.measure import MeasuredModel
from worldlm_ray.config.loading import from_mapping, to_mapping
from worldlm_ray.errors import CheckpointError, ConfigError, DataError, RunError
from worldlm_ray.experiments import council, council_folder, council_members, evaluate
from worldlm_ray.experiments.council import CouncilRules
from worldlm_ray.experiments.council_measure import COUNCIL, evaluate_council, table, values
from worldlm_ray.experiments.council_scores import PRIOR_TOKENS, log_probabilities
from worldlm_ray.experiments.council_serving import load, of_run, opened
from worldlm_ray.model.initial import initial_parameters
from worldlm_ray.plan import rundir
from worldlm_ray.plan.plan import Plan, make_plan
from worldlm_ray.storage import checkpoint
from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.training.making import plain_trainer

Tiny = Callable[..., Plan]
FAR_FROM_UNIFORM = np.float32(6.0)
TOKENS = 128


def theta(plan: Plan, number: int) -> Flat:
    return initial_parameters(plan.shape, plan.layout, seed=number) * FAR_FROM_UNIFORM


def save(plan: Plan, path: str, values: Flat) -> None:
    checkpoint.save(checkpoint.folder(plan.run_dir, path), {}, {"theta": values})


def with_checkpoints(plan: Plan) -> Plan:
    """The plan in a run's folder, where every node has a model."""
    created = rundir.create(plan)
    for number, path in enumerate(created.specs):
        save(created, path, theta(created, number))
    return created


@pytest.fixture
def run(tiny: Tiny) -> Plan:
    return with_checkpoints(tiny())


def guild(tmp_path: Path) -> list[dict[str, Any]]:
    """A federation that adds the noise for its clients, and a client without secrets."""
    promise = {"unit": "client", "noise_multiplier": 5.0, "max_grad_norm": 0.1, "delta": 1e-4}
    members = [client("a", tmp_path, 1), client("b", tmp_path, 2)]
    return [{"federation": "guild", "privacy": promise, "children": members}, client("c", tmp_path, 3)]


# ---- members -------------------------------------------------------------------------------------------------------


def test_every_node_is_a_member_unless_the_user_names_some(run: Plan) -> None:
    assert list(council_members.members_of(run).thetas) == list(run.specs)
    named = council_members.members_of(run, "c, world,south/d,c")
    assert list(named.thetas) == ["world", "world/south/c", "world/south/d"]
    assert named.thetas["world"].tobytes() == theta(run, 0).tobytes()


@pytest.mark.parametrize(
    ("names", "message"), [("no node", "there is no node 'no node'"), (" , ", "--members: names no node")]
)
def test_members_that_are_none_are_refused(run: Plan, names: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        council_members.members_of(run, names)


def test_a_model_that_no_noise_covers_serves_nobody_else(tiny: Tiny, tmp_path: Path) -> None:
    plan = with_checkpoints(tiny(guild(tmp_path)))
    found = council_members.members_of(plan)
    assert list(found.thetas) == ["world", "world/guild", "world/c"]
    assert [line.split(" is left out")[0] for line in found.left_out] == ["world/guild/a", "world/guild/b"]
    with pytest.raises(ConfigError, match=r"--members: no noise covers the model of world/guild/a"):
        council_members.members_of(plan, "guild/a,world")


def test_the_text_of_a_client_with_private_losses_is_not_measured(tiny: Tiny, tmp_path: Path) -> None:
    plan = with_checkpoints(tiny(guild(tmp_path)))
    assert set(evaluate_council(str(plan.run_dir), tokens=TOKENS).heldout_bytes) == {"world/c"}


def test_nodes_without_a_usable_model_are_left_out_and_said(run: Plan) -> None:
    shutil.rmtree(checkpoint.folder(run.run_dir, "world/north"))
    save(run, "world/north/a", np.full(run.layout.size, np.nan, np.float32))
    found = council_members.members_of(run)
    assert set(run.specs) - set(found.thetas) == {"world/north", "world/north/a"}
    assert "no checkpoint yet" in found.left_out[0]
    assert "diverged" in found.left_out[1]
    with pytest.raises(CheckpointError, match="diverged"):
        council_members.members_of(run, "north/a,world")


def test_the_same_model_is_a_member_once_unless_the_user_names_it_twice(run: Plan) -> None:
    for path in ("world/north", "world/south/d"):
        save(run, path, theta(run, 0))
    found = council_members.members_of(run)
    assert set(run.specs) - set(found.thetas) == {"world/north", "world/south/d"}
    assert found.left_out == [
        "world/north is left out: its model is that of world",
        "world/south/d is left out: its model is that of world",
    ]
    assert list(council_members.members_of(run, "world,north").thetas) == ["world", "world/north"]


def test_a_run_without_models_has_no_council(tiny: Tiny) -> None:
    plan = rundir.create(tiny())
    with pytest.raises(CheckpointError, match=r"no model of .* can serve: world is left out: .*no checkpoint yet"):
        council_members.members_of(plan)


# ---- what it is worth ----------------------------------------------------------------------------------------------


def test_single_models_are_worth_what_evaluate_says(run: Plan) -> None:
    where = str(run.run_dir)
    truth = evaluate.evaluate(where, tokens=TOKENS)
    measures = evaluate_council(where, tokens=TOKENS)
    assert list(measures.rows) == [COUNCIL, *run.specs]
    for spec in run.root.clients:
        assert measures.rows[spec.path].losses[spec.path] == pytest.approx(truth[spec.path].loss, rel=1e-6)
    assert measures.rows["world"].loss == pytest.approx(truth["world"].loss, rel=1e-6)


def test_the_council_of_a_run_keeps_the_bound(run: Plan) -> None:
    plain = CouncilRules(eps=0.0)
    measures = evaluate_council(str(run.run_dir), tokens=TOKENS, rules=plain, document=10**9)
    members = [row for name, row in measures.rows.items() if name != COUNCIL]
    assert len({round(row.loss, 6) for row in members}) == len(members), "models that differ"
    for path, ours in measures.rows[COUNCIL].losses.items():
        best = min(row.losses[path] for row in members)
        assert best - 1e-9 < ours <= best + math.log(len(members)) / TOKENS + 1e-9


def test_weights_begin_anew_with_every_document(run: Plan) -> None:
    where, plain = str(run.run_dir), CouncilRules(eps=0.0)
    short = evaluate_council(where, tokens=TOKENS, rules=plain, document=1)
    for path in short.heldout_bytes:
        alone = [row.losses[path] for name, row in short.rows.items() if name != COUNCIL]
        assert short.rows[COUNCIL].losses[path] < np.mean(alone)
    long = evaluate_council(where, tokens=TOKENS, rules=plain, document=TOKENS)
    best = max(long.weights["world/north/a"].values())
    assert best > max(short.weights["world/north/a"].values())


def test_the_weights_of_a_text_begin_as_its_validation_text_says(run: Plan) -> None:
    where = str(run.run_dir)
    found = evaluate_council(where, tokens=TOKENS, document=1, rules=CouncilRules(eps=0.999), fit_prior=True)
    uniform = evaluate_council(where, tokens=TOKENS, document=1)
    assert found.rows["world"].losses == uniform.rows["world"].losses
    for path, weights in found.weights.items():
        client = MeasuredModel(run, run.node(path))
        losses = {name: client.validate(PRIOR_TOKENS, parameters=theta(run, i)) for i, name in enumerate(run.specs)}
        # With such an eps what stands at the end of a document is the prior.
        assert sum(weights.values()) == pytest.approx(1.0)
        assert max(weights, key=lambda name: weights[name]) == min(losses, key=lambda name: losses[name])
    assert found.rows[COUNCIL].loss < uniform.rows[COUNCIL].loss


def test_without_validation_text_the_weights_begin_alike(tiny: Tiny, tmp_path: Path) -> None:
    data = {"cache_dir": str(tmp_path / "cache"), "validation_fraction": 0.0}
    plan = with_checkpoints(tiny(data=data))
    fitted = evaluate_council(str(plan.run_dir), tokens=TOKENS, fit_prior=True)
    assert fitted.rows[COUNCIL].losses == evaluate_council(str(plan.run_dir), tokens=TOKENS).rows[COUNCIL].losses
    with pytest.raises(ConfigError, match=r"--prior-of: no client at or below world/north has validation text"):
        council_folder.export_council(str(plan.run_dir), tmp_path / "out", prior_of="north")


def test_the_price_stands_beside_it(run: Plan) -> None:
    found = evaluate_council(str(run.run_dir), tokens=TOKENS, rules=CouncilRules(top=2))
    ours, members = found.rows[COUNCIL], len(run.specs)
    assert ours.models == members
    assert ours.memory_bytes == 4 * members * run.layout.size
    # All read the first 64 of the 128 tokens of a text, two the rest.
    assert ours.passes_per_token == pytest.approx((members + 2) / 2)
    assert ours.seconds > found.rows["world"].seconds > 0.0
    console = Console(file=io.StringIO(), width=200, record=True)
    console.print(table("run", found))
    text = console.export_text()
    assert "passes" in text
    assert "north" in text
    assert json.loads(json.dumps(values(found)))["rows"][COUNCIL]["loss"] == pytest.approx(ours.loss)


# ---- text ----------------------------------------------------------------------------------------------------------


def test_a_council_of_one_says_what_its_member_says(run: Plan) -> None:
    made, _ = of_run(str(run.run_dir), "world/north/a")
    for temperature in (0.0, 1.0):
        expected = evaluate.sample(
            str(run.run_dir), "north/a", prompt="The", tokens=24, temperature=temperature, seed=3
        )
        assert made.text("The", tokens=24, temperature=temperature, seed=3) == expected
    assert made.weights == {"world/north/a": pytest.approx(1.0)}


def test_a_prompt_is_read_before_the_first_word(run: Plan) -> None:
    """The weights after a prompt are those of its log probabilities, window by window."""
    made, _ = of_run(str(run.run_dir), "world,world/north/a", CouncilRules(eps=0.01))
    prompt = "The law of a river runs under the stone."
    ids = np.frombuffer(prompt.encode(), np.uint8).astype(np.int64)
    assert ids.size > 2 * run.shape.context
    made.sample(ids, tokens=0, temperature=1.0, seed=0)
    trainer, log_p_KT = plain_trainer(run.shape, run.layout, run.root.settings), []
    windows = [ids[first : first + run.shape.context + 1] for first in range(0, ids.size - 1, run.shape.context)]
    for number in (0, 2):
        trainer.write(theta(run, number))
        parts = [log_probabilities(trainer, [(window[None, :-1], window[None, 1:])]) for window in windows]
        log_p_KT.append(np.concatenate(parts))
    reading = council.read(np.stack(log_p_KT, axis=1), council.uniform(2), CouncilRules(eps=0.01))
    assert list(made.weights.values()) == pytest.approx(np.exp(reading.weights.now_K).tolist())


def test_a_member_whose_logits_are_not_finite_is_named(run: Plan) -> None:
    large = theta(run, 1) * np.float32(1e18)
    save(run, "world/north/a", large)
    made, _ = of_run(str(run.run_dir), "world,world/north/a")
    with pytest.raises(RunError, match="the model of world/north/a has diverged"):
        made.text("The", tokens=2)


# ---- the folder ----------------------------------------------------------------------------------------------------


def test_an_exported_council_says_what_the_runs_says(run: Plan, tmp_path: Path) -> None:
    where, folder = str(run.run_dir), tmp_path / "out"
    nodes, notes = council_folder.export_council(where, folder, members="world,a,d", rules=CouncilRules(top=2, eps=0.2))
    assert (nodes, notes) == (["world", "world/north/a", "world/south/d"], [])
    said = json.loads((folder / "council.json").read_text(encoding="utf-8"))
    assert (said["eps"], said["top"], said["after"], said["tokenizer"]) == (0.2, 2, 64, "bytes")
    assert [member["prior"] for member in said["members"]] == pytest.approx([1 / 3] * 3)
    back = huggingface.read_weights(folder / said["members"][2]["folder"], run.layout)
    assert back.tobytes() == theta(run, list(run.specs).index("world/south/d")).tobytes()
    ours, theirs = of_run(where, "world,a,d", CouncilRules(top=2, eps=0.2))[0], load(folder)
    assert theirs.text("The", tokens=90, seed=2) == ours.text("The", tokens=90, seed=2)
    assert theirs.weights == pytest.approx(ours.weights)
    assert 0.0 in theirs.weights.values(), "two answer after the first 64 tokens"


def test_a_prior_of_the_folder_counts(run: Plan, tmp_path: Path) -> None:
    council_folder.export_council(str(run.run_dir), tmp_path, members="world,a")
    file = tmp_path / "council.json"
    said = json.loads(file.read_text(encoding="utf-8"))
    for member, prior in zip(said["members"], (3.0, 1.0), strict=True):
        member["prior"] = prior
    file.write_text(json.dumps(said), encoding="utf-8")
    assert list(load(tmp_path).weights.values()) == pytest.approx([0.75, 0.25])


def test_a_prior_may_be_fitted_on_the_validation_text_of_a_node(run: Plan, tmp_path: Path) -> None:
    council_folder.export_council(str(run.run_dir), tmp_path / "out", members="world,a", prior_of="b")
    windows = MeasuredModel(run, run.node("world/north/b")).dataset.validation_windows(
        PRIOR_TOKENS, context=run.shape.context, batch_size=4
    )
    trainer, log_p_KT, batches = plain_trainer(run.shape, run.layout, run.root.settings), [], list(windows)
    for number in (0, 2):
        trainer.write(theta(run, number))
        log_p_KT.append(log_probabilities(trainer, batches))
    expected = np.exp(council.fitted(np.stack(log_p_KT, axis=1)))
    assert list(load(tmp_path / "out").weights.values()) == pytest.approx(expected.tolist())
    assert expected.tolist() != pytest.approx([0.5, 0.5])


def test_the_tokenizer_of_the_run_goes_with_it(tiny: Tiny, tmp_path: Path) -> None:
    file = worlds.tokenizer(tmp_path / "tok.json")
    raw = to_mapping(tiny().config)
    raw["data"] |= {"tokenizer": str(file)}
    plan = with_checkpoints(make_plan(from_mapping(raw)))
    council_folder.export_council(str(plan.run_dir), tmp_path / "out")
    expected = of_run(str(plan.run_dir))[0].text("the river", tokens=12, seed=1)
    file.unlink()
    shutil.rmtree(plan.run_dir)
    assert load(tmp_path / "out").text("the river", tokens=12, seed=1) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 9}, "format 9, this version reads 2"),
        ({"eps": 1.0}, "eps is 1.0"),
        ({"eps": "much"}, "damaged"),
        ({"backend": "none"}, "damaged"),
        ({"top": 0}, "top is 0"),
        ({"after": 0}, "after 0"),
        ({"members": []}, "0 different members"),
        ({"members": [{"node": "world", "folder": "../x", "prior": 1.0}]}, "lies outside this folder"),
        ({"members": [{"node": "world", "folder": "1", "prior": 0.0}]}, "a prior is not above 0"),
        ({"members": [{"node": "world", "folder": "gone", "prior": 1.0}]}, "gone"),
        ({"members": [{"node": "world"}]}, "damaged"),
    ],
)
def test_a_damaged_council_is_refused(run: Plan, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    council_folder.export_council(str(run.run_dir), tmp_path, members="world")
    file = tmp_path / "council.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | change), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        load(tmp_path)


def test_an_export_that_fails_leaves_no_council_of_old_and_new_members(run: Plan, tmp_path: Path) -> None:
    council_folder.export_council(str(run.run_dir), tmp_path, members="world,a")
    shutil.rmtree(tmp_path / "2")
    (tmp_path / "2").write_text("in the way", encoding="utf-8")
    with pytest.raises(DataError, match="cannot export"):
        council_folder.export_council(str(run.run_dir), tmp_path, members="world,b")
    assert not council_folder.is_one(tmp_path)


# ---- commands ------------------------------------------------------------------------------------------------------


def test_the_commands(run: Plan, tmp_path: Path) -> None:
    where, folder = str(run.run_dir), str(tmp_path / "out")
    shown = CliRunner().invoke(cli.app, ["evaluate", where, "--council", "--tokens", "64", "--json"])
    assert shown.exit_code == 0, shown.output
    assert set(json.loads(shown.stdout)["rows"]) == {COUNCIL, *run.specs}
    shown = CliRunner().invoke(cli.app, ["evaluate", where, "--council", "--tokens", "64", "--members", "world,a"])
    assert "passes" in shown.stdout
    exported = CliRunner().invoke(cli.app, ["export", where, "--council", folder, "--members", "world,a"])
    assert "a council of 2 models is in" in exported.stdout
    texts = [
        CliRunner().invoke(cli.app, ["sample", place, "--council", *members, "--prompt", "The", "--tokens", "5"]).stdout
        for place, members in ((where, ["--members", "world,a"]), (folder, []))
    ]
    assert texts[0].startswith("The")
    assert texts[0] == texts[1]
    with pytest.raises(ConfigError, match=r"--members: .* is an exported council"):
        opened(folder, "world")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", "run", "--members", "world"], "--members: says how a council is made; give --council, too"),
        (["sample", "run", "--members", "world"], "--members: says how a council is made; give --council, too"),
        (["export", "run", "out", "--top", "2"], "--top: says how a council is made; give --council, too"),
        (["evaluate", "run", "--fit-prior"], "--fit-prior: says how a council is made; give --council, too"),
        (["export", "run", "out", "--prior-of", "a"], "--prior-of: says how a council is made; give --council, too"),
        (["evaluate", "run", "--council", "--top", "0"], "--top: got 0; give a number above 0"),
        (["evaluate", "run", "--document", "0"], "--document: got 0; give a number above 0"),
    ],
)
def test_options_that_mean_nothing_are_refused(words: list[str], message: str) -> None:
    error = CliRunner().invoke(cli.app, words).exception
    assert isinstance(error, ConfigError)
    assert str(error) == message
