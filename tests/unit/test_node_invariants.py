"""Invariants of an inner node over random histories."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.nodes import (
    NAMES,
    answer,
    begun,
    body,
    exchanging,
    federation,
    make,
    of,
    parent_model,
    pull,
    push,
    reason,
    send,
    to_version,
    update,
)

from worldlm_ray.aggregation.events import (
    Clock,
    Command,
    Done,
    Exchange,
    Finish,
    Joined,
    Left,
    Serve,
)
from worldlm_ray.config.federated import (
    AttentionConfig,
    ServerOptimizerConfig,
    StalenessConfig,
)
from worldlm_ray.config.schema import BudgetConfig
from worldlm_ray.tensors.buffers import Flat

# ---- invariants over random histories ----------------------------------------------------------------------

OPERATIONS = (
    "push",
    "push",
    "push",
    "again",
    "late",
    "nan",
    "pull",
    "pull",
    "done",
    "left",
    "joined",
    "parent",
    "clock",
)
Operation = tuple[str, int, int]


def as_it_is(values: Flat) -> tuple[Flat, bytes]:
    """A buffer, and its bytes now."""
    return values, values.tobytes()


class Walk:
    """Drives a node with well-formed children and bad ones, and checks what must hold after every event."""

    def __init__(self, trigger: str, *, parent: bool) -> None:
        self.node = make(
            trigger=trigger,
            parent=parent,
            merge=0.5,
            buffer_size=2,
            quorum=2,
            time_up_s=3.0,
            max_staleness=2,
            attention=AttentionConfig(),
            server_optimizer=ServerOptimizerConfig(name="nesterov"),
        )
        self.now_s = 0.0
        self.parent_version = 0
        self.seqs = dict.fromkeys(NAMES, 0)
        self.accepted: dict[str, list[int]] = {name: [] for name in NAMES}
        self.accepted_tokens = 0
        self.theta: tuple[Flat, bytes] | None = None
        """The published model, and its bytes when it was published."""
        self.given: list[tuple[Flat, bytes]] = []
        """The same of all that a child or the parent has been given."""
        self.version = 0
        self.exchanged_tokens = 0

    def do(self, operation: Operation) -> None:
        kind, child, number = operation
        name = NAMES[child]
        self.now_s += 1.0
        if kind == "parent" and exchanging(self.node):
            self.parent_version += abs(number)
            self._after(answer(self.node, parent_model(self.parent_version, number), now_s=self.now_s))
        elif kind == "clock":
            self._after(self.node.handle(Clock(now_s=self.now_s)))
        elif kind == "pull":
            self._after(pull(self.node, name, started=10, now_s=self.now_s))
        elif kind in ("done", "left", "joined"):
            event = {"done": Done, "left": Left, "joined": Joined}[kind]
            self._after(self.node.handle(event(child=name, now_s=self.now_s)))
        elif kind in ("push", "again", "late", "nan"):
            self._push(kind, name, number)

    def _push(self, kind: str, name: str, number: int) -> None:
        if kind in ("push", "late") and self.node.synchronous and self._contributed(name):
            return  # a synchronous child waits for its pull first
        self.seqs[name] += kind != "again"
        message = update(
            name,
            self.seqs[name],
            base=max(self.node.version - (number % 5 if kind == "late" else 0), 0),
            tokens=5 + number,
            change=math.nan if kind == "nan" else float(number),
            keys=float(number),
        )
        commands = send(self.node, message, now_s=self.now_s)
        if reason(commands) == "accepted":
            assert kind != "nan"
            self.accepted[name].append(message.seq)
            self.accepted_tokens += message.tokens
        self._after(commands)

    def _contributed(self, name: str) -> bool:
        meta = self.node.state()[0]["intake"]
        return name in meta["held"] or name in meta.get("fold", {}).get("contributors", ())

    def _after(self, commands: list[Command]) -> None:
        node = self.node
        assert node.version >= self.version
        self.version = node.version
        assert np.isfinite(node.theta).all()
        if self.theta is None or self.theta[0] is not node.theta:
            self.theta = as_it_is(node.theta)
        assert node.theta.tobytes() == self.theta[1]
        self.given += [as_it_is(serve.model.values) for serve in of(Serve, commands)]
        meta = node.state()[0]["intake"]
        folded = meta.get("fold", {}).get("tokens", 0)
        held = sum(entry["update"]["tokens"] for entry in meta["held"].values())
        assert node.published.tokens + folded + held == self.accepted_tokens
        if of(Exchange, commands):
            sent = begun(node)
            self.exchanged_tokens += sent.tokens
            self.given.append(as_it_is(sent.values))
        if node.parent is not None:
            assert self.exchanged_tokens + node.to_parent.unpushed_tokens == node.published.tokens
        if of(Finish, commands):
            assert not folded
            assert not held
            assert not exchanging(node)
            assert not (node.parent is not None and node.parent.unpushed_tokens)
            assert not any(child.is_active for child in node.children.values())

    def end(self) -> None:
        for seqs in self.accepted.values():
            assert all(earlier < later for earlier, later in zip(seqs, seqs[1:], strict=False))
        for values, as_given in self.given:
            assert values.tobytes() == as_given


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    trigger=st.sampled_from(["goal_achieved", "synchronous", "time_up"]),
    parent=st.booleans(),
    operations=st.lists(
        st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 2), st.integers(-4, 4)),
        min_size=10,
        max_size=50,
    ),
)
def test_invariants_hold_over_random_histories(trigger: str, parent: bool, operations: list[Operation]) -> None:
    walk = Walk(trigger, parent=parent)
    for operation in operations:
        walk.do(operation)
    for name in NAMES:
        walk.do(("done", NAMES.index(name), 0))
    while exchanging(walk.node):
        walk.do(("parent", 0, 1))
    assert walk.node.ended
    walk.end()


def test_the_staleness_function_of_the_config_is_used() -> None:
    node = make(buffer_size=1, staleness=StalenessConfig(fn="harmonic"))
    to_version(node, 3)
    push(node, "a", 1, base=0, change=4.0)  # 1/(1 + 3)
    assert body(node) == pytest.approx([2, 3, 4])


def test_a_federation_that_had_finished_trains_again_when_its_run_goes_on() -> None:
    node = federation()
    node.budget.finished = True
    other = federation()
    other.restore(*node.state())
    [serve] = of(Serve, pull(other, "a"))
    assert not serve.model.finished


def test_a_world_with_a_larger_budget_goes_on() -> None:
    small = make(("a",), budget=BudgetConfig(tokens=50))
    pull(small, "a", started=50)
    push(small, "a", 1, tokens=50, started=50)
    [last] = of(Serve, pull(small, "a", started=100))
    assert last.model.finished
    large = make(("a",), budget=BudgetConfig(tokens=500))
    large.restore(*small.state())
    [again] = of(Serve, pull(large, "a", started=100))
    assert (again.model.finished, again.model.progress) == (False, 0.1)
