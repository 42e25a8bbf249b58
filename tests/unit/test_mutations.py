"""Mutated messages, checkpoints and configurations: a named reason each, no crash, no state changed.

A short version runs with every test run; `make soak` runs a hundred times as many.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from worlds import client

from worldlm_ray import checkpoint, config
from worldlm_ray.aggregation.events import ACCEPTED, Answer, Joined, Push
from worldlm_ray.aggregation.node import Node
from worldlm_ray.config import AggregationConfig, BudgetConfig, MergeConfig, ResidualsConfig
from worldlm_ray.errors import CheckpointError, WorldLMError
from worldlm_ray.messages import Packed, Residual, Update, pack
from worldlm_ray.params import Layout
from worldlm_ray.plan import Plan, make_plan

REASONS = {
    "malformed",
    "wrong_schema",
    "wrong_layout",
    "wrong_fragment",
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


@pytest.fixture
def many(request: pytest.FixtureRequest) -> Callable[[int], int]:
    """How often: the number given, or a hundred times that in a soak."""
    return lambda number: number * (100 if request.config.getoption("--soak") else 1)


# ---- messages ------------------------------------------------------------------------------------------------------


def a_node(layout: Layout) -> Node:
    made = Node(
        path="world",
        children=("a", "b"),
        aggregation=AggregationConfig(
            buffer_size=2, max_staleness=3, max_update_norm=10.0, residuals=ResidualsConfig(per_round=1)
        ),
        merge=MergeConfig(),
        has_parent=False,
        layout=layout,
        initial=np.arange(layout.size, dtype=np.float32),
        budget=BudgetConfig(tokens=10**9),
    )
    for child in ("a", "b"):
        made.handle(Joined(child=child, now_s=0.0))
    return made


def digest(node: Node) -> str:
    """Everything that a node is, but for its count of refusals."""
    meta, arrays = node.state()
    meta.pop("refused")
    meta.pop("arrived")
    found = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name in sorted(arrays):
        found.update(name.encode() + arrays[name].tobytes())
    return found.hexdigest()


def mutated_message(packed: Packed, chance: random.Random) -> Packed:
    kind = chance.choice(["bytes", "cut", "insert", "field", "remove", "add", "values", "shape"])
    header, values = bytearray(packed.header), packed.values
    if kind == "bytes":
        for _ in range(chance.randint(1, 4)):
            header[chance.randrange(len(header))] = chance.randrange(256)
    elif kind == "cut":
        del header[chance.randrange(len(header)) :]
    elif kind == "insert":
        where = chance.randrange(len(header))
        header[where:where] = chance.randbytes(chance.randint(1, 8))
    elif kind in ("field", "remove", "add"):
        fields = msgpack.unpackb(packed.header)
        if kind == "add":
            fields[chance.choice(["values", "loss", "", "self"])] = chance.choice(ODD)
        else:
            holder = chance.choice([fields, fields, fields["residuals"][0]])
            name = chance.choice(sorted(holder))
            holder[name] = chance.choice(ODD)
            if kind == "remove":
                del holder[name]
        header = bytearray(msgpack.packb(fields))
    elif kind == "values":
        values = np.array(values)
        values[chance.randrange(values.size)] = chance.choice([np.nan, np.inf, -np.inf, 3e38, 1e20, 50.0])
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


def test_mutated_messages_are_refused_by_name_and_change_nothing(layout: Layout, many: Callable[[int], int]) -> None:
    chance, node, seen = random.Random(0), a_node(layout), Counter[str]()
    keys = layout.key_layers[0]
    residual = Residual(
        origin="world/a", layer=keys.name, tokens=3.0, age=1, values=np.ones(keys.stop - keys.start, np.float32)
    )
    for number in range(1, many(1_000) + 1):
        update = Update(
            sender="a",
            seq=number,
            base_version=node.version,
            tokens=5,
            started_tokens=5 * number,
            values=np.full(layout.size, 0.01, np.float32),
            residuals=(residual,),
        )
        before = digest(node)
        packed = mutated_message(pack(update, layout), chance)
        sender = chance.choice(["a", "a", "a", "b", "nobody"])
        commands = node.handle(Push(sender=sender, packed=packed, now_s=float(number)))
        [reason] = [command.verdict.reason for command in commands if isinstance(command, Answer)]
        seen[reason] += 1
        if reason != ACCEPTED:
            assert reason in REASONS
            assert digest(node) == before, f"message {number} was refused as {reason} and changed the state"
        assert np.isfinite(node.theta).all()
    assert {"malformed", "wrong_schema", "wrong_layout", "wrong_shape", "unknown_sender", "not_finite"} <= set(seen)


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def mutate_file(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    kind = chance.choice(["bytes", "cut", "empty", "remove", "append"]) if data else "append"
    if kind == "remove":
        path.unlink()
        return
    if kind == "bytes":
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif kind == "cut":
        del data[chance.randrange(len(data)) :]
    elif kind == "empty":
        data.clear()
    else:
        data += chance.randbytes(3)
    path.write_bytes(data)


def test_a_mutated_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path, many: Callable[[int], int]) -> None:
    chance, pristine = random.Random(0), tmp_path / "pristine"
    for number in (1, 2):
        checkpoint.save(pristine, {"number": number}, {"theta": np.full(9, number, np.float32)})
    for number in range(many(10)):
        place = tmp_path / str(number)
        shutil.copytree(pristine, place)
        newest = sorted(place.iterdir())[-1]
        mutate_file(chance.choice(sorted(newest.iterdir())), chance)
        warnings: list[str] = []
        found = checkpoint.load(place, warn=warnings.append)
        assert found is not None
        meta, arrays = found
        assert arrays["theta"].tolist() == [meta["number"]] * 9
        assert meta["number"] == 2 - len(warnings)  # white space behind JSON, say, is no damage
        for arrays_file in place.glob("*/arrays.safetensors"):
            arrays_file.write_bytes(arrays_file.read_bytes()[: chance.randrange(40)])
        with pytest.raises(CheckpointError, match="none of 2 checkpoints is whole"):
            checkpoint.load(place)
        shutil.rmtree(place)


# ---- configurations ------------------------------------------------------------------------------------------------


def mutated_text(text: str, chance: random.Random) -> str:
    lines = text.splitlines()
    index = chance.randrange(len(lines))
    kind = chance.choice(["drop", "repeat", "indent", "value", "key", "characters"])
    if kind == "drop":
        del lines[index]
    elif kind == "repeat":
        lines.insert(index, lines[chance.randrange(len(lines))])
    elif kind == "indent":
        lines[index] = "  " + lines[index]
    elif kind == "value":
        odd = [
            "",
            "-1",
            "0",
            "nan",
            ".inf",
            "1e400",
            "null",
            "[]",
            "{}",
            "[1, a]",
            "yes",
            "''",
            "${world}",
            "${x}",
            "???",
            "1:2",
        ]
        lines[index] = lines[index].partition(":")[0] + ": " + chance.choice(odd)
    elif kind == "key":
        lines[index] = lines[index].replace(chance.choice("aeiou"), chance.choice(["", "x", "_"]), 1)
    else:
        characters = list("\n".join(lines))
        for _ in range(chance.randint(1, 3)):
            characters[chance.randrange(len(characters))] = chance.choice(":{}[],'\"#&*!|>%@`-? \t\n0")
        return "".join(characters)
    return "\n".join(lines)


def test_a_mutated_configuration_is_read_or_refused_in_one_line(
    tmp_path: Path, tiny: Callable[..., Plan], many: Callable[[int], int]
) -> None:
    chance, file = random.Random(0), tmp_path / "conf.yaml"
    private = {"unit": "record", "target_epsilon": 3.0}
    sharded = {"training": {"zero_stage": 2}, "resources": {"workers": 2}}
    children = [
        {"federation": "f", "privacy": private, "children": [client("a", tmp_path, 1)]},
        client("b", tmp_path, 2, **sharded),
    ]
    config.save(tiny(children).config, file)
    text = file.read_text()
    refusals = []
    for _ in range(many(30)):
        file.write_text(mutated_text(text, chance))
        try:
            make_plan(config.load(str(file)))
        except WorldLMError as error:
            refusals.append(str(error))
    assert len(refusals) > many(30) / 4
    assert not [refusal for refusal in refusals if "\n" in refusal]
