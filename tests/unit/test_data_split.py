"""Documents become blocks; blocks are held out, and dealt to shards."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.texts import changed, make, numbered, text_config

from worldlm_ray.config.schema import DataConfig
from worldlm_ray.data import split as split_module
from worldlm_ray.data.split import BLOCK_CHARS, Block, blocks, split
from worldlm_ray.errors import ConfigError


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    return text_config(tmp_path)


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
    monkeypatch.setattr(split_module, "BLOCK_CHARS", 7)
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
    assert list(split_module._pieces(document)) == expected


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
