"""Clients whose adapters have a smaller rank than the world's: truncated on the way in, zero-padded on the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import worlds
from support.pretrained import computed_here, logits, save_pretrained, shape_of
from support.ranks import SMALL, WORLD, model, plan_of, raw, record, scales, small_of, some

from worldlm_ray.client.client import Client
from worldlm_ray.client.shared import VirtualClients, slot_bytes
from worldlm_ray.config.loading import from_mapping
from worldlm_ray.config.schema import LoraConfig
from worldlm_ray.errors import CheckpointError, MessageError
from worldlm_ray.exchange.messages import Model, Residual
from worldlm_ray.experiments.evaluate import sound_theta
from worldlm_ray.model.pretrained_shape import draw_a
from worldlm_ray.model.smaller_rank import SmallerRank, smaller_rank
from worldlm_ray.plan import rundir
from worldlm_ray.plan.plan import make_plan
from worldlm_ray.simulation.simulator import simulate
from worldlm_ray.training.making import plain_trainer
from worldlm_ray.training.smaller_rank import SmallerRankTrainer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")


# ---- truncation and padding -----------------------------------------------------------------------------------------


def by_hand(key_patterns: list[str]) -> SmallerRank:
    """One adapter of rank 3 at a layer of 2 inputs and 4 outputs, and a client of rank 1."""
    parameters = (("q.lora_A.default.weight", (3, 2)), ("q.lora_B.default.weight", (4, 3)))
    shape = shape_of(parameters, lora=LoraConfig(r=3, alpha=6.0))
    found = smaller_rank(shape, shape.layout(key_patterns), 1)
    assert found is not None
    return found


def test_the_first_rows_of_a_and_columns_of_b_come_in_and_go_out() -> None:
    rank = by_hand([])
    values = np.arange(1, 19, dtype=np.float32)  # A is [[1 2] [3 4] [5 6]], B is [[7 8 9] [10 11 12] ...]
    assert rank.cut(values).tolist() == [1, 2, 7, 10, 13, 16]
    padded = [1, 2, 0, 0, 0, 0, 7, 0, 0, 10, 0, 0, 13, 0, 0, 16, 0, 0]
    assert rank.padded(rank.cut(values)).tolist() == padded
    out = np.full(18, 9.0, np.float32)
    assert rank.padded(rank.cut(values), out) is out
    assert out.tolist() == padded == rank.within(values).tolist()
    assert rank.within(values[6:9], start=6).tolist() == [7, 0, 0]
    assert rank.holds(out)
    assert not rank.holds(values)
    assert not rank.within(np.full(18, np.nan, np.float32))[[2, 8]].any(), "what is cut off is not multiplied"


def test_shapes_scale_and_key_layers_are_those_of_the_rank() -> None:
    rank = by_hand(["*.lora_A.*"])  # behind B: [B | A]
    assert [(e.name[2:8], e.shape, e.offset) for e in rank.layout.entries] == [
        ("lora_B", (4, 1), 0),
        ("lora_A", (1, 2), 4),
    ]
    assert (rank.layout.backbone_size, rank.layout.key_size) == (4, 2)
    [layer] = rank.layout.key_layers
    assert (layer.start, layer.stop) == (0, 2)
    assert rank.shape.parameters == (("q.lora_A.default.weight", (1, 2)), ("q.lora_B.default.weight", (4, 1)))
    assert rank.shape.lora.alpha / rank.shape.lora.r == 6.0 / 3
    assert rank.cut(np.arange(1, 19, dtype=np.float32)).tolist() == [1, 4, 7, 10, 13, 14]


def test_the_worlds_rank_is_no_smaller_one() -> None:
    rank = by_hand([])
    assert smaller_rank(rank.shape, rank.layout, 1) is None
    assert smaller_rank(rank.shape, rank.layout, None) is None


def test_a_frozen_a_of_a_smaller_rank_is_the_beginning_of_the_worlds() -> None:
    whole = draw_a("model.q.lora_A.default.weight", (WORLD, 32), seed=3)
    np.testing.assert_array_equal(draw_a("model.q.lora_A.default.weight", (SMALL, 32), seed=3), whole[:SMALL])


@pytest.mark.parametrize("kind", ["llama_tied_gqa", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("freeze_a", [False, True])
def test_a_smaller_rank_computes_what_the_worlds_does_with_zeros(tmp_path: Path, kind: str, freeze_a: bool) -> None:
    found = raw(tmp_path, save_pretrained(tmp_path / "base", kind))
    found["model"]["lora"]["freeze_a"] = freeze_a
    plan = make_plan(from_mapping(found))
    client, rank = small_of(plan)
    assert isinstance(client.trainer, SmallerRankTrainer)
    theta = some(plan)
    client.trainer.write(theta)
    np.testing.assert_array_equal(client.trainer.read(), rank.within(theta))
    own, whole = client.trainer.own.model.root, plain_trainer(plan.shape, plan.layout, client.spec.settings)
    whole.write(rank.within(theta))
    assert set(scales(own)) == {16 / WORLD} == set(scales(whole.model.root))
    # The same sums of the same terms, in fp64, since products of another shape add them in another order.
    computed = logits(own.double())
    np.testing.assert_allclose(computed, logits(whole.model.root.double()), atol=1e-13)
    assert np.abs(computed - computed_here(plan, theta)).max() > 1e-2, "the rows beyond are not for nothing"


# ---- a client --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["fp32", "int8", "int4"])
def test_a_client_trains_and_keeps_moments_of_its_rank_only(tmp_path: Path, base: Path, codec: str) -> None:
    plan = plan_of(tmp_path, base, exchange={"codec": codec})
    client, rank = small_of(plan)
    assert isinstance(client.trainer, SmallerRankTrainer)
    parent = some(plan)
    client.begin(model(parent), now_s=0.0)
    np.testing.assert_array_equal(client.link.anchor, rank.within(parent))
    client.train()
    assert client.trainer.own.flat.numel() == rank.layout.size == plan.layout.size * SMALL // WORLD
    assert {values.size for values in client.trainer.optimizer_state().values()} == {rank.layout.size, 1}
    update = client.update()
    assert update.values.size == plan.layout.size
    assert rank.holds(update.values)
    assert rank.cut(update.values).any()
    if codec != "fp32":
        assert client.link.codec_error is not None
        assert rank.holds(client.link.codec_error), "no rounding error creeps beyond the rank"


def test_models_of_others_are_measured_at_the_worlds_rank(tmp_path: Path, base: Path) -> None:
    plan = plan_of(tmp_path, base)
    client, rank = small_of(plan)
    theta = some(plan)
    whole = plain_trainer(plan.shape, plan.layout, client.spec.settings)
    whole.write(theta)
    windows = list(client.dataset.heldout_windows(256, context=16, batch_size=4))
    assert client.trainer.evaluate(windows, parameters=theta) == whole.evaluate(windows)
    client.trainer.write(theta)
    own = client.trainer.evaluate(windows)
    assert client.trainer.evaluate(windows, parameters=rank.within(theta)) == own
    assert abs(own[0] - whole.evaluate(windows)[0]) > 1.0
    measured = client.measure_above("world", theta, version=1, now_s=0.0)
    assert measured is not None
    assert measured.loss == pytest.approx(whole.evaluate(windows)[0] / own[1])  # a token is a byte


def test_only_what_the_client_takes_counts_as_a_step_of_its_parent(tmp_path: Path, base: Path) -> None:
    plan = plan_of(tmp_path, base, merge={"client": 1.0, "max_model_step": 0.5})
    client, rank = small_of(plan)
    first = some(plan)
    client.begin(model(first), now_s=0.0)
    client.round = 1
    far = np.where(rank.inside, first, first + np.float32(10.0))
    assert client.begin(model(far, version=2), now_s=1.0)[0].__class__.__name__ == "MergeRecord"
    assert client.link.base_version == 2


def test_a_residual_comes_in_within_the_rank(tmp_path: Path, base: Path) -> None:
    from worldlm_ray.client.received import of_rank

    found = raw(tmp_path, base)
    found["model"]["key_layers"] = ["*.lora_B.*"]
    plan = make_plan(from_mapping(found))
    client, rank = small_of(plan)
    layer = plan.layout.key_layers[1]
    values = np.ones(layer.stop - layer.start, np.float32)
    residual = Residual(origin="world/north", layer=layer.name, tokens=1.0, age=0, values=values)
    taken = of_rank(model(some(plan), residuals=(residual,)), client.rank)
    assert isinstance(taken, Model)
    assert rank.holds(taken.values)
    assert taken.residuals[0].values.sum() == values.size * SMALL / WORLD
    error = MessageError("not_finite", "x")
    assert of_rank(error, client.rank) is error


@pytest.mark.parametrize("merge", [{"client": "validated"}, {"client": "apart", "proximal": 0.1}, {"client": 0.5}])
def test_clients_of_two_models_stay_within_their_rank(
    tmp_path: Path, base: Path, merge: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = record(monkeypatch)
    plan = rundir.create(plan_of(tmp_path, base, merge=merge, budget={"rounds": 3}))
    simulate(plan)
    _, rank = small_of(plan)
    assert len(made["world/south/b"]) == 3
    assert all(rank.holds(update.values) and update.values.any() for update in made["world/south/b"])
    served = sound_theta(plan, plan.node("world/south/b"))
    assert rank.holds(served)
    assert served.any()


def test_privacy_of_records_adds_noise_within_the_rank(tmp_path: Path, base: Path) -> None:
    privacy = {"unit": "record", "noise_multiplier": 1.0, "grad_sample_mode": "ghost"}
    plan = plan_of(tmp_path, base, privacy=privacy)
    client, rank = small_of(plan)
    client.begin(model(some(plan)), now_s=0.0)
    client.train()
    update = client.update()
    assert rank.holds(update.values)
    assert rank.cut(update.values).all()


def test_clients_of_a_process_take_turns_at_one_model_of_their_rank(tmp_path: Path, base: Path) -> None:
    found = raw(tmp_path, base)
    found["training"]["lora_rank"] = SMALL
    found["world"] = {"children": [worlds.crowd("phone", tmp_path, copies=2)]}
    plan = make_plan(from_mapping(found))
    together = VirtualClients(plan, plan.root.clients)
    together.prepare()
    ours, theirs = [together.make(s.path) for s in plan.root.clients], [Client(plan, s) for s in plan.root.clients]
    for version in (1, 2):
        for our, their in zip(ours, theirs, strict=True):
            for one in (our, their):
                one.begin(model(some(plan, version), version), now_s=0.0)
                one.train()
            np.testing.assert_array_equal(our.update().values, their.update().values)
    assert together.shared.swaps > 1
    for our in ours:
        together.settle(our)
    together.shared.deactivate()
    step_counts = 2 * 4
    assert together.store.memory_bytes == sum(slot_bytes(plan, spec) for spec in plan.root.clients) + step_counts
    assert slot_bytes(plan, plan.root.clients[0]) < 4 * plan.layout.nbytes


def test_a_round_that_was_interrupted_goes_on_to_the_same_bits(tmp_path: Path, base: Path) -> None:
    plan = plan_of(tmp_path, base)
    whole, parts, again = (small_of(plan)[0] for _ in range(3))
    whole.begin(model(some(plan)), now_s=0.0)
    whole.train()
    parts.begin(model(some(plan)), now_s=0.0)
    asked = iter([False, False, True])
    parts.train(lambda: next(asked))
    again.restore(*parts.state())
    again.train()
    np.testing.assert_array_equal(again.update().values, whole.update().values)
    other = Client(plan, plan.node("world/north/a"))
    with pytest.raises(CheckpointError, match="another rank of adapters"):
        other.restore(*parts.state())
