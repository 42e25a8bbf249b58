"""Newcomers: who they are, which worlds are trained, and what is compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.worlds import TINY_MODEL, client, crowd, two_levels

from worldlm_ray.config.loading import from_mapping
from worldlm_ray.config.schema import RunConfig
from worldlm_ray.errors import ConfigError
from worldlm_ray.experiments import newcomer
from worldlm_ray.plan import tree


def world(folder: Path, children: list[dict[str, Any]] | None = None) -> RunConfig:
    return from_mapping(
        {
            "name": "tiny",
            "model": TINY_MODEL | {"key_layers": []},
            "budget": {"rounds": 2},
            "training": {"local_steps": 5, "batch_size": 4},
            "aggregation": {"trigger": "synchronous"},
            "evaluation": {"tokens": 64, "final_tokens": 128},
            "data": {"cache_dir": str(folder / "cache")},
            "world": {"children": children or two_levels(folder)},
        }
    )


def paths(config: RunConfig) -> list[str]:
    return [spec.path for spec in tree.build(config).clients]


def test_the_last_client_of_every_federation_comes_late(tmp_path: Path) -> None:
    root = tree.build(world(tmp_path, [*two_levels(tmp_path), client("own", tmp_path, 5)]))
    assert newcomer.last_of_each(root) == ["world/north/b", "world/south/d"]


def test_the_world_is_trained_without_them_and_a_federation_without_clients_is_left_out(tmp_path: Path) -> None:
    config = world(tmp_path)
    root = tree.build(config)
    late = ["world/north/a", "world/north/b", "world/south/d"]
    assert paths(newcomer._without(config, root, late)) == ["world/south/c"]
    assert paths(newcomer._only(config, root, late)) == late


def test_copies_may_come_late(tmp_path: Path) -> None:
    config = world(tmp_path, [{"federation": "phones", "children": [crowd("phone", tmp_path, copies=3)]}])
    root = tree.build(config)
    late = newcomer.last_of_each(root)
    assert late == ["world/phones/phone-3"]
    assert paths(newcomer._without(config, root, late)) == ["world/phones/phone-1", "world/phones/phone-2"]


@pytest.mark.parametrize(
    ("given", "option"),
    [
        ({"names": ("world/nowhere",)}, "--newcomers"),
        ({"names": ("world/north/a", "world/north/b", "world/south/c", "world/south/d")}, "--newcomers"),
        ({"steps": 15}, "--steps"),
        ({"alone_steps": 3}, "--alone-steps"),
    ],
)
def test_bad_input_is_refused_before_the_first_run(tmp_path: Path, given: dict[str, Any], option: str) -> None:
    with pytest.raises(ConfigError) as caught:
        newcomer.newcomers(world(tmp_path), [0], out=tmp_path / "out", rules=newcomer.Rules(**given))
    assert caught.value.key == option
    assert not (tmp_path / "out").exists()


def test_a_newcomer_begins_from_the_worlds_model_and_a_second_call_trains_nothing(tmp_path: Path) -> None:
    phases: list[str] = []
    rules: dict[str, Any] = {"out": tmp_path / "out", "rules": newcomer.Rules(steps=10, alone_steps=5)}
    found = newcomer.newcomers(world(tmp_path), [0], on_phase=phases.append, **rules)
    assert [each.client for each in found] == ["world/north/b", "world/south/d"]
    assert len(phases) == 3
    # Ten steps from the model of others' 20 steps on the same words, against five from random weights.
    assert all(each.joined < each.alone for each in found)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("measures.json")}
    assert newcomer.newcomers(world(tmp_path), [0], **rules) == found
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("measures.json")} == written
