"""A fragment of the backbone per exchange: cuts, numbers, bytes, and that nothing is lost and nothing counted twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.drift import drifting
from support.worlds import client as client_entry
from support.worlds import two_levels
from test_faults import run
from test_node import fingerprint, make, of, reason, saved_and_loaded, send

from worldlm_ray.aggregation.events import Answer, Exchange, ParentModel, Pull, Push, Serve
from worldlm_ray.aggregation.node import Node
from worldlm_ray.client.client import Client
from worldlm_ray.config.federated import AggregationConfig, ServerOptimizerConfig
from worldlm_ray.config.schema import ModelConfig
from worldlm_ray.errors import CheckpointError, ConfigError, MessageError
from worldlm_ray.exchange.messages import (
    Model,
    Packed,
    Update,
    fragment_of,
    pack,
    read_header,
    unpack_model,
    unpack_update,
)
from worldlm_ray.exchange.replies import Welcome
from worldlm_ray.model.shape import resolve_shape
from worldlm_ray.plan import rundir
from worldlm_ray.plan.plan import Plan
from worldlm_ray.records import PullRecord, PushRecord, Record
from worldlm_ray.reports.describe import describe
from worldlm_ray.simulation.simulator import simulate
from worldlm_ray.tensors.buffers import Flat, frozen
from worldlm_ray.tensors.layout import Layout, make_layout, module_of

Tiny = Callable[..., Plan]
SHAPES = [("one.weight", (2,)), ("two.weight", (2,)), ("three.weight", (1,)), ("head.weight", (2,))]
LAYOUT = make_layout(SHAPES, ["head.*"], layers=0)  # in two fragments: [one | two, three]
START = np.array([1, 2, 3, 4, 5, 10, 20], np.float32)
PLAIN: dict[str, Any] = {"layout": LAYOUT, "initial": START, "child_fragments": 2}


# ---- where the cuts are ------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.data())
def test_fragments_cover_the_backbone_and_cut_no_parameter(sizes: list[int], data: st.DataObject) -> None:
    layout = make_layout([(f"model.layers.{i // 3}.{i}", (size,)) for i, size in enumerate(sizes)], [], layers=10)
    parts = layout.fragments(count := data.draw(st.integers(1, len(sizes))))
    assert len(parts) == count
    assert [parts[0].start, *(part.stop for part in parts)] == [*(part.start for part in parts), layout.backbone_size]
    assert all(part.start < part.stop for part in parts)
    assert {part.start for part in parts} <= {entry.offset for entry in layout.entries}


BLOCKS = ("model.layers.0", "model.layers.1")


def test_transformer_blocks_stay_whole_where_they_balance() -> None:
    layout = resolve_shape(ModelConfig(preset="nano"), vocab_size=256).layout(ModelConfig().key_layers)
    backbone = [entry for entry in layout.entries if entry.offset < layout.backbone_size]
    blocks = [min(e.offset for e in backbone if module_of(e.name) == name) for name in BLOCKS]
    assert [part.start for part in layout.fragments(2)] == blocks
    # Three of two blocks: no border of blocks will do.
    sizes = [part.stop - part.start for part in layout.fragments(3)]
    assert max(sizes) <= 1.25 * layout.backbone_size / 3


@pytest.mark.parametrize("count", [0, 4])
def test_more_fragments_than_parameters_there_cannot_be(count: int) -> None:
    with pytest.raises(ValueError, match="the backbone has 3 parameters"):
        LAYOUT.fragments(count)


# ---- the numbers of an aggregation -------------------------------------------------------------------------------


def update(sender: str, seq: int, change: list[float], *, tokens: int = 10, base: int = 0, keys: float = 0.0) -> Update:
    return Update(
        sender=sender,
        seq=seq,
        base_version=base,
        tokens=tokens,
        started_tokens=0,
        values=np.array([*change, keys, keys], np.float32),
        fragment=seq % 2,
        fragments=2,
    )


def theta(node: Node) -> list[float]:
    return [float(value) for value in node.theta]


def test_two_children_and_two_fragments_by_hand() -> None:
    node = make(("a", "b"), trigger="synchronous", **PLAIN)
    # Seq 1 carries the second fragment: (10 * 1 + 30 * 5) / 40 = 4 everywhere; the first stays as it is.
    send(node, update("a", 1, [1, 1, 1], tokens=10, keys=4.0))
    send(node, update("b", 1, [5, 5, 5], tokens=30, keys=4.0))
    assert theta(node) == pytest.approx([1, 2, 7, 8, 9, 14, 24])
    # Seq 2 carries the first: (10 * 2 + 10 * 6) / 20 = 4, and (10 * -2 + 10 * 0) / 20 = -1.
    send(node, update("a", 2, [2, -2], base=1))
    send(node, update("b", 2, [6, 0], base=1))
    assert theta(node) == pytest.approx([5, 1, 7, 8, 9, 14, 24])


def test_a_fragments_mean_is_over_those_who_carried_it() -> None:
    # Three updates of one aggregation: a and b sent the second fragment, and a the first besides.
    node = make(("a", "b"), buffer_size=3, **PLAIN)
    send(node, update("a", 1, [1, 1, 1], tokens=10))
    send(node, update("a", 2, [8, 8], tokens=20))
    send(node, update("b", 1, [5, 5, 5], tokens=30))
    assert node.version == 1
    assert theta(node) == pytest.approx([9, 10, 7, 8, 9, 10, 20])
    assert node.tokens == 60


def test_the_default_rate_is_the_share_of_those_who_carried_a_fragment() -> None:
    node = make(("a", "b"), buffer_size=2, server_optimizer=ServerOptimizerConfig(), **PLAIN)
    send(node, update("a", 1, [4, 4, 4]))
    send(node, update("a", 2, [4, 4]))
    assert theta(node)[:5] == pytest.approx([3, 4, 5, 6, 7])


@pytest.mark.parametrize("name", ["nesterov", "delayed_nesterov", "adam"])
def test_a_server_optimizer_steps_only_what_was_aggregated(name: str) -> None:
    # Each fragment ends where a node whose children send nothing but that one would have it.
    rules = AggregationConfig().server_optimizer
    rules = replace(rules, name=name, lr=0.5, momentum=0.9, delay=2)
    node = make(("a",), server_optimizer=rules, **PLAIN)
    for seq in range(1, 8):
        send(node, update("a", seq, [seq, -seq, 1.0][: 2 if seq % 2 == 0 else 3], base=seq - 1))
    for number, size in ((0, 2), (1, 3)):
        alone = make_layout([("body.weight", (size,))], [], layers=0)
        start = START[:2] if number == 0 else START[2:5]
        twin = make(("a",), server_optimizer=rules, layout=alone, initial=start)
        for turn, seq in enumerate([seq for seq in range(1, 8) if seq % 2 == number], start=1):
            values = np.array([seq, -seq, 1.0][:size], np.float32)
            one = Update(sender="a", seq=turn, base_version=turn - 1, tokens=10, started_tokens=0, values=values)
            send(twin, one)
        part = LAYOUT.fragments(2)[number]
        np.testing.assert_array_equal(node.theta[part], twin.theta)


# ---- what is refused ---------------------------------------------------------------------------------------------


def test_a_fragment_out_of_its_turn_is_refused() -> None:
    node = make(("a",), **PLAIN)
    before = fingerprint(node, counters=False)
    wrong = replace(update("a", 1, [1, 1, 1]), fragment=0)
    whole = replace(wrong, fragments=1, values=np.ones(7, np.float32))  # from a child that sends the whole backbone
    for message in (wrong, replace(wrong, fragment=7), replace(wrong, fragments=9), whole):
        assert reason(send(node, message)) == "wrong_fragment", message
    for name, value, why in (("fragment", -1, "malformed"), ("fragments", "2", "malformed"), ("seq", 2, "wrong_fragm")):
        fields = read_header(pack(update("a", 1, [1, 1, 1]), LAYOUT).header) | {name: value}
        with pytest.raises(MessageError, match=why):
            unpack_update(Packed(msgpack.packb(fields), np.zeros(5, np.float32)), LAYOUT)
    assert reason(send(node, replace(update("a", 1, [1, 1, 1]), values=np.zeros(7, np.float32)))) == "wrong_shape"
    assert fingerprint(node, counters=False) == before


def test_a_fragment_that_is_not_there_is_not_served() -> None:
    node = make(("a",), **PLAIN)
    with pytest.raises(MessageError, match="there is no fragment 2 of 2"):
        node.handle(Pull(child="a", started_tokens=0, fragment=2, now_s=0.0))


def test_children_that_want_the_same_fragment_share_one_buffer() -> None:
    node = make(("a", "b"), buffer_size=1, **PLAIN)
    asked = [Pull(child=name, started_tokens=0, fragment=1, now_s=0.0) for name in ("a", "b")]
    first, second = (of(Serve, node.handle(pull))[0].model for pull in asked)
    assert first.values is second.values
    assert first.values.tolist() == [3, 4, 5, 10, 20]
    shared = node.use_shared_copy(first.values, first.values.copy())
    assert of(Serve, node.handle(asked[0]))[0].model.values is shared
    send(node, update("a", 1, [1, 1, 1]))
    assert of(Serve, node.handle(asked[0]))[0].model.values.tolist() == [4, 5, 6, 10, 20]
    assert first.values.tolist() == [3, 4, 5, 10, 20]


def test_wrong_configurations_say_so(tiny: Tiny, tmp_path: Path) -> None:
    for wrong in (0, -1, 10_000, 1.5):
        with pytest.raises(ConfigError, match=r"exchange\.fragments"):
            tiny(exchange={"fragments": wrong})
    with pytest.raises(ConfigError, match=r"exchange\.fragments: got 2, but the backbone has 0 parameters"):
        tiny(exchange={"fragments": 2}, model={**tiny().config.model.__dict__, "key_layers": ["*"]})
    one, other = client_entry("a", tmp_path, 1), client_entry("b", tmp_path, 2, exchange={"fragments": 2})
    with pytest.raises(ConfigError, match=r"world\.children\[1\]\.exchange\.fragments: 2 differs from the 1"):
        tiny([one, other])
    with pytest.raises(ConfigError, match=r"merge\.client: adaptive judges by the whole backbone"):
        tiny(exchange={"fragments": 2}, merge={"client": "adaptive"})
    with pytest.raises(ConfigError, match=r"exchange\.fragments: 2 fragments, of which median"):
        tiny(exchange={"fragments": 2}, aggregation={"trigger": "synchronous", "robust": {"rule": "median"}})
    private = {"unit": "client", "noise_multiplier": 1.0, "max_grad_norm": 0.1, "target_epsilon": 8.0}
    with pytest.raises(ConfigError, match=r"exchange\.fragments: 2 fragments, but client-level noise"):
        tiny(exchange={"fragments": 2}, privacy=private)


def test_a_run_does_not_go_on_in_other_fragments() -> None:
    node = make(("a",), **PLAIN)
    with pytest.raises(CheckpointError, match=r"exchange\.fragments is 3, but the checkpoint was written with 2"):
        make(("a",), **(PLAIN | {"child_fragments": 3})).restore(*node.state())


# ---- restarts ----------------------------------------------------------------------------------------------------


def held(node: Node) -> set[str]:
    return {name for name in node.state()[1] if name.startswith("fold.")}


def test_a_fold_of_fragments_survives_a_restart(tmp_path: Path) -> None:
    # The second fragment is a sum already, the first one update that waits to be read.
    rules = PLAIN | {"buffer_size": 5, "server_optimizer": ServerOptimizerConfig(name="delayed_nesterov", delay=2)}
    node = make(("a", "b"), **rules)
    for seq in range(1, 7):
        send(node, update("a", seq, [seq, 1, seq][: 2 + seq % 2], base=node.version))
    send(node, update("b", 1, [7, 7, 7], base=node.version))
    assert held(node) == {"fold.first.0", "fold.first.1", "fold.keys"}
    send(node, update("b", 3, [9, 7, 7], base=node.version))
    assert held(node) == {"fold.first.0", "fold.sum.1", "fold.keys"}
    twin = saved_and_loaded(node, tmp_path, make(("a", "b"), **rules))
    for one in (node, twin):
        for seq in range(7, 18):
            send(one, update("a", seq, [1, seq, 2][: 2 + seq % 2], base=one.version))
        assert one.version == 3
    assert fingerprint(twin) == fingerprint(node)


@pytest.fixture
def zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that begin with zeros: whole numbers stay whole numbers, and sums are exact."""
    monkeypatch.setattr(Plan, "initial", lambda self: frozen(np.zeros(self.layout.size, np.float32)))


