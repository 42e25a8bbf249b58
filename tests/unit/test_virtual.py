"""Clients that take turns at one model compute what clients with a model each do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.worlds import client, write_text

from worldlm_ray.client.client import Client
from worldlm_ray.client.shared import BufferStore, VirtualClients, slot_bytes
from worldlm_ray.errors import ConfigError
from worldlm_ray.exchange.messages import Model
from worldlm_ray.plan import build
from worldlm_ray.plan.plan import Plan
from worldlm_ray.plan.tree import in_processes, processes
from worldlm_ray.tensors.buffers import Flat

Tiny = Callable[..., Plan]
PRIVATE = {"unit": "record", "noise_multiplier": 1.0, "grad_sample_mode": "hooks"}


def phones(folder: Path, copies: int) -> dict[str, Any]:
    one = client("phone", folder, 1)
    write_text(folder / "phone.txt", seed=1, size=9_000 * copies)
    return one | {"copies": copies}


def model(values: Flat, version: int) -> Model:
    return Model(version=version, progress=0.1, finished=False, tokens=256.0, last_seq=0, values=values)


def live(client: Client, values: Flat, version: int) -> Flat:
    client.begin(model(values, version), now_s=0.0)
    client.train()
    return np.array(client.update().values)


APART = {"client": "apart"}


@pytest.mark.parametrize(("limit_bytes", "merge"), [(None, {"client": 0.5}), (0, {"client": 0.5}), (None, APART)])
def test_who_takes_turns_computes_the_same_bits(
    tiny: Tiny, tmp_path: Path, limit_bytes: int | None, merge: dict[str, Any]
) -> None:
    plan = tiny([phones(tmp_path, 3)], exchange={"codec": "int8"}, merge=merge)
    together = VirtualClients(plan, plan.root.clients, limit_bytes=limit_bytes)
    together.prepare()
    ours, theirs = [], [Client(plan, spec) for spec in plan.root.clients]
    for spec in plan.root.clients:
        ours.append(together.make(spec.path))
        together.settle(ours[-1])
    rng = np.random.default_rng(0)
    for version in range(3):
        parent = build.initial(plan) + 0.01 * version * rng.standard_normal(plan.layout.size).astype(np.float32)
        for our, their in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(live(our, parent, version), live(their, parent, version))
    has_parted = [one.trainer.beside() is not None for one in ours]
    assert has_parted == [merge is APART] * 3
    assert merge is APART or together.shared.swaps == 9
    for our, their in zip(ours, theirs, strict=True):
        (meta, arrays), (other, others) = our.state(), their.state()
        assert meta == other
        assert arrays.keys() == others.keys()
        for name, values in arrays.items():
            np.testing.assert_array_equal(values, others[name], err_msg=name)
        assert our.report(64) == their.report(64)
        assert our.report(64, parameters=build.initial(plan)) == their.report(64, parameters=build.initial(plan))
        assert our.sample(tokens=5) == their.sample(tokens=5)
    lies_in_files = together.store.file_bytes > 0
    assert lies_in_files == (limit_bytes == 0)


def test_private_clients_take_turns_at_one_trainer_with_their_own_noise(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short, long = client("short", tmp_path, 1), client("long", tmp_path, 2)
    write_text(tmp_path / "long.txt", seed=2, size=60_000)
    privacy = {"unit": "record", "target_epsilon": 3.0, "grad_sample_mode": "hooks"}
    plan = tiny([short, long], privacy=privacy, resources={"clients_per_process": 2}, budget={"rounds": 3})
    [group] = processes(plan.root)
    together = VirtualClients(plan, group)
    clients = [together.make(spec.path) for spec in group]
    drawn: list[tuple[str, float]] = []
    trainer = together.shared.trainer
    monkeypatch.setattr(trainer._noise, "add", lambda _, scale: drawn.append((path, scale)))  # type: ignore[attr-defined]
    for one in clients * 2:
        path = one.spec.path
        live(one, build.initial(plan), 0)
    noises = {one.spec.path: one.account.noise for one in clients if one.account is not None}
    assert len(set(noises.values())) == 2, "a longer text needs less noise"
    bound = plan.root.clients[0].settings.privacy.max_grad_norm
    assert set(drawn) == {(path, noise * bound) for path, noise in noises.items()}
    assert [len(one.account.ledger.entries()) for one in clients if one.account is not None] == [2, 2]


def test_a_client_comes_back_from_its_checkpoint_among_others(tiny: Tiny, tmp_path: Path) -> None:
    plan = tiny([phones(tmp_path, 2)])
    together = VirtualClients(plan, plan.root.clients)
    first, second = (together.make(spec.path) for spec in plan.root.clients)
    live(first, build.initial(plan), 0)
    live(second, build.initial(plan), 0)
    meta, arrays = first.state()
    saved = {name: np.array(values) for name, values in arrays.items()}
    expected = live(first, build.initial(plan), 1)
    again = VirtualClients(plan, plan.root.clients)
    back, other = (again.make(spec.path) for spec in plan.root.clients)
    live(other, build.initial(plan), 0)  # sits there first
    back.restore(meta, saved)
    again.settle(back)
    np.testing.assert_array_equal(live(back, build.initial(plan), 1), expected)


def test_between_its_turns_a_client_holds_flat_buffers(tiny: Tiny, tmp_path: Path) -> None:
    plan = tiny([phones(tmp_path, 2)])
    together = VirtualClients(plan, plan.root.clients)
    clients = [together.make(spec.path) for spec in plan.root.clients]
    for one in clients:
        together.settle(one)
        live(one, build.initial(plan), 0)
    together.shared.deactivate()
    step_counts = 2 * 4
    assert together.store.memory_bytes == 2 * slot_bytes(plan, plan.root.clients[0]) + step_counts
    del one
    clients.pop()
    left = slot_bytes(plan, plan.root.clients[0]) + step_counts / 2
    assert together.store.memory_bytes == left, "a client that is gone holds nothing"


def test_a_store_that_is_full_puts_buffers_into_files() -> None:
    store = BufferStore(100)
    small, large = np.arange(20, dtype=np.float32), np.arange(30, dtype=np.float32)
    kept = [store.keep(small), store.keep(large), store.keep(small[:5])]
    assert (store.memory_bytes, store.file_bytes) == (100, 120)
    kept[1] += 1
    np.testing.assert_array_equal(kept[1], np.arange(1, 31))
    np.testing.assert_array_equal(large, np.arange(30))
    np.testing.assert_array_equal(kept[0], small)


# ---- who shares a process --------------------------------------------------------------------------------------


def test_alike_siblings_share_a_process(tiny: Tiny, tmp_path: Path) -> None:
    north = {"federation": "north", "resources": {"clients_per_process": 3}, "children": [phones(tmp_path, 5)]}
    faster = client("fast", tmp_path, 2, training={"lr": 1e-2})
    plan = tiny([north, client("own", tmp_path, 3), {"federation": "south", "children": [faster]}])
    assert [[spec.name for spec in group] for group in processes(plan.root)] == [
        ["own"],
        ["phone-1", "phone-2", "phone-3"],
        ["phone-4", "phone-5"],
        ["fast"],
    ]


def test_those_who_train_differently_do_not_share(tiny: Tiny, tmp_path: Path) -> None:
    children = [
        client("a", tmp_path, 1),
        client("b", tmp_path, 2, training={"lr": 1e-2}),
        client("c", tmp_path, 3, placement={"labels": {"at": "sea"}}),
        client("d", tmp_path, 4, placement={"labels": {"at": "sea"}}),
        client("e", tmp_path, 5, privacy=PRIVATE),
        client("f", tmp_path, 6, privacy=PRIVATE),
        client("g", tmp_path, 7, privacy=PRIVATE | {"max_grad_norm": 0.5}),
    ]
    plan = tiny(children, resources={"clients_per_process": 10})
    assert [[spec.name for spec in group] for group in processes(plan.root)] == [
        ["a"],
        ["b"],
        ["c", "d"],
        ["e", "f"],
        ["g"],
    ]


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"training": {"zero_stage": 1}}, "a client that DeepSpeed trains"),
        ({"resources": {"clients_per_process": 4, "workers": 2}}, "a client that DeepSpeed trains"),
    ],
)
def test_who_cannot_share_a_process(tiny: Tiny, tmp_path: Path, settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=rf"world\.children\[0\]\.resources\.clients_per_process: 4, but {why}"):
        tiny([client("a", tmp_path, 1)], **{"resources": {"clients_per_process": 4}, **settings})


def test_clients_of_a_federation_with_fewer_places_share_processes_as_they_come(tiny: Tiny, tmp_path: Path) -> None:
    elastic = {"federation": "f", "max_clients": 3, "children": [phones(tmp_path, 5)]}
    plan = tiny([elastic], resources={"clients_per_process": 2})
    there = [plan.root.clients[number] for number in (0, 2, 3)]
    assert [[spec.name for spec in group] for group in in_processes(there)] == [["phone-1", "phone-3"], ["phone-4"]]


@pytest.mark.parametrize("share", [0, -1])
def test_share_is_a_number_above_zero(tiny: Tiny, tmp_path: Path, share: int) -> None:
    with pytest.raises(ConfigError, match=r"resources\.clients_per_process: got"):
        tiny([client("a", tmp_path, 1)], resources={"clients_per_process": share})
