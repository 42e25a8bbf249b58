"""The cache of tokens."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.texts import KEY, changed, make, numbered, text_config, train_bpe

from worldlm_ray.config.schema import DataConfig
from worldlm_ray.data import cache, preparation, prepare, prepare_shards
from worldlm_ray.data.split import BLOCK_CHARS
from worldlm_ray.errors import ConfigError, DataError


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    return text_config(tmp_path)


def test_the_second_call_maps_the_cache(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make(config)
    monkeypatch.setattr("worldlm_ray.data.cache.read_documents", lambda *_: pytest.fail("read again"))
    second = make(config)
    assert not second.train.flags.owndata
    assert not second.train.flags.writeable
    assert not second.train.flags.writeable
    assert np.array_equal(first.train, second.train)
    assert first.fingerprint == second.fingerprint


def test_the_key_is_the_content_and_what_is_done_to_it(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes((tmp_path / "a.txt").read_bytes())
    first = make(config).fingerprint
    assert make(changed(config, files=[str(tmp_path / "b.txt")])).fingerprint == first
    (tmp_path / "b.txt").write_text("\n\n".join(numbered(401)))
    bpe = str(train_bpe(tmp_path / "t.json"))
    others = [
        changed(config, files=[str(tmp_path / "b.txt")]),
        changed(config, heldout_fraction=0.1),
        changed(config, validation_fraction=0.1),
        changed(config, train_bytes=9_000),
        changed(config, max_bytes=90_000),
        changed(config, tokenizer=bpe),
        changed(config, corpus="python_reference", files=[]),
    ]
    assert len({first, *(make(other).fingerprint for other in others)}) == 8


@pytest.mark.parametrize("damage", ["flip", "cut", "absent", "meta"])
def test_a_damaged_cache_is_rebuilt(config: DataConfig, damage: str) -> None:
    data = make(config)
    expected = data.train.tolist()
    folder = Path(config.cache_dir) / data.fingerprint
    shard = folder / "train.bin"
    raw = shard.read_bytes()
    if damage == "absent":
        shard.unlink()
    elif damage == "meta":
        (folder / "meta.json").write_text('{"train": {"tokens": 3}}')
    else:
        shard.unlink()
        shard.write_bytes(raw[:-2] if damage == "cut" else raw[:100] + b"\x7f" + raw[101:])
    assert make(config).train.tolist() == expected
    assert shard.read_bytes() == raw
    assert sorted(path.name for path in folder.iterdir()) == ["heldout.bin", "meta.json", "train.bin", "validation.bin"]


def _prepare_in_child(config: DataConfig, start: Any, results: Any) -> None:
    start.wait()
    results.put(make(config).train[:1000].tolist())


def test_processes_may_prepare_the_same_text_at_once(config: DataConfig) -> None:
    spawn = multiprocessing.get_context("spawn")
    start, results = spawn.Barrier(3), spawn.Queue()
    children = [spawn.Process(target=_prepare_in_child, args=(config, start, results)) for _ in range(3)]
    for child in children:
        child.start()
    got = [results.get(timeout=60) for _ in children]
    for child in children:
        child.join(timeout=60)
        assert child.exitcode == 0
        child.close()
    results.close()
    results.join_thread()
    assert got == [make(config).train[:1000].tolist()] * 3


def test_a_failure_leaves_no_files(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{')
    with pytest.raises(DataError, match=r"bad\.jsonl:2"):
        make(changed(config, files=[str(tmp_path / "bad.jsonl")]))
    assert [path for path in Path(config.cache_dir).rglob("*") if path.is_file()] == []


def test_a_cache_that_cannot_be_written_is_named(config: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"{KEY}\.cache_dir: cannot write"):
        make(changed(config, cache_dir=str(tmp_path / "a.txt")))


def test_too_little_text_says_how_much(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Just a little text.")
    with pytest.raises(DataError, match=r"train part of world\.data .*: 0 tokens, but a context of 32 .* 34; give"):
        make(config)
    (tmp_path / "a.txt").write_text("x" * 2 * BLOCK_CHARS)
    with pytest.raises(DataError, match=r"train part .*: 0 tokens.*set world\.data\.validation_fraction to 0"):
        make(config)
    assert make(changed(config, validation_fraction=0.0)).train_bytes == BLOCK_CHARS
    (tmp_path / "a.txt").write_text("x" * 20 * BLOCK_CHARS)
    with pytest.raises(DataError, match=rf"validation part .*: {BLOCK_CHARS} tokens.*raise world.data.validation_frac"):
        make(changed(config, heldout_fraction=0.1), context=BLOCK_CHARS)
    with pytest.raises(DataError, match=rf"heldout part .*: {BLOCK_CHARS} tokens.*heldout_fraction"):
        make(config, context=BLOCK_CHARS)
    assert make(config, context=BLOCK_CHARS - 2).train_bytes > BLOCK_CHARS
    with pytest.raises(ConfigError, match=r"world\.data\.heldout_fraction"):
        make(changed(config, heldout_fraction=1.0))


# ---- many parts of one text ------------------------------------------------------------------------------------


def test_parts_that_are_cut_together_are_those_that_are_cut_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"document {n} " + "word " * (n % 900) for n in range(600)))
    reads = []
    read = cache.read_documents

    def counted(config: DataConfig, key: str) -> Any:
        reads.append(config.shard)
        return read(config, key)

    monkeypatch.setattr(cache, "read_documents", counted)
    monkeypatch.setattr(preparation, "SHARDS_AT_ONCE", 4)
    found = {}
    for where in ("alone", "together"):
        configs = [
            DataConfig(files=[str(text)], shard=f"{n}/7", train_fraction=0.7, cache_dir=str(tmp_path / where))
            for n in range(1, 7)
        ]
        if where == "together":
            prepare_shards(configs, context=16, key="data")
            assert len(reads) == 6 + 2  # six alone, six in two passes
            prepare_shards(configs, context=16, key="data")
        found[where] = [prepare(config, context=16, key="data") for config in configs]
    assert len(reads) == 6 + 2
    for alone, together in zip(found["alone"], found["together"], strict=True):
        assert alone.fingerprint == together.fingerprint
        np.testing.assert_array_equal(alone.train, together.train)
        np.testing.assert_array_equal(alone.validation, together.validation)
        np.testing.assert_array_equal(alone.heldout, together.heldout)
        assert (alone.train_bytes, alone.heldout_bytes) == (together.train_bytes, together.heldout_bytes)


def test_parts_with_a_number_of_bytes_are_the_same_together_and_alone(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"document {n} " + "word " * (n % 900) for n in range(600)))
    found = {}
    for where in ("alone", "together"):
        configs = [
            DataConfig(files=[str(text)], shard=f"{n}/4", train_bytes=20_000, cache_dir=str(tmp_path / where))
            for n in range(1, 5)
        ]
        if where == "together":
            prepare_shards(configs, context=16, key="data")
        found[where] = [prepare(config, context=16, key="data") for config in configs]
    for alone, together in zip(found["alone"], found["together"], strict=True):
        np.testing.assert_array_equal(alone.train, together.train)
        assert 19_900 <= alone.train_bytes <= 20_000


def test_a_text_that_changes_is_another_text(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    config = DataConfig(files=[str(text)], cache_dir=str(tmp_path / "cache"))
    text.write_text("one " * 4000)
    os.utime(text, (1e9, 1e9))
    first = prepare(config, context=16, key="data")
    assert prepare(config, context=16, key="data").fingerprint == first.fingerprint
    text.write_text("two " * 4000)
    assert prepare(config, context=16, key="data").fingerprint != first.fingerprint
