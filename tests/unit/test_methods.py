"""Published methods, pinned to their update rules on numbers computed by hand, through the real node and merge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.drift import whole_run
from support.nodes import a_node
from support.worlds import client

from worldlm_ray.aggregation.events import Push
from worldlm_ray.aggregation.merge import Merger
from worldlm_ray.aggregation.node import Node
from worldlm_ray.client.client import Client
from worldlm_ray.config.loading import from_mapping, to_mapping
from worldlm_ray.config.schema import RunConfig
from worldlm_ray.errors import ConfigError
from worldlm_ray.exchange.messages import Model, Update, pack
from worldlm_ray.experiments.methods import FOR_ADAPTERS, METHODS, configure
from worldlm_ray.experiments.variants import VARIANTS
from worldlm_ray.plan.plan import Plan, make_plan
from worldlm_ray.reports.describe import describe
from worldlm_ray.tensors.layout import Layout, make_layout

SHAPES = [("body.weight", (2,)), ("head.weight", (2,))]


@pytest.fixture
def world(tiny: Callable[..., Plan], tmp_path: Path) -> RunConfig:
    """Three clients in two federations; links and speeds differ."""
    children: list[dict[str, Any]] = [
        {
            "federation": "north",
            "simulation": {"bandwidth_gbps": 0.5, "latency_s": 0.25},
            "aggregation": {"buffer_size": 2},
            "children": [
                client("a", tmp_path, 1, simulation={"bandwidth_gbps": 10.0, "latency_s": 0.5}),
                client("b", tmp_path, 2, training={"lr": 0.5}),
            ],
        },
        {"federation": "south", "children": [client("c", tmp_path, 3)]},
    ]
    return tiny(children).config


def node_of(config: RunConfig, path: str = "world", *, layout: Layout | None = None) -> Node:
    """The inner node that a method gives, on a model of two backbone and two head numbers unless a layout is given."""
    plan = make_plan(config)
    spec = plan.node(path)
    keys = ["head.*"] if config.model.key_layers else []
    layout = make_layout(SHAPES, keys, layers=1) if layout is None else layout
    return a_node(
        path=path,
        children=tuple(child.name for child in spec.children),
        aggregation=spec.settings.aggregation,
        merge=spec.settings.merge,
        has_parent=path != "world",
        layout=layout,
        initial=np.zeros(layout.size, np.float32),
        budget=config.budget,
    )


def push(node: Node, name: str, values: list[float], *, tokens: int = 10, base: int = 0) -> None:
    child = node.children[name]
    update = Update(
        sender=name,
        seq=child.last_seq + 1,
        base_version=base,
        tokens=tokens,
        started_tokens=0,
        values=np.array(values, np.float32),
    )
    node.handle(Push(sender=name, packed=pack(update, node.layout), now_s=0.0))


@pytest.mark.parametrize("method", sorted(set(METHODS) - FOR_ADAPTERS))
def test_every_method_gives_a_world_that_can_run(world: RunConfig, method: str) -> None:
    config = configure(alike(world), method)
    plan = make_plan(config)
    assert config.method == method
    assert len(plan.root.clients) == (1 if method == "pooled" else 3)
    flat = method not in ("worldlm", "hierfavg", "halos")
    assert (len(plan.root.inner) == 1) == flat


def test_fedavg_is_the_token_weighted_mean(world: RunConfig) -> None:
    node = node_of(configure(world, "fedavg"))
    push(node, "north.a", [1, 2, 3, 4], tokens=10)
    push(node, "north.b", [5, 6, 7, 8], tokens=30)
    assert node.version == 0
    push(node, "south.c", [0, 0, 0, 0], tokens=40)
    # (10 * 1 + 30 * 5) / 80 = 2, (10 * 2 + 30 * 6) / 80 = 2.5, ...
    assert node.theta.tolist() == [2.0, 2.5, 3.0, 3.5]


def test_diloco_is_nesterov_on_the_mean(world: RunConfig) -> None:
    node = node_of(configure(world, "diloco"))
    for _ in range(2):
        for name in list(node.children):
            push(node, name, [1, 0, 0, 0], base=node.version)
    # m1 = 1, step 0.7 (1 + 0.9) = 1.33; m2 = 1.9, step 0.7 (1 + 0.9 * 1.9) = 1.897
    assert node.theta[0] == pytest.approx(1.33 + 1.897)


def test_fedbuff_divides_by_the_number_of_updates_and_discounts_by_one_over_the_root(world: RunConfig) -> None:
    config = configure(world, "fedbuff")
    assert make_plan(config).root.settings.aggregation.buffer_size == 1  # half of three clients
    node = node_of(config)
    push(node, "north.a", [1, 0, 0, 0])
    push(node, "north.b", [1, 0, 0, 0])  # tau = 1
    assert node.theta[0] == pytest.approx(1.0 + 2**-0.5)


def test_hierfavg_exchanges_once_in_two_rounds_of_a_federation(world: RunConfig) -> None:
    node = node_of(configure(world, "hierfavg"), "world/north")
    for round_ in range(2):
        assert not node.parent.is_open
        push(node, "a", [1, 0, 0, 0], base=round_)
        push(node, "b", [3, 0, 0, 0], base=round_)
    assert node.theta[0] == 4.0
    assert node.parent.is_open


def test_halos_delays_momentum_at_both_levels_and_merges_a_quarter(world: RunConfig) -> None:
    plan = make_plan(configure(world, "halos"))
    north, root = plan.node("world/north").settings, plan.root.settings
    assert (north.aggregation.server_optimizer.name, root.aggregation.server_optimizer.name) == (
        "delayed_nesterov",
    ) * 2
    node = node_of(configure(world, "halos"), "world/north")
    push(node, "a", [1, 0, 0, 0])
    # lr g / N = 3.2 / 16 = 0.2; the momentum steps at the 16th update only.
    assert node.theta[0] == pytest.approx(0.2)
    assert north.merge.federation == 0.25
    assert north.merge.client == 1.0


def test_soup_is_the_plain_mean_whatever_the_tokens(world: RunConfig) -> None:
    node = node_of(configure(world, "soup"))
    push(node, "north.a", [1, 2, 3, 4], tokens=10)
    push(node, "north.b", [5, 6, 7, 8], tokens=30)
    push(node, "south.c", [0, 1, 2, 6], tokens=40)
    assert node.theta.tolist() == [2.0, 3.0, 4.0, 6.0]


def test_ties_trims_each_child_and_merges_what_has_the_elected_sign(world: RunConfig) -> None:
    shapes = [("body.weight", (10,))]
    config = configure(world, "ties")
    node = node_of(config, layout=make_layout(shapes, [], layers=1))
    # Two of ten numbers stay of each: 9 and -8; 4 and -5; -2 and 6.
    push(node, "north.a", [9, -8, 1, 0, 0, 0, 0, 0, 0, 0], tokens=1000)
    push(node, "north.b", [4, 3, 0, -5, 1, 0, 0, 0, 0, 0])
    push(node, "south.c", [-2, 6, 0, 0, 1, 1, 0, 0, 0, 0])
    # First: the sum 9 + 4 - 2 is positive, and (9 + 4) / 2 has that sign. Second: -8 + 6 is negative: -8 alone.
    assert node.theta.tolist() == [6.5, -8.0, 0, -5.0, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("method", ["soup", "ties"])
@pytest.mark.parametrize("budget", [{"rounds": 3}, {"tokens": 3 * 3 * 5 * 4 * 16 - 1}])
def test_one_shot_methods_train_as_long_as_others_at_the_same_rates(
    tiny: Callable[..., Plan], tmp_path: Path, method: str, budget: dict[str, int]
) -> None:
    children = [client(name, tmp_path, seed) for seed, name in enumerate("abc")]
    config = tiny(children, budget=budget, training={"local_steps": 5, "batch_size": 4}).config
    once, alone = (make_plan(configure(config, name)) for name in (method, "local"))
    ours, theirs = Client(once, once.root.clients[0]), Client(alone, alone.root.clients[0])
    assert ours.training.local_steps == 15
    batches, rates = list(ours._batches(0)), [ours._rate(step) for step in range(15)]
    for round_ in range(3):
        theirs.round, theirs.progress = round_, round_ * theirs._world_progress(5)
        part = slice(5 * round_, 5 * round_ + 5)
        np.testing.assert_array_equal(np.array(batches[part]), np.array(list(theirs._batches(0))))
        assert rates[part] == pytest.approx([theirs._rate(step) for step in range(5)])


@pytest.mark.parametrize("method", ["soup", "ties"])
def test_a_client_of_a_one_shot_method_ends_with_the_merged_model(
    tiny: Callable[..., Plan], tmp_path: Path, method: str
) -> None:
    children = [client(name, tmp_path, seed) for seed, name in enumerate("abc")]
    simulation, _ = whole_run(make_plan(configure(tiny(children).config, method)), tmp_path / "run")
    merged = simulation.nodes["world"].theta
    for one in simulation.clients.values():
        assert one.seq == 1
        assert one.trainer.read().tobytes() == merged.tobytes()


def test_serving_the_parents_model_goes_with_no_other_model_for_the_end(world: RunConfig) -> None:
    with pytest.raises(ConfigError, match=r"merge.serve_parent.*merge.fine_tune makes another model"):
        make_plan(configure(world, "soup+ft"))


@pytest.mark.parametrize(("method", "expected"), [("fedavg", [1, 1, 1, 1]), ("local", [5, 5, 5, 5])])
def test_what_a_client_takes_on_a_pull(world: RunConfig, method: str, expected: list[float]) -> None:
    assert merged(configure(world, method)) == expected


def test_fedper_takes_the_backbone_and_keeps_its_head(world: RunConfig) -> None:
    config = configure(replace(world, model=replace(world.model, key_layers=[])), "fedper")
    assert config.model.key_layers  # its own, where the world has none
    assert merged(config) == [1, 1, 5, 5]


def test_fedrep_is_fedper_with_the_head_first(world: RunConfig) -> None:
    config = configure(world, "fedrep")
    assert merged(config) == [1, 1, 5, 5]
    assert {spec.settings.training.head_first for spec in make_plan(config).root.clients} == {2 / 3}


def test_apfl_serves_half_of_a_personal_model_and_half_of_the_worlds(world: RunConfig) -> None:
    merges = [spec.settings.merge for spec in make_plan(configure(world, "apfl")).root.clients]
    assert {(merge.client, merge.mixture) for merge in merges} == {("apart", 0.5)}


def merged(config: RunConfig) -> list[float]:
    """A client's model of fives after a pull of its parent's model of ones."""
    settings = make_plan(config).root.clients[0].settings
    layout = make_layout(SHAPES, ["head.*"] if config.model.key_layers else [], layers=1)
    own, out = np.full(4, 5, np.float32), np.zeros(4, np.float32)
    parent = Model(version=1, progress=0.0, finished=False, tokens=1.0, last_seq=0, values=np.ones(4, np.float32))
    merger = Merger(path="world/a", layout=layout, rules=settings.aggregation, initial=np.zeros(4, np.float32))
    merger.backbone(settings.merge.client_m, own, own, parent, out=out)
    merger.keys(own, own, parent, own_tokens=1.0, now_s=0.0, out=out)
    return out.tolist()


def test_a_flat_tree_keeps_what_concerns_the_client(world: RunConfig) -> None:
    plan = make_plan(configure(world, "fedavg"))
    a, b, c = plan.root.clients
    assert [spec.name for spec in (a, b, c)] == ["north.a", "north.b", "south.c"]
    assert b.settings.training.lr == 0.5
    assert a.settings.simulation.bandwidth_gbps == 0.5
    assert a.settings.simulation.latency_s == 0.75
    assert a.settings.data.order == "world/north/a"


def alike(world: RunConfig) -> RunConfig:
    """The world with one training for all."""
    mapping = to_mapping(world)
    mapping["world"]["children"][0]["children"][1].pop("training")
    return from_mapping(mapping)


def test_pooled_is_one_client_whose_steps_take_everybodys_batch(world: RunConfig) -> None:
    central, apart = (make_plan(configure(alike(world), method)) for method in ("pooled", "local"))
    [one] = [Client(central, spec) for spec in central.root.clients]
    each = [Client(apart, spec) for spec in apart.root.clients]
    assert one.round_tokens == sum(client.round_tokens for client in each)
    [shown] = [n for n in describe(central)["nodes"].values() if n["kind"] == "client"]
    assert shown["tokens_per_round"] == one.round_tokens

    def drawn(client: Client) -> list[Any]:
        return list(client.dataset.batches(0, 3, steps=2, batch_size=4, context=16))

    together, alone = drawn(one), [drawn(client) for client in each]
    for step in range(2):
        for part in (0, 1):
            assert np.array_equal(together[step][part], np.concatenate([mine[step][part] for mine in alone]))


def test_an_unknown_method_is_named_with_the_closest(world: RunConfig) -> None:
    with pytest.raises(ConfigError, match="'fedavg'"):
        configure(world, "fedavgg")


def test_variants_change_single_settings_at_every_node(world: RunConfig) -> None:
    plain, changed = (make_plan(configure(world, m)) for m in ("worldlm", "worldlm+buffered+undiscounted+keys"))
    for spec in plain.root.walk():
        before, after = spec.settings, changed.node(spec.path).settings
        assert after.aggregation.buffer_size == 4
        assert after.aggregation.staleness.fn == "constant"
        assert (after.training, after.merge, after.data) == (before.training, before.merge, before.data)
    assert changed.layout.key_layers
    assert changed.config.method == "worldlm+buffered+undiscounted+keys"


def test_every_variant_is_a_setting_that_exists(world: RunConfig) -> None:
    for variant in VARIANTS:
        make_plan(configure(world, f"worldlm+{variant}"))


def test_pooled_wants_one_training_for_all(world: RunConfig) -> None:
    with pytest.raises(ConfigError, match=r"that of world/north/b is not that of world/north/a; leave pooled out"):
        configure(world, "pooled")


def test_an_unknown_variant_is_named_with_the_closest(world: RunConfig) -> None:
    with pytest.raises(ConfigError, match="unknown variant 'unifrom'; did you mean 'uniform'"):
        configure(world, "worldlm+unifrom")


def test_worldlm_is_the_configuration_itself(world: RunConfig) -> None:
    before, after = make_plan(world), make_plan(configure(world, "worldlm"))
    assert before.kinds == after.kinds
    for spec in before.root.walk():
        assert after.node(spec.path).settings.aggregation == spec.settings.aggregation
    assert to_mapping(world)["budget"] == to_mapping(configure(world, "worldlm"))["budget"]


PROMISE = {"unit": "record", "noise_multiplier": 2.0, "target_epsilon": 3.0}


@pytest.mark.parametrize("method", sorted(set(METHODS) - FOR_ADAPTERS - {"pooled", "ditto", "apfl", "fedrep"}))
def test_no_method_loses_a_promise_of_privacy(tiny: Callable[..., Plan], tmp_path: Path, method: str) -> None:
    children = [
        {"federation": "f", "privacy": PROMISE, "children": [client("a", tmp_path, 1)]},
        client("b", tmp_path, 2),
    ]
    configured = make_plan(configure(tiny(children).config, method))
    promises = {spec.name: spec.settings.privacy for spec in configured.root.clients}
    assert {name.split(".")[-1]: privacy.noise_multiplier for name, privacy in promises.items()} == {
        "a": 2.0,
        "b": None,
    }


def test_pooled_pools_no_private_text(tiny: Callable[..., Plan], tmp_path: Path) -> None:
    children = [client("a", tmp_path, 1), client("b", tmp_path, 2, privacy=PROMISE)]
    with pytest.raises(ConfigError, match="world/b trains with differential privacy"):
        configure(tiny(children).config, "pooled")


@pytest.mark.parametrize(
    ("method", "reason"),
    [("ditto", "it has one model"), ("apfl", "it has one model"), ("fedrep", "a step trains its whole model")],
)
def test_a_private_client_has_one_model_that_is_trained_whole(
    tiny: Callable[..., Plan], tmp_path: Path, method: str, reason: str
) -> None:
    children = [client("a", tmp_path, 1), client("b", tmp_path, 2, privacy=PROMISE)]
    with pytest.raises(ConfigError, match=f"promises privacy of records: {reason}"):
        make_plan(configure(tiny(children).config, method))


@pytest.mark.parametrize(
    ("method", "client", "proximal"), [("fedprox", 1.0, 0.1), ("ditto", "apart", 0.1), ("mr_mtl", 0.0, 0.1)]
)
def test_a_client_is_drawn_to_the_worlds_model(
    tiny: Callable[..., Plan], method: str, client: Any, proximal: float
) -> None:
    merge = make_plan(configure(tiny().config, method)).root.clients[0].settings.merge
    assert (merge.client, merge.proximal) == (client, proximal)
