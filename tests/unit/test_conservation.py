"""What clients train arrives at the world once, or waits: nothing is lost, and nothing is counted twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.drift import drifting
from support.nodes import exchange, of
from support.worlds import client as client_entry
from support.worlds import two_levels

from worldlm_ray.aggregation.events import Answer, Exchange, ParentModel, Pull, Push, Serve
from worldlm_ray.aggregation.node import Node
from worldlm_ray.client.client import Client
from worldlm_ray.exchange.messages import Model, Update, pack, unpack_model
from worldlm_ray.plan import build
from worldlm_ray.plan.plan import Plan
from worldlm_ray.tensors.buffers import Flat, frozen

Tiny = Callable[..., Plan]


@pytest.fixture
def zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that begin with zeros: whole numbers stay whole numbers, and sums are exact."""
    monkeypatch.setattr(build, "initial", lambda plan: frozen(np.zeros(plan.layout.size, np.float32)))


def small_world(tiny: Tiny, folder: Path, **changes: Any) -> Plan:
    children = [*two_levels(folder)[:1], client_entry("c", folder, 3)]
    return tiny(children, **({"aggregation": {"buffer_size": 1, "server_optimizer": {"lr": 1.0}}} | changes))


def work(client: Client, change: float | Flat) -> None:
    """A local round that moves the parameters by this much."""
    client.trainer.theta += np.float32(change)  # type: ignore[attr-defined]
    client.step, client.round = client.training.local_steps, client.round + 1


class Tree:
    """A world with a federation of a and b, and a client c, whose messages the test carries."""

    def __init__(self, plan: Plan, datasets: dict[str, Any]) -> None:
        self.plan, self.trained = plan, np.zeros(plan.layout.backbone_size)
        self.world = build.inner_node(plan, plan.root, build.initial(plan))
        self.north = build.inner_node(plan, plan.node("world/north"), build.initial(plan))
        self.clients = {}
        for spec in plan.root.clients:
            self.clients[spec.name] = drifting(plan, spec, dataset=datasets.get(spec.name))
            datasets[spec.name] = self.clients[spec.name].dataset
        self.due = False

    def pull(self, parent: Node, name: str) -> Model:
        [serve] = of(Serve, parent.handle(Pull(child=name, started_tokens=0, now_s=0.0)))
        return unpack_model(pack(serve.model, self.plan.layout), self.plan.layout)

    def push(self, parent: Node, one: Update) -> None:
        commands = parent.handle(Push(sender=one.sender, packed=pack(one, self.plan.layout), now_s=0.0))
        [answer] = of(Answer, commands)
        assert answer.verdict.accepted, answer.verdict
        self.due = self.due or bool(of(Exchange, commands))

    def round(self, name: str, change: float | Flat) -> None:
        client, parent = self.clients[name], self.world if name == "c" else self.north
        client.begin(self.pull(parent, name), now_s=0.0)
        work(client, change)
        self.trained += change if isinstance(change, float) else change[: self.trained.size]
        self.push(parent, client.update())

    def send(self) -> None:
        if self.due and self.north.in_flight is None:
            self.due = False
            self.push(self.world, exchange(self.north, [Exchange()]))

    def hear(self) -> None:
        if self.north.in_flight is not None:
            model = self.pull(self.world, "north")
            self.due = bool(of(Exchange, self.north.handle(ParentModel(model=model, now_s=0.0))))

    @property
    def arrived(self) -> Flat:
        return self.world.theta[: self.plan.layout.backbone_size]

    @property
    def waiting(self) -> Flat:
        """What the federation has taken in since its last update, and what codecs have lost so far."""
        found = (self.north.theta - self.north.to_parent.anchor)[: self.plan.layout.backbone_size]
        for error in (self.north.to_parent.codec_error, *(one.link.codec_error for one in self.clients.values())):
            if error is not None:
                found = found + error
        return found

    def flush(self) -> None:
        """No client trains any more; all exchange until the world's model is everywhere."""
        for _ in range(3):
            for name in self.clients:
                self.round(name, 0.0)
                self.send()
                self.hear()


OPS = st.lists(
    st.one_of(st.sampled_from(["send", "hear"]), st.tuples(st.sampled_from("abc"), st.integers(-3, 3))), max_size=40
)
PLANS: dict[float, Plan] = {}
DATASETS: dict[str, Any] = {}


@given(OPS, st.sampled_from([1.0, 0.5]))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_was_trained_has_arrived_once_or_waits(
    tiny: Tiny, tmp_path: Path, zero: None, ops: list[Any], m: float
) -> None:
    if m not in PLANS:
        PLANS[m] = small_world(tiny, tmp_path, merge={"client": m, "federation": m})
    tree = Tree(PLANS[m], DATASETS)
    for op in ops:
        if isinstance(op, str):
            getattr(tree, op)()
        else:
            tree.round(op[0], float(op[1]))
        np.testing.assert_allclose(tree.arrived + tree.waiting, tree.trained, atol=1e-3)
    tree.send()
    tree.hear()
    tree.flush()
    np.testing.assert_allclose(tree.arrived, tree.trained, atol=1e-3)


def test_at_the_end_all_is_there_once_and_to_the_bit(tiny: Tiny, tmp_path: Path, zero: None) -> None:
    tree = Tree(small_world(tiny, tmp_path), {})
    for name, change in (("a", 1.0), ("b", 2.0), ("c", 4.0), ("a", 8.0)):
        tree.round(name, change)
        tree.send()
        tree.hear()
    tree.flush()
    assert set(tree.arrived.tolist()) == {15.0}
    for client in tree.clients.values():
        assert set(client.trainer.read()[: tree.arrived.size].tolist()) == {15.0}


@pytest.mark.parametrize("codec", ["bf16", "int8", "int4"])
def test_what_a_codec_loses_goes_with_the_next_update(tiny: Tiny, tmp_path: Path, zero: None, codec: str) -> None:
    plan = small_world(tiny, tmp_path, exchange={"codec": codec})
    tree, rng = Tree(plan, {}), np.random.Generator(np.random.PCG64(3))
    for _ in range(40):
        name = "abc"[rng.integers(3)]
        tree.round(name, rng.standard_normal(plan.layout.size).astype(np.float32))
        tree.send()
        tree.hear()
        np.testing.assert_allclose(tree.arrived + tree.waiting, tree.trained, atol=1e-4)
    assert all(one.link.codec_error is not None and one.link.codec_error.any() for one in tree.clients.values())