def in_fragments(tiny: Tiny, folder: Path, count: int, **changes: Any) -> Plan:
    children = [*two_levels(folder)[:1], client_entry("c", folder, 3)]
    rules = {"buffer_size": 1, "server_optimizer": {"lr": 1.0}}
    return tiny(children, **({"exchange": {"fragments": count}, "aggregation": rules} | changes))


def work(client: Client, change: float | Flat) -> None:
    """A local round that moves the parameters by this much."""
    client.trainer.theta += np.float32(change)  # type: ignore[attr-defined]
    client.step, client.round = client.training.local_steps, client.round + 1


def told(plan: Plan, version: int, backbone: list[float], *, fragment: int | None = None, last_seq: int = 0) -> Model:
    """A parent's model that is one number in each fragment."""
    parts = plan.layout.fragments(len(backbone))
    values = np.zeros(plan.layout.size, np.float32)
    for part, value in zip(parts, backbone, strict=True):
        values[part] = value
    cut = {} if fragment is None else {"fragment": fragment, "fragments": len(backbone)}
    if fragment is not None:
        values = np.concatenate((values[parts[fragment]], values[plan.layout.backbone_size :]))
    return Model(version=version, progress=0.0, finished=False, tokens=1.0, last_seq=last_seq, values=values, **cut)


