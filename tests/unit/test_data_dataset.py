"""Tokens, the split, the cache and the batches."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from worldlm_ray.config.schema import DataConfig
from worldlm_ray.data import Dataset, dataset, load_tokenizer, prepare
from worldlm_ray.data.dataset import BLOCK_CHARS, Block, blocks, split
from worldlm_ray.errors import ConfigError, DataError

KEY = "world.data"


def numbered(count: int) -> list[str]:
    """Documents that can be told apart, of different lengths."""
    rng = random.Random(0)
    return [f"<{index}> " + "lorem ipsum " * rng.randrange(5, 60) + f"</{index}>" for index in range(count)]


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    (tmp_path / "a.txt").write_text("\n\n".join(numbered(400)))
    return DataConfig(files=[str(tmp_path / "a.txt")], cache_dir=str(tmp_path / "cache"))


def changed(config: DataConfig, **settings: Any) -> DataConfig:
    return DataConfig(**(vars(config) | settings))


def make(config: DataConfig, *, context: int = 32) -> Dataset:
    return prepare(config, context=context, key=KEY)


def train_bpe(path: Path, *, vocab_size: int = 300) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(numbered(50), trainer)
    tokenizer.enable_truncation(4)  # many published files carry one: it must not cut text
    tokenizer.save(str(path))
    return path


# ------------------------------------------------------------------------------------------- tokenizers


def test_bytes_round_trip_and_replace_what_is_invalid() -> None:
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode("aä")
    assert ids.tolist() == [97, 0xC3, 0xA4]
    assert ids.dtype == np.uint16
    assert tokenizer.decode(ids) == "aä"
    assert tokenizer.decode(ids[:2]) == "a\ufffd"
    assert tokenizer.token_bytes.tolist() == [1] * tokenizer.vocab_size


def test_tokenizer_json_counts_the_bytes_of_its_tokens(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(train_bpe(tmp_path / "t.json")))
    text = "lorem ipsum <3> ä 猫" * 5 + "<|end|>"
    ids = tokenizer.encode(text)
    assert len(ids) > 4
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert ids.max() < tokenizer.vocab_size == 300 == len(tokenizer.token_bytes)
    other = load_tokenizer(str(train_bpe(tmp_path / "u.json", vocab_size=280)))
    assert other.fingerprint != tokenizer.fingerprint


def test_large_vocabularies_get_wider_tokens(tmp_path: Path) -> None:
    vocab = {"a": 0, "b": 70_000}
    state = {"version": "1.0", "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "a"}}
    (tmp_path / "t.json").write_text(json.dumps(state | {"added_tokens": []}))
    tokenizer = load_tokenizer(str(tmp_path / "t.json"))
    assert (tokenizer.vocab_size, tokenizer.dtype) == (70_001, np.dtype(np.uint32))
    assert tokenizer.encode("b").tolist() == [70_000]


def test_a_broken_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text('{"model": {}}')
    for name in ("t.json", "absent.json"):
        with pytest.raises(DataError, match=rf"tokenizer .*{name}.*give `bytes`"):
            load_tokenizer(str(tmp_path / name))


# -------------------------------------------------------------------------------------------- the split


def test_heldout_documents_are_never_in_train(config: DataConfig) -> None:
    data = make(config)
    train, heldout = data.tokenizer.decode(data.train), data.tokenizer.decode(data.heldout)
    documents = numbered(400)
    sides = [(document in train, document in heldout) for document in documents]
    assert all(in_train != in_heldout for in_train, in_heldout in sides)
    assert sum(in_heldout for _, in_heldout in sides) >= 5
    assert (data.train_bytes, data.heldout_bytes) == (len(train.encode()), len(heldout.encode()))
    assert data.heldout_bytes_per_token() == 1.0


class Counted(str):
    """A text that counts the characters that are copied out of it."""

    copied = 0

    def splitlines(self, keepends: bool = False) -> list[str]:
        return [Counted(line) for line in super().splitlines(keepends)]

    def __getitem__(self, key: Any) -> str:
        part = super().__getitem__(key)
        Counted.copied += len(part)
        return part


def test_a_line_of_any_length_is_copied_once() -> None:
    text = Counted("word " * 100_000)
    assert "".join(block.text for block in blocks([text])) == text
    assert Counted.copied == len(text), "to copy the rest for every block takes time with the square of the length"


@pytest.mark.parametrize("seed", range(20))
def test_documents_are_cut_at_the_ends_of_lines(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(dataset, "BLOCK_CHARS", 7)
    rng = random.Random(seed)
    document = "".join(rng.choice("ab\n") * rng.randrange(1, 12) for _ in range(12))
    expected, piece = [], ""
    for line in document.splitlines(keepends=True):
        if piece and len(piece) + len(line) > 7:
            expected.append(piece)
            piece = ""
        piece += line
        while len(piece) > 7:
            expected.append(piece[:7])
            piece = piece[7:]
    expected += [piece] if piece else []
    assert list(dataset._pieces(document)) == expected


def test_heldout_blocks_are_spread_evenly() -> None:
    marks = [held for _, held in split([Block(str(index)) for index in range(1000)], 0.05)]
    counts = [sum(marks[start : start + 20]) for start in range(0, 1000, 20)]
    assert counts == [1] * 50
    assert len({marks[start : start + 20].index(True) for start in range(0, 1000, 20)}) > 5


@pytest.mark.parametrize("fraction", [0.001, 0.03, 0.3, 0.5, 0.9])
def test_the_share_is_kept_and_one_block_is_the_least(fraction: float) -> None:
    for count in (1, 2, 7, 3000):
        held = sum(held for _, held in split([Block("x")] * count, fraction))
        assert held >= 1
        assert abs(held - fraction * count) <= 1


def test_long_documents_are_cut_at_lines_and_put_together_again() -> None:
    poem = "".join(f"line {index} of a long poem\n" for index in range(1000)) + "z" * 2 * BLOCK_CHARS
    parts = list(blocks(["short", poem, "end"]))
    assert max(len(block.text) for block in parts) <= BLOCK_CHARS
    assert [block.text for block in (parts[0], parts[-1])] == ["short", "end"]
    assert "".join(block.text for block in parts[1:-1]) == poem
    assert [block.continues for block in parts[1:-1]] == [False] + [True] * (len(parts) - 3)
    assert all(block.text.endswith("\n") for block in parts[1:5])


def test_a_long_document_is_whole_in_train_but_for_heldout_blocks(config: DataConfig, tmp_path: Path) -> None:
    lines = [f"line {index} of a long poem" for index in range(5000)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    data = make(config)
    train, heldout = data.tokenizer.decode(data.train), data.tokenizer.decode(data.heldout)
    found = (train + "\n" + heldout).split("\n")
    assert sorted(line for line in found if line) == sorted(lines)
    # Blank lines stand only where a held-out block was taken out, not between all blocks.
    assert train.count("\n\n") <= len(heldout) / BLOCK_CHARS + 1


# -------------------------------------------------------------------------------------------- the cache


def test_the_second_call_maps_the_cache(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make(config)
    monkeypatch.setattr("worldlm_ray.data.dataset.read_documents", lambda *_: pytest.fail("read again"))
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
        changed(config, max_bytes=90_000),
        changed(config, tokenizer=bpe),
        changed(config, corpus="python_reference", files=[]),
    ]
    assert len({first, *(make(other).fingerprint for other in others)}) == 6


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
    assert sorted(path.name for path in folder.iterdir()) == ["heldout.bin", "meta.json", "train.bin"]


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
    (tmp_path / "a.txt").write_text("x" * 20 * BLOCK_CHARS)
    with pytest.raises(DataError, match=rf"heldout part .*: {BLOCK_CHARS} tokens.*heldout_fraction"):
        make(config, context=BLOCK_CHARS)
    assert make(config, context=BLOCK_CHARS - 2).train_bytes > BLOCK_CHARS
    with pytest.raises(ConfigError, match=r"world\.data\.heldout_fraction"):
        make(changed(config, heldout_fraction=1.0))


# ------------------------------------------------------------------------------------------- the windows


def with_tokens(train: int, heldout: int) -> Dataset:
    return Dataset(
        train=np.arange(train, dtype=np.uint16),
        heldout=np.arange(heldout, dtype=np.uint16),
        train_bytes=train,
        heldout_bytes=heldout,
        vocab_size=65_536,
        tokenizer=load_tokenizer("bytes"),
        fingerprint="",
    )


def test_batches_are_windows_that_depend_on_the_seed_alone() -> None:
    data = with_tokens(500, 100)
    first = list(data.batches(7, 0, steps=5, batch_size=4, context=16))
    again = list(data.batches(7, 0, steps=5, batch_size=4, context=16))
    other = list(data.batches(8, 0, steps=5, batch_size=4, context=16))
    assert len(first) == 5
    for (inputs, targets), (same, _), (different, _) in zip(first, again, other, strict=True):
        assert inputs.shape == targets.shape == (4, 16)
        assert inputs.dtype == targets.dtype == np.int64
        assert inputs.flags.c_contiguous
        assert targets.flags.c_contiguous
        assert np.array_equal(targets, inputs + 1)
        assert np.array_equal(np.diff(inputs, axis=1), np.ones((4, 15)))
        assert np.array_equal(inputs, same)
        assert not np.array_equal(inputs, different)


def test_batches_reach_the_first_and_the_last_token() -> None:
    batches = list(with_tokens(20, 20).batches(0, 0, steps=50, batch_size=4, context=16))
    assert min(inputs.min() for inputs, _ in batches) == 0
    assert max(targets.max() for _, targets in batches) == 19


def test_heldout_windows_do_not_overlap_and_spread_out() -> None:
    data = with_tokens(100, 1001)
    windows = list(data.heldout_windows(10**9, context=10, batch_size=32))
    targets = np.concatenate([targets for _, targets in windows]).ravel()
    assert targets.tolist() == list(range(1, 1001))
    assert [len(inputs) for inputs, _ in windows] == [32, 32, 32, 4]
    few = np.concatenate([inputs for inputs, _ in data.heldout_windows(59, context=10, batch_size=2)])
    assert few[:, 0].tolist() == [0, 200, 400, 600, 800]
    assert len(list(data.heldout_windows(1, context=10, batch_size=2))) == 1


def test_windows_longer_than_the_text_are_refused() -> None:
    data = with_tokens(100, 100)
    with pytest.raises(DataError, match="training: 100 tokens"):
        next(data.batches(0, 0, steps=1, batch_size=1, context=200))
    with pytest.raises(DataError, match="held-out: 100 tokens"):
        next(data.heldout_windows(1, context=200, batch_size=1))


def test_bytes_per_token_with_a_real_tokenizer(config: DataConfig, tmp_path: Path) -> None:
    data = make(changed(config, tokenizer=str(train_bpe(tmp_path / "t.json"))))
    assert data.heldout_bytes_per_token() > 2.0
    assert data.tokenizer.token_bytes[np.asarray(data.heldout)].sum() == data.heldout_bytes


# ------------------------------------------------------------------------------------ parts and wholes


def test_shards_are_alike_and_share_nothing(config: DataConfig, tmp_path: Path) -> None:
    lines = numbered(4_000)
    (tmp_path / "a.txt").write_text("\n\n".join(lines))
    whole = make(config)
    shards = [make(changed(config, shard=f"{index}/3")) for index in (1, 2, 3)]
    decode = whole.tokenizer.decode
    found = [
        {line for part in (s.train, s.heldout) for line in decode(np.asarray(part)).split("\n\n") if line in lines}
        for s in shards
    ]
    assert sum(map(len, found)) == len(lines)
    assert set.union(*found) == set(lines)
    assert max(s.train_bytes for s in shards) - min(s.train_bytes for s in shards) <= 2 * BLOCK_CHARS
    for bad in ("0/3", "4/3", "x", "1"):
        with pytest.raises(ConfigError, match=r"world\.data\.shard: got .*write 2/4"):
            make(changed(config, shard=bad))


def test_a_fraction_of_the_training_text_leaves_the_heldout_part_whole(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(numbered(8_000)))
    whole, tenth = make(config), make(changed(config, train_fraction=0.1))
    assert np.array_equal(whole.heldout, tenth.heldout)
    assert tenth.train_bytes == pytest.approx(whole.train_bytes / 10, abs=2 * BLOCK_CHARS)
    with pytest.raises(ConfigError, match=r"world\.data\.train_fraction: got 7\.0; give a number above 0"):
        make(changed(config, train_fraction=7.0))


def test_a_pool_draws_from_every_member_what_it_would_draw_alone(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("\n\n".join(f"other {n}" for n in range(4_000)))
    members = [{"files": [str(tmp_path / name)], "order": name} for name in ("a.txt", "b.txt")]
    pool = make(changed(config, files=[], pool=members))
    alone = [make(changed(config, **member)) for member in members]
    assert pool.parts == 2
    assert pool.heldout_bytes == sum(data.heldout_bytes for data in alone)
    [(inputs, _)] = pool.batches(5, 2, steps=1, batch_size=3, context=16)
    drawn = [next(data.batches(5, 2, steps=1, batch_size=3, context=16))[0] for data in alone]
    assert np.array_equal(inputs, np.concatenate(drawn))
    windows = sum(len(inputs) for inputs, _ in pool.heldout_windows(320, context=16, batch_size=4))
    assert windows == 20
    with pytest.raises(ConfigError, match=r"world\.data\.pool: set together with files"):
        make(changed(config, pool=members))
    with pytest.raises(ConfigError, match=r"world\.data\.pool\[0\]\.filez: unknown key"):
        make(changed(config, files=[], pool=[{"filez": []}]))


# ---- many parts of one text ------------------------------------------------------------------------------------


def test_parts_that_are_cut_together_are_those_that_are_cut_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"document {n} " + "word " * (n % 900) for n in range(600)))
    reads = []
    read = dataset.read_documents

    def counted(config: DataConfig, key: str) -> Any:
        reads.append(config.shard)
        return read(config, key)

    monkeypatch.setattr(dataset, "read_documents", counted)
    monkeypatch.setattr(dataset, "SHARDS_AT_ONCE", 4)
    found = {}
    for where in ("alone", "together"):
        configs = [
            DataConfig(files=[str(text)], shard=f"{n}/7", train_fraction=0.7, cache_dir=str(tmp_path / where))
            for n in range(1, 7)
        ]
        if where == "together":
            dataset.prepare_shards(configs, context=16, key="data")
            assert len(reads) == 6 + 2  # six alone, six in two passes
            dataset.prepare_shards(configs, context=16, key="data")
        found[where] = [dataset.prepare(config, context=16, key="data") for config in configs]
    assert len(reads) == 6 + 2
    for alone, together in zip(found["alone"], found["together"], strict=True):
        assert alone.fingerprint == together.fingerprint
        np.testing.assert_array_equal(alone.train, together.train)
        np.testing.assert_array_equal(alone.heldout, together.heldout)
        assert (alone.train_bytes, alone.heldout_bytes) == (together.train_bytes, together.heldout_bytes)


def test_a_text_that_changes_is_another_text(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    config = DataConfig(files=[str(text)], cache_dir=str(tmp_path / "cache"))
    text.write_text("one " * 4000)
    os.utime(text, (1e9, 1e9))
    first = dataset.prepare(config, context=16, key="data")
    assert dataset.prepare(config, context=16, key="data").fingerprint == first.fingerprint
    text.write_text("two " * 4000)
    assert dataset.prepare(config, context=16, key="data").fingerprint != first.fingerprint
