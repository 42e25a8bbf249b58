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
from worldlm_ray.data.split import BLOCK_CHARS, Allowance, Block, Parting, Placed, blocks
from worldlm_ray.errors import ConfigError


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    return text_config(tmp_path)


def parting(count: int, *, heldout: float, validation: float = 0.0) -> list[Placed]:
    """Where each of so many blocks goes."""
    made = Parting(heldout=heldout, validation=validation)
    placed = [placed for index in range(count) for placed in made.add(Block(str(index)))] + made.rest()
    assert sorted(each.index for each in placed) == list(range(count))
    assert all(each.block.text == str(each.index) for each in placed)
    for part in ("train", "validation", "heldout"):
        order = [each.index for each in placed if each.part == part]
        assert order == sorted(order)
    return sorted(placed, key=lambda each: each.index)


def test_every_document_is_in_one_part(config: DataConfig) -> None:
    data = make(config)
    decode = data.tokenizer.decode
    train, validation, heldout = decode(data.train), decode(data.validation), decode(data.heldout)
    sides = [[document in part for part in (train, validation, heldout)] for document in numbered(400)]
    assert all(sum(side) == 1 for side in sides)
    assert min(sum(side[part] for side in sides) for part in (1, 2)) >= 5
    sizes = (data.train_bytes, data.validation_bytes, data.heldout_bytes)
    assert sizes == tuple(len(part.encode()) for part in (train, validation, heldout))
    assert data.heldout_bytes_per_token() == data.validation_bytes_per_token() == 1.0


def test_the_heldout_part_does_not_depend_on_the_validation_part(config: DataConfig) -> None:
    none, some, much = (make(changed(config, validation_fraction=share)) for share in (0.0, 0.05, 0.4))
    assert len(none.validation) == none.validation_bytes == 0
    for other in (some, much):
        assert np.array_equal(none.heldout, other.heldout)
        assert none.fingerprint != other.fingerprint
    total = none.train_bytes + none.heldout_bytes
    assert much.validation_bytes == pytest.approx(0.4 * total, abs=2 * BLOCK_CHARS)
    with pytest.raises(ConfigError, match=r"world\.data\.validation_fraction: got 0\.95 beside heldout_fraction 0\.05"):
        make(changed(config, validation_fraction=0.95))


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
    marks = [placed.part == "heldout" for placed in parting(1000, heldout=0.05)]
    counts = [sum(marks[start : start + 20]) for start in range(0, 1000, 20)]
    assert counts == [1] * 50
    assert len({marks[start : start + 20].index(True) for start in range(0, 1000, 20)}) > 5


@pytest.mark.parametrize("fraction", [0.001, 0.03, 0.3, 0.5, 0.9])
def test_the_share_is_kept_and_one_block_is_the_least(fraction: float) -> None:
    for count in (1, 2, 7, 3000):
        held = sum(placed.part == "heldout" for placed in parting(count, heldout=fraction))
        assert held >= 1
        assert abs(held - fraction * count) <= 1


def test_validation_blocks_are_spread_over_what_is_not_held_out() -> None:
    placed = parting(1000, heldout=0.05, validation=0.05)
    counts = [sum(each.part == "validation" for each in placed[start : start + 20]) for start in range(0, 1000, 20)]
    assert sum(counts) == 50
    assert max(counts) <= 2
    assert [each.part == "heldout" for each in placed] == [
        each.part == "heldout" for each in parting(1000, heldout=0.05)
    ]


@pytest.mark.parametrize(("count", "found"), [(1, "h"), (2, "hv"), (3, "htv"), (4, "httv"), (20, "h" + 18 * "t" + "v")])
def test_with_little_text_each_part_in_turn_gets_a_block(count: int, found: str) -> None:
    placed = parting(count, heldout=0.05, validation=0.05)
    assert "".join(sorted(each.part[0] for each in placed)) == found


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
    decode = data.tokenizer.decode
    train, others = decode(data.train), decode(data.validation) + "\n" + decode(data.heldout)
    found = (train + "\n" + others).split("\n")
    assert sorted(line for line in found if line) == sorted(lines)
    # Blank lines stand only where a block of another part was taken out, not between all blocks.
    assert train.count("\n\n") <= len(others) / BLOCK_CHARS + 1


def test_shards_are_alike_and_share_nothing(config: DataConfig, tmp_path: Path) -> None:
    lines = numbered(4_000)
    (tmp_path / "a.txt").write_text("\n\n".join(lines))
    config = changed(config, validation_fraction=0.1)
    whole = make(config)
    shards = [make(changed(config, shard=f"{index}/3")) for index in (1, 2, 3)]
    decode = whole.tokenizer.decode
    found = [
        {
            line
            for part in (s.train, s.validation, s.heldout)
            for line in decode(np.asarray(part)).split("\n\n")
            if line in lines
        }
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


@pytest.mark.parametrize("size", [1_000, 12_000, 50_000])
def test_so_many_bytes_of_the_training_text_leave_the_other_parts_whole(
    config: DataConfig, tmp_path: Path, size: int
) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(numbered(8_000)))
    whole, some = make(config), make(changed(config, train_bytes=size))
    assert np.array_equal(whole.heldout, some.heldout)
    assert np.array_equal(whole.validation, some.validation)
    assert size - 16 <= some.train_bytes <= size
    all_text, text = whole.tokenizer.decode(whole.train), some.tokenizer.decode(some.train)
    places = [all_text.index(document) for document in text.split("\n\n")[:-1]]
    assert places == sorted(places)
    assert places[-1] > 0.6 * len(all_text) or size < 4 * BLOCK_CHARS, "spread over the whole training part"


def test_the_bytes_that_are_used_are_spread_evenly_and_the_last_block_is_cut() -> None:
    allowance = Allowance(25, 100)
    found = [allowance.kept(Placed(Block("x" * 10, ends=(3, 8)), index, "train")) for index in range(10)]
    # After 1, 4 and 8 blocks so many bytes may be there: 2.5, 10 and 20. A gap of two bytes stands before each but one.
    assert {index: len(block.text) for index, block in enumerate(found) if block} == {0: 10, 4: 10, 8: 1}
    assert [block.ends for block in found if block] == [(3, 8), (3, 8), ()]


def test_train_bytes_are_instead_of_a_fraction(config: DataConfig) -> None:
    with pytest.raises(ConfigError, match=r"world\.data\.train_bytes: set together with train_fraction"):
        make(changed(config, train_fraction=0.5, train_bytes=100))
    with pytest.raises(ConfigError, match=r"world\.data\.train_bytes: got 0"):
        make(changed(config, train_bytes=0))
    everything = make(changed(config, train_bytes=10**9))
    assert everything.train_bytes == make(config).train_bytes
