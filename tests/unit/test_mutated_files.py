"""Mutated checkpoints and configurations: a named reason each, no crash. `make soak` runs a hundred times as many."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.worlds import client

from worldlm_ray.config.loading import load, to_yaml
from worldlm_ray.errors import CheckpointError, ConfigErrors, WorldLMError
from worldlm_ray.plan.plan import Plan, make_plan
from worldlm_ray.storage import checkpoint

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
    text = to_yaml(tiny(children).config)
    refusals = []
    for _ in range(many(30)):
        file.write_text(mutated_text(text, chance))
        try:
            make_plan(load(str(file)))
        except ConfigErrors as error:  # a line each
            refusals += [str(each) for each in error.each]
        except WorldLMError as error:
            refusals.append(str(error))
    assert len(refusals) > many(30) / 4
    assert not [refusal for refusal in refusals if "\n" in refusal]
