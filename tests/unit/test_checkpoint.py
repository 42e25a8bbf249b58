"""Checkpoints: what is saved comes back, and damage falls back to the one before, and says so."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from worldlm_ray.errors import CheckpointError, SupersededError
from worldlm_ray.storage import checkpoint
from worldlm_ray.tensors.buffers import Flat

Damage = Callable[[Path], Any]


def arrays(seed: int) -> dict[str, Flat]:
    rng = np.random.Generator(np.random.PCG64(seed))
    return {"theta": rng.standard_normal(1_000).astype(np.float32), "held.a": np.full(7, seed, np.float32)}


def save(place: Path, number: int, **options: Any) -> Path:
    return checkpoint.save(place, {"number": number}, arrays(number), **options)


def load(place: Path) -> tuple[int, list[str]]:
    """Number of the checkpoint that was loaded, whole; and the warnings."""
    warnings: list[str] = []
    found = checkpoint.load(place, warn=warnings.append)
    assert found is not None
    meta, loaded = found
    for name, values in arrays(meta["number"]).items():
        assert loaded[name].tobytes() == values.tobytes()
    return meta["number"], warnings


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    meta = {"version": 7, "nested": {"list": [1, 2.5, None, True]}, "text": "é", "tiny": 1e-300, "none": -math.inf}
    checkpoint.save(tmp_path / "new" / "place", meta, arrays(1))
    found = checkpoint.load(tmp_path / "new" / "place")
    assert found is not None
    assert found[0] == meta
    assert {name: values.tobytes() for name, values in found[1].items()} == {
        name: values.tobytes() for name, values in arrays(1).items()
    }


def test_floats_come_back_to_the_last_bit(tmp_path: Path) -> None:
    values = [float(value) for value in np.random.Generator(np.random.PCG64(0)).standard_normal(200)]
    checkpoint.save(tmp_path, {"logits": values}, {})
    found = checkpoint.load(tmp_path)
    assert found is not None
    assert found[0]["logits"] == values


@pytest.mark.parametrize("count", [0, 1])
def test_empty_buffers_and_none_at_all_come_back(tmp_path: Path, count: int) -> None:
    checkpoint.save(tmp_path, {}, {str(i): np.zeros(0, np.float32) for i in range(count)})
    found = checkpoint.load(tmp_path)
    assert found is not None
    assert [values.shape for values in found[1].values()] == [(0,)] * count


def test_a_strided_and_a_read_only_buffer_are_written_right(tmp_path: Path) -> None:
    odd = np.arange(10, dtype=np.float32)[1::2]
    odd.flags.writeable = False
    checkpoint.save(tmp_path, {}, {"odd": odd})
    found = checkpoint.load(tmp_path)
    assert found is not None
    assert found[1]["odd"].tolist() == [1, 3, 5, 7, 9]


def test_the_safetensors_library_reads_the_file(tmp_path: Path) -> None:
    final = save(tmp_path, 3)
    for name, values in load_file(final / "arrays.safetensors").items():
        np.testing.assert_array_equal(values, arrays(3)[name])


def test_a_node_that_never_saved_has_none(tmp_path: Path) -> None:
    assert checkpoint.load(tmp_path / "nowhere") is None
    assert checkpoint.load(tmp_path) is None


def test_the_newest_is_loaded_and_so_many_are_kept(tmp_path: Path) -> None:
    for number in range(1, 13):
        save(tmp_path, number, keep=2)
        assert load(tmp_path) == (number, [])
        assert len(list(tmp_path.iterdir())) == min(number, 2)


@pytest.mark.parametrize("keep", [1, 3])
def test_another_number_may_be_kept(tmp_path: Path, keep: int) -> None:
    for number in range(1, 6):
        save(tmp_path, number, keep=keep)
    assert len(list(tmp_path.iterdir())) == keep
    assert load(tmp_path) == (5, [])


def rewrite(change: Callable[[dict[str, Any]], Any]) -> Damage:
    def damage(path: Path) -> None:
        manifest = json.loads((path / "meta.json").read_text())
        changed = change(manifest)
        (path / "meta.json").write_text(json.dumps(manifest if changed is None else changed))

    return damage


def flip(file: str, place: int) -> Damage:
    def damage(path: Path) -> None:
        content = bytearray((path / file).read_bytes())
        content[place] ^= 0x40
        (path / file).write_bytes(content)

    return damage


def cut(file: str) -> Damage:
    return lambda path: (path / file).write_bytes((path / file).read_bytes()[:-9])


DAMAGE: dict[str, Damage] = {
    "arrays cut short": cut("arrays.safetensors"),
    "arrays empty": lambda path: (path / "arrays.safetensors").write_bytes(b""),
    "arrays missing": lambda path: (path / "arrays.safetensors").unlink(),
    "a bit of a value flipped": flip("arrays.safetensors", -1),
    "a bit of the index flipped": flip("arrays.safetensors", 20),
    "meta missing": lambda path: (path / "meta.json").unlink(),
    "meta cut short": cut("meta.json"),
    "meta empty": lambda path: (path / "meta.json").write_bytes(b""),
    "meta garbage": lambda path: (path / "meta.json").write_bytes(b"\x00\xff\xfe garbage"),
    "meta a list": rewrite(lambda manifest: [1, 2]),
    "meta null": lambda path: (path / "meta.json").write_text("null"),
    "meta without a digest": rewrite(lambda manifest: manifest.pop("sha256") and None),
    "another format": rewrite(lambda manifest: manifest.update(format=99)),
    "a digit of the state changed": rewrite(lambda manifest: manifest["meta"].update(number=1)),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_newest_falls_back_and_says_so(tmp_path: Path, name: str) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    DAMAGE[name](newest)
    number, warnings = load(tmp_path)
    assert number == 1
    assert len(warnings) == 1
    assert str(newest) in warnings[0]
    assert "going back" in warnings[0]


def test_all_damaged_is_an_error(tmp_path: Path) -> None:
    for number in (1, 2):
        DAMAGE["arrays cut short"](save(tmp_path, number))
    warnings: list[str] = []
    said = r"none of 2 checkpoints is whole \(.*the arrays are damaged\); restore .* or begin a new run$"
    with pytest.raises(CheckpointError, match=said):
        checkpoint.load(tmp_path, warn=warnings.append)
    assert len(warnings) == 2


def test_a_damaged_one_is_followed_by_a_higher_number(tmp_path: Path) -> None:
    save(tmp_path, 1)
    DAMAGE["meta missing"](save(tmp_path, 2))
    save(tmp_path, 3)
    assert load(tmp_path) == (3, [])


def test_what_a_killed_writer_left_is_ignored(tmp_path: Path) -> None:
    save(tmp_path, 1)
    leftover = tmp_path / ".writing-0badcafe"
    leftover.mkdir()
    (leftover / "arrays.safetensors").write_bytes(b"half")
    assert load(tmp_path) == (1, [])
    save(tmp_path, 2)
    assert load(tmp_path) == (2, [])


def test_other_files_in_the_folder_are_ignored(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "000009-notes.txt").write_text("not a folder")
    (tmp_path / "notes").mkdir()
    assert load(tmp_path) == (1, [])


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_place_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot write a checkpoint") as caught:
        save(tmp_path / place, 1)
    assert str(tmp_path / place) in str(caught.value)


def test_a_failed_write_leaves_the_old_one_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save(tmp_path, 2)
    assert load(tmp_path) == (1, [])


def test_folders_of_different_nodes_never_meet(tmp_path: Path) -> None:
    # A federation may have a child that is called like a checkpoint.
    above, below = (checkpoint.folder(tmp_path, path) for path in ("world/europe", "world/europe/0001-000001-ab"))
    save(above, 1)
    save(below, 2)
    assert load(above) == (1, [])
    assert load(below) == (2, [])


def test_every_start_of_a_node_has_its_own_incarnation(tmp_path: Path) -> None:
    assert checkpoint.newest_incarnation(tmp_path) == 0
    assert [checkpoint.claim(tmp_path) for _ in range(3)] == [1, 2, 3]
    assert checkpoint.newest_incarnation(tmp_path) == 3


def test_an_older_life_cannot_write(tmp_path: Path) -> None:
    first = checkpoint.claim(tmp_path)
    save(tmp_path, 1, incarnation=first)
    second = checkpoint.claim(tmp_path)
    with pytest.raises(SupersededError, match="incarnation 2 is there; 1 must end"):
        save(tmp_path, 2, incarnation=first)
    assert load(tmp_path) == (1, [])
    save(tmp_path, 3, incarnation=second)
    assert load(tmp_path) == (3, [])


def test_what_an_older_life_wrote_while_the_newer_began_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = checkpoint.claim(tmp_path)
    save(tmp_path, 1, incarnation=first)
    rename = Path.rename

    def once(self: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        second = checkpoint.claim(tmp_path)
        save(tmp_path, 10, incarnation=second)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", once)
    with pytest.raises(SupersededError):
        save(tmp_path, 2, incarnation=first)
    assert load(tmp_path) == (10, [])
