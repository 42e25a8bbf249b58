"""Which model a client's validation text chooses, and what the client serves at the end."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.worlds import TINY_MODEL

from worldlm_ray.client.client import Client
from worldlm_ray.client.own_model import BASE, OWN, PARENT, OwnModel
from worldlm_ray.errors import ConfigError
from worldlm_ray.exchange.messages import Model
from worldlm_ray.plan import build
from worldlm_ray.plan.plan import Plan
from worldlm_ray.records import MergeRecord
from worldlm_ray.simulation.simulator import simulate
from worldlm_ray.storage import checkpoint
from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.training.local import LocalTrainer
from worldlm_ray.training.trainer import Proximal


def vector(*values: float) -> Flat:
    return np.array(values, np.float32)


def distance_to(*best: float) -> Callable[[Flat], float]:
    """A loss that is least at one model."""
    return lambda values: float(np.abs(values - vector(*best)).sum())


@pytest.mark.parametrize(
    ("own", "base", "parent", "expected"),
    [
        (vector(1.0), vector(2.0), vector(3.0), OWN),
        (vector(2.0), vector(1.0), vector(3.0), BASE),
        (vector(3.0), vector(2.0), vector(1.0), PARENT),
        (vector(1.0), vector(1.0), vector(1.0), PARENT),
        (vector(2.0), None, vector(3.0), OWN),
        (vector(1.0), None, vector(math.nan), OWN),
    ],
)
def test_the_model_with_the_lowest_loss_is_chosen(own: Flat, base: Flat | None, parent: Flat, expected: str) -> None:
    choice = OwnModel(distance_to(0.0)).choose(own=own, base=base, parent=parent)
    assert choice.name == expected


@pytest.mark.parametrize(
    ("best", "parent", "share", "served"),
    [
        (4.0, 0.0, 0.25, 1.0),  # the least loss lies at 1
        (2.0, 0.0, 0.5, 1.0),
        (1.0, 0.0, 1.0, 1.0),
        (3.0, 1.0, 0.0, 1.0),
    ],
)
def test_the_best_blend_with_the_parents_last_model_is_served(
    best: float, parent: float, share: float, served: float
) -> None:
    own_model = OwnModel(distance_to(1.0))
    own_model.choose(own=vector(best), base=None, parent=vector(100.0))
    found = own_model.serve(own=vector(50.0), base=vector(60.0), parent=vector(parent))
    assert (own_model.served, found[0]) == (share, served)


def test_what_is_served_is_chosen_on_all_validation_text_and_a_rounds_model_on_less() -> None:
    """The two disagree: by the text of every round 1 is best, by all text 3."""
    seen: list[str] = []

    def screen(values: Flat) -> float:
        seen.append("screen")
        return distance_to(1.0)(values)

    def validate(values: Flat) -> float:
        seen.append("validate")
        return distance_to(3.0)(values)

    own_model = OwnModel(validate, screen=screen)
    assert own_model.choose(own=vector(1.0), base=vector(3.0), parent=vector(2.0)).name == OWN
    assert seen == ["screen"] * 3
    seen.clear()
    assert own_model.serve(own=vector(8.0), base=vector(3.5), parent=vector(0.0))[0] == 2.625
    assert seen == ["validate"] * 7, "the best, the base and the own model, then four blends"
    assert own_model.served == 0.75


def test_the_best_model_of_an_earlier_round_is_kept_over_a_restart() -> None:
    own_model = OwnModel(distance_to(1.0))
    own_model.choose(own=vector(1.5), base=None, parent=vector(9.0))
    own_model.choose(own=vector(7.0), base=vector(8.0), parent=vector(9.0))
    again = OwnModel(distance_to(1.0))
    again.restore(*own_model.state())
    assert again.best_loss == 0.5
    assert again.serve(own=vector(7.0), base=None, parent=vector(9.0))[0] == 1.5


# ---- a client --------------------------------------------------------------------------------------------------------


@pytest.fixture
def plan(tiny: Callable[..., Plan]) -> Plan:
    return tiny(budget={"rounds": 4}, merge={"client": "validated"}, model=TINY_MODEL | {"key_layers": []})


def moved(plan: Plan, by: float, *, version: int = 1) -> Model:
    values = build.initial(plan) + np.random.default_rng(version).normal(scale=by, size=plan.layout.size)
    values = values.astype(np.float32)
    return Model(version=version, progress=0.0, finished=False, tokens=1.0, last_seq=0, values=values)


def after_a_round(plan: Plan, parent: Model) -> Client:
    """A client that has trained a round, pushed it, and pulled its parent's model."""
    client = Client(plan, plan.root.clients[0])
    client.begin(moved(plan, 0.0, version=0), now_s=0.0)
    client.train()
    client.update()
    client.begin(parent, now_s=0.0)
    return client


