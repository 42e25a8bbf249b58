"""Exact sums: means, rest-of by hand on a tree of two times two, and contributions that leave no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.nodes import a_node, begun, of, saved_and_loaded

from worldlm_ray.aggregation.events import Answer, Answered, ParentModel, Pull, Push, Saved, Serve, UpdateSent
from worldlm_ray.aggregation.node import Node
from worldlm_ray.aggregation.own_part import OwnPart
from worldlm_ray.aggregation.sums import GRID, LARGEST, on_grid, whole
from worldlm_ray.config.federated import AggregationConfig
from worldlm_ray.errors import MessageError
from worldlm_ray.exchange.messages import Model, Update, pack, unpack_model, unpack_update
from worldlm_ray.tensors.layout import make_layout

LAYOUT = make_layout([("body.weight", (2,))], [], layers=0)
ZERO = np.zeros(2, np.float32)


def sums_node(path: str, children: tuple[str, ...], trigger: str = "goal_achieved") -> Node:
    rules = AggregationConfig(rule="sums", trigger=trigger)  # type: ignore[arg-type]
    return a_node(path=path, children=children, aggregation=rules, layout=LAYOUT, initial=ZERO)


class Client:
    """A client's side of the exchange, without a model."""

    def __init__(self, node: Node, name: str, weight: int) -> None:
        self.node, self.name, self.weight, self.part, self.seq = node, name, weight, OwnPart(LAYOUT.size), 0

    def push(self, *values: float, refused: bool = False) -> None:
        """Push the adapter, or without values what takes its part out."""
        weight = self.weight if values else 0
        target = on_grid(np.array(values or (0.0, 0.0), np.float32), weight)
        out = np.empty(LAYOUT.size, np.float32)
        fields, self.seq = self.part.change(target, weight, out=out), self.seq + 1
        update = Update(
            sender=self.name, seq=self.seq, base_version=self.node.version, tokens=self.weight if values else 0,
            started_tokens=0, values=out, **fields,
        )  # fmt: skip
        self.part.sent(update)
        send(self.node, update, self.part, refused=refused)

    def pull(self) -> Model:
        [served] = of(Serve, self.node.handle(Pull(child=self.name, started_tokens=0, now_s=0.0)))
        return unpack_model(pack(served.model, LAYOUT), LAYOUT, has_rest=True)


def send(node: Node, update: Update, part: OwnPart, *, refused: bool = False) -> None:
    """An update on its way up, and the answer."""
    if refused:
        update = Update(**(vars(update) | {"sender": "stranger"}))
    [answer] = of(Answer, node.handle(Push(sender=update.sender, packed=pack(update, LAYOUT), now_s=0.0)))
    assert answer.verdict.accepted != refused
    part.answered(update.seq, answer.verdict)


class Tree:
    """A world of two federations of two clients, which exchanges at once; `scale` multiplies all weights."""

    def __init__(self, scale: int = 1) -> None:
        self.world = sums_node("world", ("north", "south"))
        self.feds = {name: sums_node(f"world/{name}", ("a", "b")) for name in ("north", "south")}
        weights = {"north": (1, 3), "south": (2, 2)}
        self.clients = {
            f"{fed}/{name}": Client(node, name, scale * weight)
            for fed, node in self.feds.items()
            for name, weight in zip("ab", weights[fed], strict=True)
        }

    def push(self, path: str, *values: float) -> None:
        self.clients[path].push(*values)
        self.exchange(path.split("/")[0])

    def exchange(self, fed: str) -> None:
        """Both ways between a federation and the world."""
        node = self.feds[fed]
        update = begun(node)
        node.handle(Saved(covered=node.covers()))
        node.handle(UpdateSent())
        [answer] = of(Answer, self.world.handle(Push(sender=fed, packed=pack(update, LAYOUT), now_s=0.0)))
        node.handle(Answered(seq=update.seq, verdict=answer.verdict))
        self.hear(fed)

    def hear(self, fed: str) -> None:
        [served] = of(Serve, self.world.handle(Pull(child=fed, started_tokens=0, now_s=0.0)))
        self.feds[fed].handle(ParentModel(model=served.model, now_s=0.0))

    def refreshed(self) -> None:
        """Every federation hears the world again: pushes that change nothing."""
        for fed in self.feds:
            first = self.clients[f"{fed}/a"]
            first.push(*(first.part.held * GRID / max(first.weight, 1)))
            self.exchange(fed)