def levels(plan: Plan, values: Flat, count: int) -> list[float]:
    """The one number that each fragment holds."""
    found = [set(values[part].tolist()) for part in plan.layout.fragments(count)]
    return [value for [value] in found]


def test_what_an_earlier_life_has_sent_is_not_sent_again(tiny: Tiny, tmp_path: Path, zero: None) -> None:
    plan = in_fragments(tiny, tmp_path, 2)
    spec = plan.node("world/c")
    client = drifting(plan, spec)
    assert client.wanted_fragment is None
    client.begin(told(plan, 0, [0, 0]), now_s=0.0)
    work(client, 1.0)
    assert set(client.update().values.tolist()[:9]) == {1.0}  # the second fragment
    saved = client.state()
    client.begin(told(plan, 1, [0, 1], fragment=1), now_s=0.0)
    work(client, 1.0)
    assert set(client.update().values.tolist()[:9]) == {2.0}  # the first, of two rounds
    back = drifting(plan, spec, dataset=client.dataset)
    back.restore(*saved)
    back.welcomed(Welcome(incarnation=1, last_seq=2, durable_seq=2))
    assert back.wanted_fragment is None
    back.begin(told(plan, 2, [2, 1]), now_s=0.0)
    assert levels(plan, back.trainer.read(), 2) == [2, 1]
    work(back, 1.0)
    third = back.update()
    assert (third.seq, third.fragment, set(third.values.tolist()[:9])) == (3, 1, {1.0})
    assert back.wanted_fragment == 1
    back.begin(told(plan, 3, [2, 2], fragment=1), now_s=0.0)
    assert levels(plan, back.trainer.read(), 2) == [3, 2]
    fourth = back.update()
    assert (fourth.seq, fourth.fragment, set(fourth.values.tolist()[:9])) == (4, 0, {1.0})