def test_both_models_are_trained_on_the_whole_batch(plan: Plan) -> None:
    bad = moved(plan, 1.0)  # worse than any model that has been trained
    client = after_a_round(plan, bad)
    own, moments = client.trainer.read(), client.trainer.own.optimizer_state()  # type: ignore[attr-defined]
    assert client.trainer.beside() is not None
    alone = []
    for values in (own, bad.values):
        trainer = LocalTrainer(plan.shape, plan.layout, client.training, threads=1)
        trainer.write(values)
        trainer.load_optimizer_state(moments)
        trainer.run(client._batches(0), client._rate)
        alone.append(trainer.read())
    client.train()
    assert client.trainer.read().tobytes() == alone[0].tobytes()
    np.testing.assert_array_equal(client.update().values, alone[1] - bad.values)


def test_a_client_tells_whether_it_follows(plan: Plan) -> None:
    client = Client(plan, plan.root.clients[0])
    told = []
    for version, by in enumerate((0.0, 1.0, 0.0)):  # what is as bad as the beginning follows what is worse
        told += [record.m for record in client.begin(moved(plan, by, version=version), now_s=0.0)]  # type: ignore[attr-defined]
        client.train()
        client.update()
    assert told == [0.0, 0.0]
    better = client.trainer.read()
    [record] = client.begin(
        Model(version=3, progress=0.0, finished=False, tokens=1.0, last_seq=0, values=better), now_s=0.0
    )
    assert isinstance(record, MergeRecord)
    assert record.m == 1.0
    assert client.trainer.beside() is None


def test_a_round_of_two_models_goes_on_to_the_same_bits_after_a_restart(plan: Plan) -> None:
    whole, parts = (after_a_round(plan, moved(plan, 1.0)) for _ in range(2))
    whole.train()
    asked = iter([False, True])
    parts.train(lambda: next(asked))
    again = Client(plan, plan.root.clients[0])
    again.restore(*parts.state())
    again.train()
    assert again.update().values.tobytes() == whole.update().values.tobytes()
    last = moved(plan, 0.5, version=2)
    for client in (again, whole):
        client.serve(last, now_s=0.0)
    assert again.trainer.read().tobytes() == whole.trainer.read().tobytes()


def test_what_is_served_is_served_once(plan: Plan) -> None:
    client = after_a_round(plan, moved(plan, 1.0))
    client.train()
    client.update()
    client.serve(moved(plan, 0.5, version=2), now_s=0.0)
    served = client.trainer.read()
    client.serve(moved(plan, 0.0, version=3), now_s=0.0)
    assert client.trainer.read().tobytes() == served.tobytes()


def test_a_private_client_serves_its_parents_last_model(tiny: Callable[..., Plan]) -> None:
    privacy = {"unit": "record", "noise_multiplier": 1.0, "grad_sample_mode": "hooks"}
    plan = tiny(merge={"client": "validated"}, privacy=privacy)
    client = Client(plan, plan.root.clients[0])
    assert client.own_model is None
    last = moved(plan, 0.1)
    client.serve(last, now_s=0.0)
    assert client.trainer.read().tobytes() == last.values.tobytes()


def test_without_validation_text_there_is_nothing_to_choose_on(tiny: Callable[..., Plan]) -> None:
    with pytest.raises(ConfigError, match=r"validation_fraction.*no text to decide on"):
        tiny(merge={"client": "validated"}, data={"validation_fraction": 0.0})


# ---- fine-tuning at home ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [[], ["lm_head.*"]])
def test_rounds_of_fine_tuning_train_at_home_and_push_no_change(tiny: Callable[..., Plan], keys: list[str]) -> None:
    plan = tiny(budget={"rounds": 4}, merge={"fine_tune": 0.5}, model=TINY_MODEL | {"key_layers": keys})
    client, backbone = Client(plan, plan.root.clients[0]), slice(0, plan.layout.backbone_size)
    changes, starts = [], []
    for version in range(4):
        client.begin(moved(plan, 0.01, version=version), now_s=0.0)
        starts.append(client.trainer.read())
        client.train()
        ended = client.trainer.read()
        changes.append(client.update().values)
    assert [bool(np.any(change)) for change in changes] == [True, True, False, False]
    expected = moved(plan, 0.01, version=2).values  # it begins from its parent's model, and goes on from its own
    np.testing.assert_array_equal(starts[2][backbone], expected[backbone])
    assert np.any(ended != starts[3])
    again = Client(plan, plan.root.clients[0])
    again.restore(*client.state())
    assert again.at_home


