"""An inner node with children a, b and c, and messages to it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from worldlm_ray.aggregation.events import (
    Answer,
    Command,
    Exchange,
    Joined,
    Left,
    ParentModel,
    Pull,
    Push,
    Send,
    UpdateDue,
    UpdateSent,
)
from worldlm_ray.aggregation.node import Node
from worldlm_ray.aggregation.node_setup import NodePlace, NodeRules
from worldlm_ray.aggregation.private_fold import ClientPrivacy
from worldlm_ray.config.federated import (
    AggregationConfig,
    AttentionConfig,
    MergeConfig,
    ServerOptimizerConfig,
    StalenessConfig,
)
from worldlm_ray.config.schema import BudgetConfig, LivenessConfig
from worldlm_ray.exchange.messages import Model, Update, pack
from worldlm_ray.exchange.quota import Quotas
from worldlm_ray.storage import checkpoint
from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.tensors.layout import Layout, make_layout

C = TypeVar("C")
SHAPES = [("model.embed.weight", (2,)), ("body.weight", (3,)), ("head.weight", (2,))]
LAYOUT = make_layout(SHAPES, ["model.embed.*", "head.*"], layers=0)
"""[body 3 | embed 2, head 2]"""
START = np.array([1, 2, 3, 10, 20, 30, 40], np.float32)
SPLIT, NAMES = LAYOUT.backbone_size, ("a", "b", "c")
UNIFORM = AttentionConfig(score="uniform")
FEDBUFF = StalenessConfig(fn="polynomial")
UNIT_SGD = ServerOptimizerConfig(lr=1.0)
"""The rate given: a lone update is not scaled by the share of children that it comes from."""


def a_node(
    *,
    layout: Layout,
    initial: Flat,
    privacy: ClientPrivacy | None = None,
    contributions: Mapping[str, int] | None = None,
    quotas: Quotas | None = None,
    **changes: Any,
) -> Node:
    """A node by the fields of its place and of its rules: a world with default rules, unless they say otherwise."""
    place = {"path": "world", "has_parent": changes.get("path", "world") != "world"}
    place |= {key: changes.pop(key) for key in list(changes) if key in NodePlace.__dataclass_fields__}
    rules = {"aggregation": AggregationConfig(), "merge": MergeConfig(), "budget": BudgetConfig(rounds=1_000)} | changes
    return Node(
        NodePlace(**place),
        NodeRules(**rules),
        layout,
        initial,
        privacy=privacy,
        contributions=contributions,
        quotas=quotas,
    )


def make(
    children: Iterable[str] = NAMES,
    *,
    parent: bool = False,
    merge: float | str = 1.0,
    budget: BudgetConfig | None = None,
    layout: Layout = LAYOUT,
    initial: Flat = START,
    optional: Iterable[str] = (),
    liveness: LivenessConfig | None = None,
    codec: str = "fp32",
    **rules: Any,
) -> Node:
    rules = {"attention": UNIFORM, "server_optimizer": UNIT_SGD} | rules
    return a_node(
        path="world/europe" if parent else "world",
        children=tuple(children),
        aggregation=AggregationConfig(**rules),
        merge=MergeConfig(federation=merge),
        has_parent=parent,
        layout=layout,
        initial=initial.copy(),
        optional=tuple(optional),
        budget=budget or BudgetConfig(rounds=1_000),
        liveness=liveness,
        codec=codec,
    )


def update(
    sender: str,
    seq: int,
    *,
    base: int = 0,
    tokens: int = 10,
    started: int = 0,
    change: float | Flat = 0.0,
    keys: float | Flat = 0.0,
) -> Update:
    values = np.empty_like(START)
    values[:SPLIT], values[SPLIT:] = change, keys
    return Update(sender=sender, seq=seq, base_version=base, tokens=tokens, started_tokens=started, values=values)


def push(node: Node, sender: str, seq: int, *, now_s: float = 0.0, **fields: Any) -> list[Command]:
    return send(node, update(sender, seq, **fields), now_s=now_s)


def send(node: Node, message: Update, *, sender: str | None = None, now_s: float = 0.0) -> list[Command]:
    packed = pack(message, node.layout)
    return node.handle(Push(sender=sender or message.sender, packed=packed, now_s=now_s))


def pull(node: Node, child: str, *, started: int = 0, now_s: float = 0.0) -> list[Command]:
    return node.handle(Pull(child=child, started_tokens=started, now_s=now_s))


def answer(node: Node, model: Model, *, now_s: float = 0.0) -> list[Command]:
    return node.handle(ParentModel(model=model, now_s=now_s))


def of(kind: type[C], commands: Iterable[Command]) -> list[C]:
    return [command for command in commands if isinstance(command, kind)]


def reason(commands: Iterable[Command]) -> str:
    [reply] = of(Answer, commands)
    return reply.verdict.reason


def exchange(node: Node, commands: Iterable[Command]) -> Update:
    """Carry out the one exchange that is asked for, as far as the update."""
    assert of(Exchange, commands) == [Exchange()]
    begun(node)
    node.handle(UpdateSent())
    assert node.in_flight is not None
    return node.in_flight


def exchanging(node: Node) -> bool:
    """Whether an exchange with the parent is under way, from the command on."""
    return node.parent is not None and node.parent.is_open


def begun(node: Node) -> Update:
    """The update that an exchange begins with."""
    [due] = of(Send, node.handle(UpdateDue()))
    return due.update


def parent_model(version: int, body: Any, keys: Any = 0.0, **fields: Any) -> Model:
    values = np.empty(LAYOUT.size, np.float32)
    values[:SPLIT], values[SPLIT:] = body, keys
    return pulled(values, version, **fields)


def pulled(values: Flat, version: int = 1, **fields: Any) -> Model:
    """A parent's model on its way to a child that it has accepted nothing from."""
    fields = {"progress": 0.0, "finished": False, "tokens": 10.0, "last_seq": 0} | fields
    return Model(version=version, values=values, **fields)


def body(node: Node) -> list[float]:
    return [float(value) for value in node.theta[:SPLIT]]


def keys(node: Node) -> list[float]:
    return [float(value) for value in node.theta[SPLIT:]]


def fingerprint(node: Node, *, counters: bool = True) -> tuple[str, dict[str, bytes]]:
    """Everything a checkpoint would hold, as bytes."""
    meta, arrays = node.state()
    if not counters:
        del meta["intake"]["refused"]
        for child in meta["children"].values():
            del child["judged_seq"], child["judged_tokens"]
    return json.dumps(meta, sort_keys=True), {name: values.tobytes() for name, values in arrays.items()}


def to_version(node: Node, version: int) -> None:
    """Aggregate updates that change nothing, from a child that is not one of a, b, c."""
    node.handle(Joined(child="filler", now_s=0.0))
    size = node.rules.aggregation.buffer_size
    for seq in range(1, size * (version - node.version) + 1):
        push(node, "filler", seq, base=node.version)
    node.handle(Left(child="filler", now_s=0.0))
    assert node.version == version
    assert body(node) == [1, 2, 3]


def federation(**changes: Any) -> Node:
    return make(**({"parent": True, "buffer_size": 1} | changes))


def saved_and_loaded(node: Node, place: Path, fresh: Node) -> Node:
    """A new node in the state of the old one, by way of a checkpoint on disk."""
    checkpoint.save(place, *node.state())
    loaded = checkpoint.load(place)
    assert loaded is not None
    fresh.restore(*loaded)
    return fresh