def test_work_that_was_not_sent_is_kept_through_a_pull_of_everything(tiny: Tiny, tmp_path: Path, zero: None) -> None:
    plan = in_fragments(tiny, tmp_path, 3)
    client = drifting(plan, plan.node("world/c"))
    client.begin(told(plan, 0, [0, 0, 0]), now_s=0.0)
    work(client, 1.0)
    client.update()  # fragment 1
    client.welcomed(Welcome(incarnation=1, last_seq=2, durable_seq=2))  # and 2, by a later life that is gone
    client.begin(told(plan, 5, [10, 20, 30]), now_s=0.0)
    assert levels(plan, client.trainer.read(), 3) == [11, 20, 30]
    client.step = client.training.local_steps
    assert set(client.update().values.tolist()[:9]) == {1.0}


# ---- nothing lost ------------------------------------------------------------------------------------------------


class Tree:
    """A world with a federation of a and b, and a client c, whose messages the test carries."""

    def __init__(self, plan: Plan, datasets: dict[str, Any]) -> None:
        self.plan, self.trained = plan, np.zeros(plan.layout.backbone_size)
        self.world = plan.inner_node(plan.root, plan.initial())
        self.north = plan.inner_node(plan.node("world/north"), plan.initial())
        self.clients = {}
        for spec in plan.root.clients:
            self.clients[spec.name] = drifting(plan, spec, dataset=datasets.get(spec.name))
            datasets[spec.name] = self.clients[spec.name].dataset
        self.due = False

    def pull(self, parent: Node, name: str, fragment: int | None) -> Model:
        [serve] = of(Serve, parent.handle(Pull(child=name, started_tokens=0, fragment=fragment, now_s=0.0)))
        packed = pack(serve.model, self.plan.layout)
        model = unpack_model(packed, self.plan.layout)
        assert (model.fragments == 1) == (fragment is None)
        return model

    def push(self, parent: Node, one: Update) -> None:
        commands = parent.handle(Push(sender=one.sender, packed=pack(one, self.plan.layout), now_s=0.0))
        [answer] = of(Answer, commands)
        assert answer.verdict.accepted, answer.verdict
        self.due = self.due or bool(of(Exchange, commands))

    def round(self, name: str, change: float | Flat) -> None:
        client, parent = self.clients[name], self.world if name == "c" else self.north
        client.begin(self.pull(parent, name, client.wanted_fragment), now_s=0.0)
        work(client, change)
        self.trained += change if isinstance(change, float) else change[: self.trained.size]
        self.push(parent, client.update())

    def send(self) -> None:
        if self.due and self.north.in_flight is None:
            self.due = False
            self.north.begin_exchange()
            self.push(self.world, self.north.send())

    def hear(self) -> None:
        if self.north.in_flight is not None:
            model = self.pull(self.world, "north", self.north.wanted_fragment)
            self.due = bool(of(Exchange, self.north.handle(ParentModel(model=model, now_s=0.0))))

    @property
    def arrived(self) -> Flat:
        return self.world.theta[: self.plan.layout.backbone_size]

    @property
    def unsent(self) -> Flat:
        """What clients have trained, and the federation has taken in, since the fragments were last sent."""
        found = self.north.theta - self.north.anchor
        for client in self.clients.values():
            found = found + (client.trainer.read() - client.base)
        for node in (self.north, *self.clients.values()):
            if node.lost is not None:
                found[: len(node.lost)] += node.lost
        return found[: self.plan.layout.backbone_size]

    def flush(self, count: int) -> None:
        """Nobody trains any more: everybody exchanges every fragment."""
        for _ in range(2 * count + 1):
            for name in self.clients:
                self.round(name, 0.0)
                self.send()
                self.hear()