# ---- a model that is drawn to another one ----------------------------------------------------------------------------


def test_the_proximal_term_adds_its_gradient_to_that_of_the_loss(plan: Plan) -> None:
    """FedProx, equation 2: the gradient of mu / 2 times |w - w_t|^2 is mu (w - w_t), before clipping."""
    client = Client(plan, plan.root.clients[0])
    training = replace(client.training, grad_clip=0.0)
    [batch] = [next(iter(client._batches(0)))]
    center, gradients = build.initial(plan) - np.float32(0.5), []
    for proximal in (None, Proximal(center=center, strength=0.25)):
        trainer = LocalTrainer(plan.shape, plan.layout, training, threads=1)
        trainer.write(build.initial(plan))
        trainer.run([batch], lambda _: 1e-3, proximal=proximal)
        gradients.append(trainer.gradient.numpy().copy())
    np.testing.assert_allclose(gradients[1] - gradients[0], np.full(plan.layout.size, 0.125), atol=1e-6)


@pytest.mark.parametrize(
    ("merge", "pushes"),
    [
        ({"client": "apart", "proximal": 1.0}, "base"),  # Ditto: the parent's model is trained as in FedAvg
        ({"client": 0.0, "proximal": 1.0}, "own"),  # MR-MTL: the mean of the own models is the center
        ({"client": 1.0, "proximal": 1.0}, "own"),  # FedProx: one model, which begins from the center
    ],
)
def test_what_is_drawn_and_what_is_pushed(tiny: Callable[..., Plan], merge: dict[str, object], pushes: str) -> None:
    plan = tiny(budget={"rounds": 4}, merge=merge, model=TINY_MODEL | {"key_layers": []})
    client, parent = after_a_round(plan, moved(plan, 0.1)), moved(plan, 0.1)
    own, base = client.trainer.read(), client.trainer.beside()
    state = getattr(client.trainer, "own", client.trainer).optimizer_state()
    expected = []
    for values, proximal in ((own, Proximal(center=parent.values, strength=1.0)), (parent.values, None)):
        trainer = LocalTrainer(plan.shape, plan.layout, client.training, threads=1)
        trainer.write(values)
        trainer.load_optimizer_state(state)
        trainer.run(client._batches(0), client._rate, proximal=proximal)
        expected.append(trainer.read())
    again = Client(plan, plan.root.clients[0])
    again.restore(*client.state())  # the center is in the checkpoint
    again.train()
    assert again.trainer.read().tobytes() == expected[0].tobytes()
    assert (base is not None) == (pushes == "base")
    start, trained = (parent.values, expected[1]) if pushes == "base" else (own, expected[0])
    np.testing.assert_array_equal(again.update().values, trained - start)


# ---- whole worlds ----------------------------------------------------------------------------------------------------


def test_the_worlds_model_is_that_of_federated_averaging_to_the_bit(tiny: Callable[..., Plan], tmp_path: Path) -> None:
    """Clients that go their own way spoil nothing for the others."""
    found = []
    rules: list[dict[str, object]] = [{"client": 1.0}, {"client": "apart", "proximal": 1.0}, {"client": "validated"}]
    for index, merge in enumerate(rules):
        plan = tiny(
            budget={"rounds": 3},
            run_dir=str(tmp_path / str(index)),
            aggregation={"trigger": "synchronous"},
            merge=merge,
            model=TINY_MODEL | {"key_layers": []},
        )
        found.append(simulate(plan).summary["params_sha256"])
    assert found[1:] == [found[0]] * 2
    [_, arrays] = checkpoint.load(checkpoint.folder(plan.run_dir, plan.root.clients[0].path))  # type: ignore[misc]
    [_, world] = checkpoint.load(checkpoint.folder(plan.run_dir, "world"))  # type: ignore[misc]
    loss = Client(plan, plan.root.clients[0])._loss_to_serve_by
    assert loss(arrays["theta"]) <= loss(world["theta"])  # it serves no worse than the world does


def test_an_asynchronous_world_in_which_clients_overlap_serves_too(tiny: Callable[..., Plan]) -> None:
    overlap = {"exchange": {"overlap": True}, "simulation": {"latency_s": 0.4}}
    plan = tiny(budget={"rounds": 4}, merge={"client": "validated"}, model=TINY_MODEL | {"key_layers": []}, **overlap)
    summary = simulate(plan).summary
    assert all(node["steps"] == 16 for node in summary["nodes"].values() if node["kind"] == "client")
    for spec in plan.root.clients:
        [meta, _] = checkpoint.load(checkpoint.folder(plan.run_dir, spec.path))  # type: ignore[misc]
        assert meta["own_model"]["served"] is not None