def total(node: Node) -> np.ndarray:
    assert node.published.sums is not None
    return node.published.sums.total


@pytest.fixture
def tree() -> Tree:
    made = Tree()
    for path, value in {"north/a": 1.0, "north/b": 0.5, "south/a": -0.25, "south/b": 0.75}.items():
        made.push(path, value, 0.0)
    made.refreshed()
    return made


def test_a_node_publishes_the_mean_by_weight(tree: Tree) -> None:
    # north: (1 * 1 + 3 * 0.5) / 4; south: (2 * -0.25 + 2 * 0.75) / 4; world: the eight together.
    assert tree.feds["north"].theta[0] == 2.5 / 4
    assert tree.feds["south"].theta[0] == 1.0 / 4
    assert tree.world.theta[0] == 3.5 / 8
    assert tree.clients["north/a"].pull().weight == 4
    assert [node.published.sums.weight for node in (tree.world,) if node.published.sums] == [8]


@pytest.mark.parametrize(
    ("path", "federation", "others"),
    [
        ("north/a", 0.5, 2.5 / 7),
        ("north/b", 1.0, 2.0 / 5),
        ("south/a", 0.75, 4.0 / 6),
        ("south/b", -0.25, 2.0 / 6),
    ],
)
def test_every_client_sees_the_others_without_itself(tree: Tree, path: str, federation: float, others: float) -> None:
    """By hand: siblings; what lies beyond the federation; and all others together (FedALT)."""
    client, beyond = tree.clients[path], 1.0 / 4 if path.startswith("north") else 2.5 / 4
    model = client.pull()
    siblings, weight = client.part.rest(model, beyond=False)
    assert siblings is not None
    assert model.rest is not None
    assert siblings[0] == pytest.approx(federation, abs=1e-6)
    assert weight == 4 - client.weight
    assert (model.rest[0], model.rest_weight) == (pytest.approx(beyond, abs=1e-6), 4)
    rest, weight = client.part.rest(model, beyond=True)
    assert rest is not None
    assert rest[0] == pytest.approx(others, abs=1e-6)
    assert weight == 8 - client.weight


def test_a_refused_update_is_in_the_next_one(tree: Tree) -> None:
    client = tree.clients["north/a"]
    client.push(0.25, 0.0, refused=True)
    assert client.part.held[0] == 1.0 / GRID
    client.push(0.125, 0.0)
    assert client.part.held[0] == 0.125 / GRID
    assert tree.feds["north"].theta[0] == pytest.approx((0.125 + 1.5) / 4)


def test_an_only_child_has_no_others() -> None:
    node = sums_node("world", ("a",))
    client = Client(node, "a", 5)
    client.push(1.0, 0.5)
    assert client.part.rest(client.pull(), beyond=True) == (None, 0)


def test_updates_on_the_grid_are_exact_and_others_are_cut_off() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(scale=0.3, size=10_000).astype(np.float32)
    part, out = OwnPart(values.size), np.empty(values.size, np.float32)
    for weight in (4_096, 4_096, 4_096):
        target = on_grid(values, weight)
        assert part.change(target, weight, out=out)["low"] is None
        part.held = part.held + whole(out, weight)
        np.testing.assert_array_equal(part.held, target)
        values = (values * rng.normal(size=values.size)).astype(np.float32)
    assert on_grid(np.array([9.0], np.float32), 3)[0] == 3 * LARGEST / GRID


