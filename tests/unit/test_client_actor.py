"""The client's actor, constructed directly: threads stand in for Ray's calls, and a node for its parent."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.lone_parent import Parent
from support.pretrained import save_pretrained
from support.threaded_ray import FakeRay, Remote
from support.worlds import client

import actors.client
import actors.drivers
import actors.shared
from actors.client import ClientActor
from actors.shared import Address
from worldlm_ray.client import above
from worldlm_ray.client.client import Client
from worldlm_ray.config.loading import from_mapping
from worldlm_ray.plan import rundir
from worldlm_ray.plan.plan import Plan, make_plan
from worldlm_ray.protocol.life import Await, Save
from worldlm_ray.records import LifeRecord, OwnModelRecord
from worldlm_ray.run_clock import RunClock
from worldlm_ray.storage import checkpoint
from worldlm_ray.tensors.buffers import Flat

Tiny = Callable[..., Plan]
PATH = "world/a"
ROUNDS = 5
UNHURRIED = {"local_steps": 4, "batch_size": 4, "step_delay_s": 0.02}
"""Training that leaves time to close the parent's gate."""


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    ray = FakeRay()
    for module in (actors.client, actors.shared, actors.drivers):
        monkeypatch.setattr(module, "ray", ray)
    return ray


@pytest.fixture
def living(fake: FakeRay) -> Iterator[Callable[[Plan], ClientActor]]:
    """Starts client actors, and stops them at the end of the test."""
    started: list[ClientActor] = []

    def start(plan: Plan) -> ClientActor:
        actor = ClientActor(Address(plan, PATH, RunClock.starting(), "test"))
        started.append(actor)
        actor.ready()
        actor.start()
        return actor

    yield start
    for actor in started:
        actor.stop()
        assert actor._thread is not None
        actor._thread.join(30.0)  # nothing of it may see the real Ray


def a_plan(tiny: Tiny, folder: Path, **changes: Any) -> Plan:
    return tiny([client("a", folder, 1)], **({"budget": {"rounds": ROUNDS}} | changes))


def parent_of(fake: FakeRay, plan: Plan, **options: Any) -> Parent:
    parent = Parent(plan, **options)
    fake.actors["world"] = Remote(parent)
    return parent


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30.0
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.002)


class SlowStorage:
    """Storage that keeps what it is given until it may write it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.given: list[tuple[dict[str, Any], dict[str, Flat]]] = []
        self.copies: list[dict[str, Flat]] = []
        self.may, self.written = threading.Event(), 0
        write = checkpoint.save

        def save(place: Path, meta: dict[str, Any], arrays: dict[str, Flat], **options: Any) -> Path:
            self.given.append((meta, arrays))
            self.copies.append({name: np.array(values) for name, values in arrays.items()})
            assert self.may.wait(30.0)
            path = write(place, meta, arrays, **options)
            self.written += 1
            return path

        monkeypatch.setattr(checkpoint, "save", save)


class Within:
    """Watches the steps of one kind in clients' lives.

    Args:
        kind: of the steps.
        is_meant: which of them.
        seen: called at the end of each; `at_end` keeps what it says.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        kind: type,
        *,
        is_meant: Callable[[Any], bool] = lambda step: True,
        seen: Callable[[], Any] = lambda: None,
    ) -> None:
        self.now, self.at_end = threading.Event(), list[Any]()
        """Set while a client is in such a step."""
        handlers = ClientActor._others.fget  # type: ignore[attr-defined]

        def others(actor: ClientActor) -> dict[type, Callable[[Any], Any]]:
            found = handlers(actor)
            return {**found, kind: lambda step: self._take(found[kind], step) if is_meant(step) else found[kind](step)}

        self._seen = seen
        monkeypatch.setattr(ClientActor, "_others", property(others))

    def _take(self, handler: Callable[[Any], Any], step: Any) -> Any:
        self.now.set()
        try:
            return handler(step)
        finally:
            self.at_end.append(self._seen())
            self.now.clear()


def saved(plan: Plan) -> tuple[dict[str, Any], dict[str, Flat]]:
    found = checkpoint.load(checkpoint.folder(plan.run_dir, PATH))
    assert found is not None
    return found


