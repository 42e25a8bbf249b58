"""`Node.handle` is the only way to change a node but `restore`: what its docstring claims."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.nodes import exchange, federation, pull, push

from worldlm_ray.aggregation.events import Command, Event
from worldlm_ray.aggregation.node import Node
from worldlm_ray.exchange import outbox
from worldlm_ray.exchange.replies import Verdict, Welcome
from worldlm_ray.plan.plan import Plan
from worldlm_ray.protocol.child import Send, Steps, Uplink
from worldlm_ray.protocol.node_child import NodeAsChild

ROOT = Path(__file__).resolve().parents[2]
DOORS = {"handle", "restore"}


def trained() -> Node:
    """A federation with updates folded, an exchange under way and a child that waits."""
    node = federation(buffer_size=2)
    push(node, "a", 1, change=1.0, keys=2.0)
    exchange(node, push(node, "b", 1, change=2.0, keys=3.0))
    push(node, "c", 1, base=1, change=3.0, keys=1.0)
    pull(node, "a")
    return node


def same(one: Node, other: Node) -> bool:
    (meta, arrays), (its_meta, its_arrays) = one.state(), other.state()
    return meta == its_meta and all(np.array_equal(arrays[name], its_arrays[name]) for name in arrays)


def test_no_public_method_or_property_but_these_changes_the_state() -> None:
    node, untouched = trained(), trained()
    buffers = {name: id(value) for name, value in vars(node.published).items()}
    names = [name for name in dir(Node) if not name.startswith("_") and name not in DOORS]
    assert {"theta", "state", "covers", "may_send"} <= set(names)
    for name in names:
        value = getattr(node, name)
        if callable(value) and not inspect.isclass(value):
            assert not inspect.signature(value).parameters, (
                f"Node.{name} takes something: is it a way to change a node?"
            )
            value()
        assert same(node, untouched), name
        assert {name: id(value) for name, value in vars(node.published).items()} == buffers, name


def test_a_changed_node_is_seen() -> None:
    node = trained()
    push(node, "a", 2, base=1, change=1.0)
    assert not same(node, trained())


def sends(steps: Steps[Any], answers: dict[str, Any]) -> Iterator[str]:
    """Drive the steps with a parent that always answers the same; yields the methods that are called."""
    answer: Any = None
    while True:
        try:
            step = steps.send(answer)
        except StopIteration:
            return
        answer = None
        if isinstance(step, Send):
            yield step.method
            answer = answers[step.method]


def test_the_link_to_the_parent_changes_a_node_by_events_only(
    tiny: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    node, twin, plan = trained(), trained(), tiny()
    events: list[Event] = []
    handle = node.handle

    def noted(event: Event) -> list[Command]:
        events.append(event)
        return handle(event)

    monkeypatch.setattr(node, "handle", noted)
    assert node.in_flight is not None
    uplink = Uplink(plan, "world/north", NodeAsChild(node), tell=lambda record: None, now_s=lambda: 1.0)
    malformed = Verdict(reason="malformed", seq=0, base_version=0, version=0, tau=0)
    answers = {"join": Welcome(incarnation=1, last_seq=0, durable_seq=0), "push": malformed}
    called = list(sends(uplink.push(node.in_flight), answers))
    assert called.count("push") == outbox.TRIES + 1
    assert not node.outbox.after(0), "an update that always arrives damaged is given up"
    for event in events:
        twin.handle(event)
    assert vars(twin.outbox) == vars(node.outbox)


def writes(path: Path) -> Iterator[str]:
    """Assignments to an attribute of something that is called `node`, in a file that can have a Node."""
    if "Node" not in path.read_text(encoding="utf-8") or path.parent.name == "tracking":
        return  # there a node is a line of a table
    for statement in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        targets: list[ast.expr] = []
        if isinstance(statement, ast.Assign):
            targets = statement.targets
        elif isinstance(statement, ast.AugAssign | ast.AnnAssign):
            targets = [statement.target]
        for target in targets:
            if isinstance(target, ast.Attribute) and is_node(target.value):
                yield f"{path.relative_to(ROOT)}:{target.lineno}: {ast.unparse(target)}"


def is_node(value: ast.expr) -> bool:
    if isinstance(value, ast.Subscript):
        return ast.unparse(value.value).endswith("nodes")
    return ast.unparse(value).rpartition(".")[2] in ("node", "_node")


def test_no_other_module_assigns_what_belongs_to_a_node() -> None:
    folders = ("worldlm_ray", "actors", "benchmarks", "examples")
    found = [line for folder in folders for path in sorted((ROOT / folder).rglob("*.py")) for line in writes(path)]
    own = ROOT / "worldlm_ray" / "aggregation" / "node_checkpoint.py"
    assert [line for line in found if not line.startswith(str(own.relative_to(ROOT)))] == []


@pytest.mark.parametrize("source", ["self.node.theta = 1", "node.seq += 1", "world.nodes[path].liveness = None"])
def test_an_assignment_is_seen(source: str) -> None:
    target = ast.parse(source).body[0]
    assert isinstance(target, ast.Assign | ast.AugAssign)
    attribute = target.targets[0] if isinstance(target, ast.Assign) else target.target
    assert isinstance(attribute, ast.Attribute)
    assert is_node(attribute.value)