def test_a_checkpoint_keeps_the_sums_and_the_part_above(tree: Tree, tmp_path: Path) -> None:
    for node, children in ((tree.world, ("north", "south")), (tree.feds["north"], ("a", "b"))):
        fresh = saved_and_loaded(node, tmp_path / node.path, sums_node(node.path, children))
        np.testing.assert_array_equal(total(fresh), total(node))
        before, after = node.state(), fresh.state()
        assert after[0]["published"] == before[0]["published"]
        for array, values in before[1].items():
            np.testing.assert_array_equal(after[1][array], values)


TOKENS = 4_099
"""A scale of weights as runs have them: sums then have more digits than fp32."""


def in_order(orders: list[list[tuple[str, tuple[float, ...]]]]) -> list[Any]:
    found = []
    for order in orders:
        tree = Tree(TOKENS)
        for path, values in order:
            tree.push(path, *values)
        found.append([total(tree.world), *(total(node) for node in tree.feds.values()), tree.world.theta])
    return found


def test_the_sum_does_not_depend_on_the_order() -> None:
    rng = np.random.default_rng(1)
    pushes = [(path, tuple(rng.normal(scale=0.1, size=2))) for path in ("north/a", "north/b", "south/a", "south/b")]
    first, second = in_order([pushes, pushes[::-1]])
    for left, right in zip(first, second, strict=True):
        np.testing.assert_array_equal(left, right)


def test_a_client_that_withdraws_leaves_the_bits_of_a_sum_without_it() -> None:
    """Its federation's sum, and the world's with the next exchange."""
    rng = np.random.default_rng(2)
    others = [(path, tuple(rng.normal(scale=0.1, size=2))) for path in ("north/a", "south/a", "south/b", "north/a")]
    trees = Tree(TOKENS), Tree(TOKENS)
    for at, (path, values) in enumerate(others):
        for tree in trees:
            tree.push(path, *values)
        if at < 3:
            trees[0].push("north/b", *rng.normal(scale=0.1, size=2))
    assert (total(trees[0].feds["north"]) != total(trees[1].feds["north"])).all()

    trees[0].push("north/b")
    np.testing.assert_array_equal(total(trees[0].feds["north"]), total(trees[1].feds["north"]))
    np.testing.assert_array_equal(trees[0].feds["north"].theta, trees[1].feds["north"].theta)
    assert trees[0].feds["north"].published.sums is not None
    assert trees[0].feds["north"].published.sums.weights == {"a": TOKENS}
    np.testing.assert_array_equal(total(trees[0].world), total(trees[1].world))
    np.testing.assert_array_equal(trees[0].world.theta, trees[1].world.theta)


def test_a_federation_whose_clients_all_withdraw_has_no_part_left() -> None:
    tree = Tree(TOKENS)
    for path, value in {"north/a": 0.3, "north/b": 0.7, "south/a": -0.11}.items():
        tree.push(path, value, value / 7)
    tree.push("north/a")
    tree.push("north/b")
    assert not total(tree.feds["north"]).any()
    assert tree.world.published.sums is not None
    assert tree.world.published.sums.weights == {"south": 2 * TOKENS}
    np.testing.assert_array_equal(total(tree.world), total(tree.feds["south"]))


@pytest.mark.parametrize("name", ["rest", "low"])
def test_a_second_buffer_of_another_size_is_refused(name: str) -> None:
    beside, message = np.ones(3, np.float32), Model
    fields: dict[str, Any] = {"version": 1, "progress": 0.0, "finished": False, "tokens": 1.0, "last_seq": 0}
    if name == "low":
        message, fields = Update, {"sender": "a", "seq": 1, "base_version": 0, "tokens": 1, "started_tokens": 1}
    packed = pack(message(values=ZERO, weight=1, **fields, **{name: beside}), LAYOUT)
    with pytest.raises(MessageError, match=f"{name} has 12 elements"):
        unpack_model(packed, LAYOUT, has_rest=True) if name == "rest" else unpack_update(packed, LAYOUT, has_low=True)
