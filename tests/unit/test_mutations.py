"""Mutated messages: a named reason each, no crash, no state changed.

A short version runs with every test run; `make soak` runs a hundred times as many.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import msgpack
import numpy as np
from support.nodes import a_node
from support.worlds import TINY_MODEL

from worldlm_ray.aggregation.children import Child
from worldlm_ray.aggregation.events import Answer, Done, Heartbeat, Joined, Note, ParentModel, Pull, Push
from worldlm_ray.aggregation.node import Node
from worldlm_ray.client.client import Client
from worldlm_ray.config.federated import AggregationConfig, MergeConfig, ResidualsConfig
from worldlm_ray.config.schema import BudgetConfig
from worldlm_ray.errors import MessageError
from worldlm_ray.exchange.limits import MOST_RESTARTS, MOST_SKIPPED
from worldlm_ray.exchange.messages import Model, Packed, Pulled, Residual, Update, pack, unpack_model
from worldlm_ray.exchange.quota import Quota, Quotas
from worldlm_ray.exchange.replies import ACCEPTED
from worldlm_ray.plan import build
from worldlm_ray.plan.plan import Plan
from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.tensors.layout import Layout

REASONS = {
    "malformed",
    "header_too_large",
    "too_many_tokens",
    "implausible_seq",
    "wrong_origin",
    "wrong_schema",
    "wrong_layout",
    "wrong_shape",
    "unknown_sender",
    "duplicate",
    "future_version",
    "stale",
    "not_finite",
    "norm_exceeded",
}
ODD: list[Any] = [
    None, True, False, -1, 0, 1, 2**31, 2**63, -0.5, 0.5, 1e308, float("nan"), float("inf"),
    "", "a", "x" * 1000, b"", b"\xff", [], [1], {}, {"a": 1}, {1: 2},
]  # fmt: skip


# ---- messages ------------------------------------------------------------------------------------------------------

ROUND = 5
"""Tokens of a local round of either child."""
STEP = 0.5
"""merge.max_model_step of nodes with a parent."""
NORM = 10.0
"""aggregation.max_update_norm of the node."""
LIES: list[Any] = [
    0, 1, 4, 5, 6, 10**6, 10**9, 10**12, 10**15, 2**52, 2**53, 2**62, 0.25, 1.0, 1e5, 1e15, "a", "b", "world/a", "fp32",
]  # fmt: skip
"""Values that are well formed somewhere."""


def small_node(layout: Layout, *, parent: bool = False) -> Node:
    quota = Quota(update_tokens=ROUND, started_tokens=ROUND, residuals=1)
    made = a_node(
        path="world/f" if parent else "world",
        children=("a", "b"),
        aggregation=AggregationConfig(
            buffer_size=2, max_staleness=3, max_update_norm=NORM, residuals=ResidualsConfig(per_round=1)
        ),
        merge=MergeConfig(max_model_step=STEP),
        has_parent=parent,
        layout=layout,
        initial=np.arange(1, layout.size + 1, dtype=np.float32),
        budget=BudgetConfig(tokens=10**9),
        quotas=Quotas(children={"a": quota, "b": quota}),
    )
    for child in ("a", "b"):
        made.handle(Joined(child=child, now_s=0.0))
    return made


def digest(node: Node) -> str:
    """Everything that a node is, but for its clock and its counts of what was refused."""
    meta, arrays = node.state()
    for part in (meta["intake"], *meta["children"].values()):
        for counter in ("refused", "judged_seq", "judged_tokens"):
            part.pop(counter, None)
    found = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name in sorted(arrays):
        found.update(name.encode() + arrays[name].tobytes())
    return found.hexdigest()


def a_residual(layout: Layout, theta: Flat, origin: str = "world/a") -> Residual:
    keys = layout.key_layers[0]
    values = theta[layout.backbone_size :][keys.start : keys.stop] + np.float32(0.001)
    return Residual(origin=origin, layer=keys.name, tokens=3.0, age=1, values=values)


def mutated_message(packed: Packed, chance: random.Random) -> Packed:
    kind = chance.choice(["bytes", "cut", "insert", "field", "lie", "lie", "lie", "remove", "add", "values", "shape"])
    header, values = bytearray(packed.header), packed.values
    if kind == "bytes":
        for _ in range(chance.randint(1, 4)):
            header[chance.randrange(len(header))] = chance.randrange(256)
    elif kind == "cut":
        del header[chance.randrange(len(header)) :]
    elif kind == "insert":
        where = chance.randrange(len(header))
        header[where:where] = chance.randbytes(chance.choice([1, 8, 400_000]))
    elif kind in ("field", "lie", "remove", "add"):
        fields = msgpack.unpackb(packed.header)
        if kind == "add":
            fields[chance.choice(["values", "loss", "", "self"])] = chance.choice(ODD)
        else:
            holder = chance.choice([fields, fields, fields["residuals"][0]])
            name = chance.choice(sorted(holder))
            lies = [lie for lie in LIES if type(lie) is type(holder[name])]
            holder[name] = chance.choice(lies if kind == "lie" and lies else ODD)
            if kind == "remove":
                del holder[name]
        header = bytearray(msgpack.packb(fields))
    elif kind == "values":
        values = np.array(values)
        values[chance.randrange(values.size)] = chance.choice([np.nan, np.inf, -np.inf, 3e38, 1e20, 50.0, 1.0])
    else:
        odd: list[Any] = [
            values[:-1],
            values.astype(np.float64),
            values[None],
            None,
            b"",
            values.tolist(),
            values.view(np.int32),
        ]
        values = chance.choice(odd)
    return Packed(bytes(header), values)


def within_allowance(node: Node, before: dict[str, Child], theta: Flat, folded: int, speaker: str) -> None:
    """Whether an event of one child has changed no more than that child may change."""
    assert np.linalg.norm(node.theta - theta) <= NORM * 1.01
    fold = 0 if node.intake.fold is None else node.intake.fold.tokens
    assert node.published.tokens + fold - folded <= ROUND
    for name, child in node.children.items():
        was = before[name]
        assert child.started_tokens <= child.judged_tokens + ROUND
        assert child.incarnation <= was.incarnation + MOST_RESTARTS
        assert child.last_seq <= was.last_seq + MOST_SKIPPED
        if name != speaker:
            mine = (child.last_seq, child.incarnation, child.started_tokens, child.is_active, child.has_left)
            assert mine == (was.last_seq, was.incarnation, was.started_tokens, was.is_active, was.has_left)


def test_mutated_update_messages_change_nothing_beyond_their_allowance(
    layout: Layout, many: Callable[[int], int]
) -> None:
    chance, node, seen = random.Random(0), small_node(layout), Counter[str]()
    for number in range(1, many(1_000) + 1):
        seq, theta = node.children["a"].last_seq + 1, node.theta
        update = Update(
            sender="a",
            seq=seq,
            base_version=node.version,
            tokens=ROUND,
            started_tokens=min(ROUND * seq, 10**12),
            values=np.full(layout.size, 0.01, np.float32),
            residuals=(a_residual(layout, theta),),
        )
        before, state = deepcopy(node.children), digest(node)
        folded = node.published.tokens + (0 if node.intake.fold is None else node.intake.fold.tokens)
        packed = mutated_message(pack(update, layout), chance)
        sender = chance.choice(["a", "a", "a", "b", "stranger"])
        commands = node.handle(Push(sender=sender, packed=packed, now_s=float(number)))
        [reason] = [command.verdict.reason for command in commands if isinstance(command, Answer)]
        seen[reason] += 1
        if reason != ACCEPTED:
            assert reason in REASONS
            assert digest(node) == state, f"message {number} was refused as {reason} and changed the state"
        assert np.isfinite(node.theta).all()
        within_allowance(node, before, theta, folded, sender)
    assert {"malformed", "wrong_schema", "wrong_layout", "wrong_shape", "unknown_sender", "not_finite"} <= set(seen)
    assert {"too_many_tokens", "implausible_seq", "header_too_large", ACCEPTED} <= set(seen)
    print(f"{seen.total():,} mutated updates: {dict(seen.most_common())}")


def a_call(chance: random.Random) -> dict[str, Any]:
    fields: dict[str, Any] = {"child": "a", "incarnation": 1, "to": 1, "seq": 0, "started_tokens": 5}
    for name in chance.sample(sorted(fields), chance.choice([0, 1, 1, 2])):
        fields[name] = chance.choice(LIES + ODD)
    return fields


def test_mutated_call_messages_change_nothing_beyond_their_allowance(
    layout: Layout, many: Callable[[int], int]
) -> None:
    chance, node, seen = random.Random(1), small_node(layout), Counter[str]()
    kinds = {
        Pull: ("incarnation", "to", "started_tokens"),
        Joined: ("incarnation", "seq"),
        Heartbeat: ("incarnation", "to"),
        Done: ("incarnation", "to"),
    }
    for number in range(many(1_000)):
        before, state, theta = deepcopy(node.children), digest(node), node.theta
        fields, kind = a_call(chance), chance.choice(list(kinds))
        named = {name: fields[name] for name in kinds[kind]}
        reason = ACCEPTED
        try:
            node.handle(kind(child=fields["child"], now_s=float(number), **named))  # type: ignore[operator]
        except MessageError as error:
            reason = error.reason
        seen[reason] += 1
        if reason != ACCEPTED:
            assert digest(node) == state, f"call {number} was refused as {reason} and changed the state"
        if set(node.children) != set(before):  # the backend asks the run's folder whether there is such a child
            node = small_node(layout)
            continue
        if isinstance(fields["child"], str):
            within_allowance(node, before, theta, node.published.tokens, fields["child"])
        if node.children["a"].incarnation > 1:
            node = small_node(layout)
    assert {"malformed", "restarted", "implausible_incarnation", ACCEPTED} <= set(seen)
    print(f"{seen.total():,} mutated calls: {dict(seen.most_common())}")


def a_parents(layout: Layout, theta: Flat, seq: int, chance: random.Random) -> Packed:
    """A parent's model near the child's own, mutated."""
    model = Model(
        version=chance.choice([0, 1, 5]),
        progress=0.5,
        finished=False,
        tokens=5.0,
        last_seq=seq,
        values=theta + np.float32(0.001),
        residuals=(a_residual(layout, theta, "world/z"),),
        durable_seq=chance.choice([0, seq]),
    )
    return mutated_message(pack(model, layout), chance)


def read(packed: Packed, layout: Layout) -> tuple[Pulled, str]:
    """A model, or its refusal; and the name of the refusal."""
    try:
        return unpack_model(packed, layout, residuals=1), ACCEPTED
    except MessageError as error:
        return error, error.reason


def test_mutated_model_messages_leave_a_federation_its_own(layout: Layout, many: Callable[[int], int]) -> None:
    chance, node, seen = random.Random(2), small_node(layout, parent=True), Counter[str]()
    for number in range(many(1_000)):
        theta, seq, children = node.theta, node.seq, deepcopy(node.children)
        model, reason = read(a_parents(layout, theta, min(seq, 10**9), chance), layout)
        commands = node.handle(ParentModel(model=model, now_s=float(number)))
        if node.parent.gate.shut:
            reason = reason if isinstance(model, MessageError) else "gate"
            assert node.theta is theta
            assert node.seq == seq
        else:
            assert np.linalg.norm(node.theta - theta) <= STEP * np.linalg.norm(theta) * 1.01
        seen[reason] += 1
        assert np.isfinite(node.theta).all()
        assert node.seq <= seq + MOST_SKIPPED
        assert {n: c.last_seq for n, c in node.children.items()} == {n: c.last_seq for n, c in children.items()}
        assert not [command for command in commands if not isinstance(command, Note)]
        if number % 10 == 9:  # a walk of many small steps would lead anywhere
            node = small_node(layout, parent=True)
    assert {"malformed", "wrong_shape", "header_too_large", "gate", ACCEPTED} <= set(seen)
    print(f"{seen.total():,} mutated models to a federation: {dict(seen.most_common())}")


def test_mutated_model_messages_leave_a_client_its_own(tiny: Callable[..., Plan], many: Callable[[int], int]) -> None:
    plan = tiny(budget={"rounds": 9}, merge={"max_model_step": STEP}, model=TINY_MODEL)
    chance, one, seen = random.Random(3), Client(plan, plan.root.clients[0]), Counter[str]()
    one.begin(
        Model(version=0, progress=0.0, finished=False, tokens=1.0, last_seq=0, values=build.initial(plan)), now_s=0.0
    )
    one.train()
    one.update()
    own, state = one.trainer.read(), {name: getattr(one, name) for name in ("round", "step")}
    link = {name: getattr(one.link, name) for name in ("seq", "base_version")}
    for number in range(many(1_000)):
        vars(one).update(state, began=False)
        vars(one.link).update(link)
        one.trainer.write(own)
        model, reason = read(a_parents(plan.layout, own, 1, chance), plan.layout)
        one.begin(model, now_s=float(number))
        assert one.began
        now = one.trainer.read()
        if one.link.gate.shut:
            reason = reason if isinstance(model, MessageError) else "gate"
            assert now.tobytes() == own.tobytes()
            assert (one.seq, one.base_version) == (link["seq"], link["base_version"])
        else:
            assert np.linalg.norm(now - own) <= STEP * np.linalg.norm(own) * 1.01
        seen[reason] += 1
        assert one.round == state["round"]
        assert one.seq <= link["seq"] + MOST_SKIPPED
    assert {"malformed", "wrong_shape", "header_too_large", "gate", ACCEPTED} <= set(seen)
    print(f"{seen.total():,} mutated models to a client: {dict(seen.most_common())}")