OPS = st.lists(
    st.one_of(st.sampled_from(["send", "hear"]), st.tuples(st.sampled_from("abc"), st.integers(-3, 3))), max_size=40
)


@given(OPS, st.sampled_from([1, 2, 5]), st.sampled_from([1.0, 0.5]))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_was_trained_has_arrived_once_or_waits(
    tiny: Tiny, tmp_path: Path, zero: None, ops: list[Any], count: int, m: float
) -> None:
    if (count, m) not in PLANS:
        PLANS[count, m] = in_fragments(tiny, tmp_path, count, merge={"client": m, "federation": m})
    tree = Tree(PLANS[count, m], DATASETS)
    for op in ops:
        if isinstance(op, str):
            getattr(tree, op)()
        else:
            tree.round(op[0], float(op[1]))
        if count > 1:  # a client's base is then what it has not sent yet; else it is so between two rounds alone
            np.testing.assert_allclose(tree.arrived + tree.unsent, tree.trained, atol=1e-3)
    tree.send()
    tree.hear()
    tree.flush(count)
    np.testing.assert_allclose(tree.arrived, tree.trained, atol=1e-3)


PLANS: dict[tuple[int, float], Plan] = {}
DATASETS: dict[str, Any] = {}


@pytest.mark.parametrize("count", [2, 3])
def test_once_through_all_fragments_all_is_there_once_and_to_the_bit(
    tiny: Tiny, tmp_path: Path, zero: None, count: int
) -> None:
    tree = Tree(in_fragments(tiny, tmp_path, count), {})
    for name, change in (("a", 1.0), ("b", 2.0), ("c", 4.0), ("a", 8.0)):
        tree.round(name, change)
        tree.send()
        tree.hear()
    tree.flush(count)
    assert set(tree.arrived.tolist()) == {15.0}
    for client in tree.clients.values():
        assert set(client.trainer.read()[: tree.arrived.size].tolist()) == {15.0}


