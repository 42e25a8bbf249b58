"""An actor that Ray starts again while the storage is away waits for it in its constructor, which must not raise."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayError
from support import worlds

import actors.client
import actors.client_pool
import actors.inner
import actors.plans
import actors.recorder
import actors.shared
from actors.client import ClientActor
from actors.client_pool import ClientPoolActor
from actors.recorder import RecorderActor
from actors.shared import Address
from actors.world import WorldActor
from worldlm_ray import huggingface
from worldlm_ray.config.loading import from_mapping, save, to_mapping
from worldlm_ray.errors import ConfigError, RunError
from worldlm_ray.model.initial import initial_parameters
from worldlm_ray.model.shape import ModelShape
from worldlm_ray.plan import membership, rundir, tree
from worldlm_ray.plan import plan as plans
from worldlm_ray.plan.plan import Plan, make_plan
from worldlm_ray.run_clock import RunClock

Make = Callable[[Address], Any]
KINDS: dict[str, tuple[str, Make]] = {
    "client": ("world/north/a", ClientActor),
    "host": ("world/north/a", lambda address: ClientPoolActor(address, [address.path])),
    "inner node": ("world", WorldActor),
    "recorder": ("the recorder", lambda address: RecorderActor(address.sent)),
}


READERS = ["client", "host"]
"""Those that encode text, with a file that the run keeps."""


@pytest.fixture
def plan(tiny: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Of a run that keeps a tokenizer, on no cluster."""
    monkeypatch.setattr(actors.shared, "ray", SimpleNamespace(get_actor=lambda *_, **__: None))
    monkeypatch.setattr(actors.shared, "settle", lambda clock, *_: clock)
    for module in (actors.client, actors.client_pool, actors.inner, actors.recorder):
        monkeypatch.setattr(module, "was_restarted", lambda: False)  # nothing is to begin by itself
    raw = to_mapping(tiny().config)
    raw["data"]["tokenizer"] = str(worlds.tokenizer(tmp_path / "tok.json"))
    return rundir.create(make_plan(from_mapping(raw)))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], Any]]:
    """What happens during each wait for the storage, the last first."""
    found: list[Callable[[], Any]] = []
    monkeypatch.setattr(actors.shared, "time", SimpleNamespace(sleep=lambda _: found.pop()()))
    return found


def constructed(plan: Plan, kind: str) -> Any:
    path, make = KINDS[kind]

    async def scene() -> Any:  # some actors have a loop, and look for it
        return make(Address(plan, path, RunClock.starting(), "test"))

    return asyncio.run(scene())


@pytest.mark.parametrize("kind", READERS)
def test_an_actor_that_died_waits_for_the_files_of_its_run(
    plan: Plan,
    waits: list[Callable[[], Any]],
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(actors.shared, "was_restarted", lambda: True)
    away = plan.run_dir.rename(plan.run_dir.with_name("away"))
    waits += [lambda: away.rename(plan.run_dir), lambda: None]
    assert constructed(plan, kind).plan == plan
    assert not waits
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1, "it is said once"
    assert said[0].startswith(f"worldlm: {KINDS[kind][0]} cannot go on yet: ")


@pytest.mark.parametrize("kind", READERS)
def test_an_actor_that_begins_raises_what_is_wrong(plan: Plan, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors.shared, "was_restarted", lambda: False)
    plan.run_dir.rename(plan.run_dir.with_name("away"))
    with pytest.raises(RunError, match="restore the file of this run"):
        constructed(plan, kind)


@pytest.mark.parametrize("kind", list(KINDS))
def test_an_actor_takes_the_plan_as_it_is(plan: Plan, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((plans, "assembled"), (tree, "build")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("the launcher has made the plan"))
    assert constructed(plan, kind).plan is plan


@pytest.mark.parametrize("kind", sorted({*KINDS} - {*READERS}))
def test_who_encodes_no_text_needs_no_tokenizer(plan: Plan, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a machine without the run's files can hold it."""
    monkeypatch.setattr(actors.shared, "was_restarted", lambda: False)
    (plan.run_dir / "files" / "tokenizer.json").unlink()
    assert constructed(plan, kind).plan is plan


def test_a_large_plan_is_stored_once_and_read_from_the_folder_later(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert actors.plans.to_send(plan) is plan
    stored: dict[str, Any] = {}
    fake = SimpleNamespace(put=lambda value: stored.setdefault("ref", value) and "ref", get=lambda ref: stored[ref])
    monkeypatch.setattr(actors.plans, "ray", fake)
    monkeypatch.setattr(actors.plans, "INLINE_BYTES", 100)
    sent = actors.plans.to_send(plan)
    assert isinstance(sent, actors.plans.StoredPlan)
    assert actors.plans.received(sent) is plan

    def lost(ref: Any) -> Any:
        raise RayError

    fake.get = lost  # the launcher has ended
    assert actors.plans.received(sent) == plan


def test_a_plan_is_pickled_without_what_is_made_from_it(plan: Plan) -> None:
    before = len(pickle.dumps(plan))
    assert plan.specs
    assert plan.root.clients
    assert plan.distinct_clients
    assert len(pickle.dumps(plan)) == before
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_a_plan_follows_the_changes_of_its_folder(plan: Plan) -> None:
    assert rundir.renewed(plan) == plan
    changed = membership.without(plan, "world/north/b")
    save(changed.config, plan.run_dir / rundir.CONFIG)
    (plan.run_dir / "files" / "tokenizer.json").unlink()  # is not looked at
    assert rundir.renewed(plan) == changed


def test_an_inner_node_that_died_waits_for_the_weights_that_the_run_begins_from(
    plan: Plan, waits: list[Callable[[], Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    shape = ModelShape(hidden_size=32, layers=1, heads=2, kv_heads=2, intermediate_size=48, context=16, vocab_size=256)
    layout = shape.layout([])
    huggingface.export(initial_parameters(shape, layout, seed=9), shape, layout, folder)
    raw = to_mapping(plan.config) | {"kept": {}, "run_dir": str(tmp_path / "other")}
    raw["model"] = {"initial_from": str(folder), "key_layers": []}
    raw["data"] |= {"tokenizer": "bytes"}
    other = rundir.create(make_plan(from_mapping(raw)))
    away = folder.rename(tmp_path / "elsewhere")
    monkeypatch.setattr(actors.shared, "was_restarted", lambda: False)
    with pytest.raises(ConfigError, match=r"^model\.initial_from: "):
        constructed(other, "inner node")
    monkeypatch.setattr(actors.shared, "was_restarted", lambda: True)
    waits.append(lambda: away.rename(folder))
    assert constructed(other, "inner node").node.version == 0
    assert not waits