# ---- checkpoints -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
def test_a_client_trains_while_its_checkpoint_is_written(
    fake: FakeRay, living: Any, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    plan = a_plan(tiny, tmp_path, checkpoint={"every_s": 0.0}, exchange={"overlap": overlap})
    parent = parent_of(fake, plan)
    storage = SlowStorage(monkeypatch)
    last = Within(monkeypatch, Save, is_meant=lambda step: step.wait, seen=lambda: storage.written)
    actor = living(plan)
    # Not a byte is written, and the client comes to the end of its budget.
    until(lambda: bool(storage.given) and parent.node.intake.accepted == ROUNDS)
    assert actor.client.steps == ROUNDS * 4
    assert (len(storage.given), storage.written) == (1, 0), "one write at a time"
    assert last.now.wait(30.0)
    storage.may.set()
    assert actor.outcome() == "finished"
    assert last.at_end == [2], "it does not end before its last checkpoint is on disk"
    assert (saved(plan)[0]["round"], saved(plan)[0]["link"]["seq"]) == (ROUNDS, ROUNDS)

    # What was kept for the storage is the state after the first round, whatever was trained since.
    meta, arrays = storage.given[0]
    for name, values in storage.copies[0].items():
        assert arrays[name].tobytes() == values.tobytes(), name
    assert (meta["round"], meta["link"]["seq"]) == (1, 1)
    same = Client(plan, plan.root.clients[0])
    same.begin(Parent(plan).node.serving.model("a", incarnation=1), now_s=0.0)
    same.train()
    update = same.update()
    if overlap:
        same.begin_ahead()
    state = same.state()[1]
    for name in ("theta", "anchor", "optimizer.exp_avg", "optimizer.exp_avg_sq", "optimizer.step"):
        assert arrays[name].tobytes() == state[name].tobytes(), name
    assert arrays["outbox.1"].tobytes() == update.values.tobytes()
    assert [entry["seq"] for entry in meta["link"]["outbox"]] == [1]


def test_a_client_that_is_stopped_waits_for_a_checkpoint_of_its_last_step(
    fake: FakeRay, living: Any, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = a_plan(tiny, tmp_path, checkpoint={"every_s": 0.0}, training=UNHURRIED, budget={"rounds": 1000})
    parent_of(fake, plan)
    storage = SlowStorage(monkeypatch)
    last = Within(monkeypatch, Save, is_meant=lambda step: step.wait, seen=lambda: storage.written)
    actor = living(plan)
    until(lambda: bool(storage.given) and actor.client.round >= 2)
    actor.stop()
    assert last.now.wait(30.0)
    assert storage.written == 0
    storage.may.set()
    assert actor.outcome() == "stopped"
    assert last.at_end == [2]
    meta, arrays = saved(plan)
    assert (meta["round"], meta["steps"]) == (actor.client.round, actor.client.steps)
    assert arrays["theta"].tobytes() == actor.client.trainer.read().tobytes()


def test_storage_that_refuses_is_a_warning(fake: FakeRay, living: Any, tiny: Tiny, tmp_path: Path) -> None:
    plan = a_plan(tiny, tmp_path, checkpoint={"every_s": 0.0}, faults=[f"0s disk {PATH} for 1000s"])
    parent = parent_of(fake, plan)
    assert living(plan).outcome() == "finished"
    assert parent.node.intake.accepted == ROUNDS
    warnings = [r.detail for r in fake.records if isinstance(r, LifeRecord) and r.event == "warning"]
    assert warnings
    assert all("the storage refuses on purpose" in text for text in warnings)


# ---- exchange.overlap ------------------------------------------------------------------------------------------


def test_a_client_trains_a_round_while_it_exchanges_and_then_waits(
    fake: FakeRay, living: Any, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = a_plan(tiny, tmp_path, exchange={"overlap": True}, training=UNHURRIED)
    parent = parent_of(fake, plan)
    parent.gate.clear()
    exchange = Within(monkeypatch, Await)
    actor = living(plan)
    until(parent.held.is_set)
    assert not actor.client.began, "before its first round it has nothing to train"
    parent.gate.set()
    parent.held.clear()
    until(lambda: actor.client.round >= 1)
    parent.gate.clear()
    # No second round before the exchange has come back: the thread that trains waits for it.
    until(lambda: parent.held.is_set() and actor.client.is_whole and exchange.now.is_set())
    assert actor.client.round >= 2
    parent.gate.set()
    assert actor.outcome() == "finished"
    assert (actor.client.round, actor.client.steps, parent.node.intake.accepted) == (ROUNDS, ROUNDS * 4, ROUNDS)
    assert parent.node.published.tokens == ROUNDS * actor.client.round_tokens
    # Every update was measured from the model that the one before had brought.
    assert actor.client.base_version == ROUNDS - 1


def test_a_client_that_is_stopped_in_mid_exchange_goes_on_and_sends_again(
    fake: FakeRay, living: Any, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actors.client, "ARRIVAL_S", 0.1)
    plan = a_plan(tiny, tmp_path, exchange={"overlap": True}, training=UNHURRIED)
    parent = parent_of(fake, plan)
    first = living(plan)
    until(lambda: first.client.round >= 1)
    parent.gate.clear()
    until(lambda: parent.held.is_set() and first.client.is_whole)
    first.stop()
    assert first.outcome() == "stopped"
    parent.dead = True
    parent.gate.set()
    meta, arrays = saved(plan)
    link = meta["link"]
    assert (meta["began"], meta["whole"], link["in_flight"]["seq"]) == (True, True, link["seq"])
    assert meta["round"] == meta["link"]["seq"] + 1
    assert arrays["theta"].tobytes() == first.client.trainer.read().tobytes()

    fresh = parent_of(fake, plan, incarnation=2)  # which has lost all that it knew
    second = living(plan)
    assert second.outcome() == "finished"
    assert second.client.round == ROUNDS
    assert fresh.node.children["a"].last_seq == ROUNDS
    assert fresh.node.published.tokens == ROUNDS * second.client.round_tokens, "what was in flight was sent again, once"


def test_a_parent_that_dies_during_an_exchange_is_sent_what_it_has_lost(
    fake: FakeRay, living: Any, tiny: Tiny, tmp_path: Path
) -> None:
    plan = a_plan(tiny, tmp_path, exchange={"overlap": True}, training=UNHURRIED)
    parent = parent_of(fake, plan)
    actor = living(plan)
    until(lambda: actor.client.round >= 1)
    parent.gate.clear()
    until(lambda: parent.held.is_set() and actor.client.is_whole)
    fresh = parent_of(fake, plan, incarnation=2)
    parent.dead = True
    parent.gate.set()
    assert actor.outcome() == "finished"
    assert actor.client.steps == ROUNDS * 4
    assert fresh.node.published.tokens == ROUNDS * actor.client.round_tokens
    assert fresh.node.intake.refused == {}


def test_a_client_that_leaves_has_its_last_update_arrive(
    fake: FakeRay, living: Any, tiny: Tiny, tmp_path: Path
) -> None:
    plan = a_plan(tiny, tmp_path, exchange={"overlap": True}, training=UNHURRIED, budget={"rounds": 1000})
    parent = parent_of(fake, plan)
    actor = living(plan)
    until(lambda: actor.client.round >= 2)
    actor.leave()
    assert actor.outcome() == "left"
    assert parent.node.intake.accepted == actor.client.seq == actor.client.round
    assert not actor.client.began


# ---- the models of the nodes above ------------------------------------------------------------------------------


def test_a_client_measures_the_published_model_of_its_parent(
    fake: FakeRay, tiny: Tiny, tmp_path: Path, living: Callable[[Plan], ClientActor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(above, "SHARE", 1e9)
    plan = a_plan(tiny, tmp_path, evaluation={"tokens": 256, "final_tokens": 256, "share": 100.0})
    parent_of(fake, plan)
    assert living(plan).outcome() == "finished"
    found = [record for record in fake.records if isinstance(record, OwnModelRecord)]
    assert [(record.node, record.by, record.version) for record in found] == [
        ("world", PATH, number) for number in range(1, ROUNDS + 1)
    ]
    assert all(record.loss > 0.0 and record.heldout_bytes > 0 for record in found)


def test_a_node_that_does_not_give_its_model_is_not_waited_for(
    fake: FakeRay, tiny: Tiny, tmp_path: Path, living: Callable[[Plan], ClientActor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(above, "SHARE", 1e9)
    monkeypatch.setattr(actors.client, "PATIENCE_S", 0.05)
    plan = a_plan(tiny, tmp_path, budget={"rounds": 2})
    parent, never = parent_of(fake, plan), threading.Event()
    monkeypatch.setattr(parent, "published", never.wait)
    assert living(plan).outcome() == "finished"
    never.set()
    assert parent.node.intake.accepted == 2
    assert not any(isinstance(record, OwnModelRecord) for record in fake.records)


def test_a_client_of_experts_leaves_and_is_forgotten(
    fake: FakeRay, tmp_path: Path, living: Callable[[Plan], ClientActor]
) -> None:
    pytest.importorskip("peft")
    model = {"backend": "transformers", "initial_from": str(save_pretrained(tmp_path / "base")), "trainable": "lora"}
    raw = {
        "run_dir": str(tmp_path / "run"),
        "data": {"cache_dir": str(tmp_path / "cache")},
        "model": {**model, "context": 16, "lora": {"freeze_a": True, "experts": "rest"}},
        "budget": {"rounds": 1_000},
        "training": {"local_steps": 2, "batch_size": 2},
        "aggregation": {"rule": "sums"},
        "merge": {"client": 0.0},
        "evaluation": {"every_rounds": 0, "tokens": 64, "final_tokens": 64},
        "world": {"children": [client("a", tmp_path, 1)]},
    }
    plan = rundir.create(make_plan(from_mapping(raw)))
    parent = parent_of(fake, plan)
    actor = living(plan)
    until(lambda: parent.node.version >= 2)
    sums = parent.node.published.sums
    assert sums is not None
    assert sums.total.any()
    actor.leave(True)
    assert actor.outcome() == "left"
    assert not sums.total.any()
    assert sums.weights == {}
    meta, arrays = saved(plan)
    assert meta["experts"]["own_part"]["pending"]["weight"] == 0, "the checkpoint knows what was sent last"
    assert not (arrays["own_part.held"] + arrays["own_part.adds"]).any()