@pytest.mark.parametrize("codec", ["bf16", "int8", "int4"])
def test_what_a_codec_loses_of_a_fragment_goes_with_it_the_next_time(
    tiny: Tiny, tmp_path: Path, zero: None, codec: str
) -> None:
    plan = in_fragments(tiny, tmp_path, 3, exchange={"fragments": 3, "codec": codec})
    tree, rng = Tree(plan, {}), np.random.Generator(np.random.PCG64(3))
    for _ in range(40):
        name = "abc"[rng.integers(3)]
        tree.round(name, rng.standard_normal(plan.layout.size).astype(np.float32))
        tree.send()
        tree.hear()
        np.testing.assert_allclose(tree.arrived + tree.unsent, tree.trained, atol=1e-4)
    assert all(node.lost is not None and node.lost.any() for node in (tree.north, *tree.clients.values()))


# ---- whole worlds ------------------------------------------------------------------------------------------------


def simulated(plan: Plan, folder: Path) -> tuple[dict[str, Any], list[Record]]:
    records: list[Record] = []
    config = replace(plan.config, run_dir=str(folder))
    return simulate(rundir.create(replace(plan, config=config)), on_record=records.append).summary, records


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_bytes_on_the_wire_are_those_of_a_fragment(tiny: Tiny, tmp_path: Path, codec: str) -> None:
    plan = tiny(exchange={"fragments": 2, "codec": codec}, budget={"rounds": 5}, aggregation={"trigger": "synchronous"})
    _, records = run(plan, tmp_path / "parts", [])
    parts, keys = plan.layout.fragments(2), plan.layout.key_size
    sizes = [4 * (part.stop - part.start + keys) for part in parts]
    for path in ("world/north", "world/north/a"):
        pulls = [record.bytes for record in records if isinstance(record, PullRecord) and record.node == path]
        pushes = [record.bytes for record in records if isinstance(record, PushRecord) and record.node == path]
        first = 1 if path.endswith("a") else 2  # a client pulls before it pushes, a federation after
        turns = [sizes[fragment_of(seq, 2)] for seq in range(first, first + 4)]
        assert [count - size for count, size in zip(pulls, [plan.layout.nbytes, *turns], strict=True)] == pytest.approx(
            [250] * 5, abs=150
        )
        if codec == "fp32":
            up = [sizes[fragment_of(seq, 2)] for seq in range(1, 6)]
            assert [count - size for count, size in zip(pushes, up, strict=True)] == pytest.approx([300] * 5, abs=150)
        facts = describe(plan)["nodes"][path]
        assert 0 < max(pushes) - facts["bytes_per_push"] < 450
        assert facts["bytes_per_pull"] == max(sizes)


def test_what_crosses_between_places_is_counted_by_fragments(tiny: Tiny, tmp_path: Path) -> None:
    there = {"placement": {"labels": {"region": "there"}}}
    children = [{"federation": "north", "children": [client_entry("a", tmp_path, 1, **there)]}]
    plan = tiny(children, budget={"rounds": 5}, exchange={"fragments": 2}, model=NO_KEYS)
    [edge] = describe(plan)["crossings"]
    first, second = (4 * (part.stop - part.start) for part in plan.layout.fragments(2))
    assert edge["bytes_up"] == 3 * second + 2 * first
    assert edge["bytes_down"] == plan.layout.nbytes + 2 * second + 2 * first


NO_KEYS = {"hidden_size": 16, "layers": 2, "heads": 2, "intermediate_size": 32, "context": 16, "key_layers": []}


def test_a_world_in_fragments_learns(tiny: Tiny, tmp_path: Path) -> None:
    plan = tiny(exchange={"fragments": 3}, budget={"rounds": 9}, training={"local_steps": 8, "batch_size": 4})
    summary, _ = simulated(plan, tmp_path / "run")
    for node in summary["nodes"].values():
        assert node["loss"] < 0.95 * node["loss_start"]


def test_one_fragment_is_the_whole_backbone(layout: Layout) -> None:
    assert layout.fragments(1) == (slice(0, layout.backbone_size),)
