"""Batches and windows, of one dataset and of a pool."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.texts import changed, make, text_config, train_bpe

from worldlm_ray.config.schema import DataConfig
from worldlm_ray.data import Dataset, load_tokenizer
from worldlm_ray.errors import ConfigError, DataError


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    return text_config(tmp_path)


def with_tokens(train: int, heldout: int, validation: int = 0) -> Dataset:
    return Dataset(
        train=np.arange(train, dtype=np.uint16),
        validation=np.arange(validation, dtype=np.uint16),
        heldout=np.arange(heldout, dtype=np.uint16),
        train_bytes=train,
        validation_bytes=2 * validation,
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


def test_validation_windows_are_spread_as_heldout_windows() -> None:
    data = with_tokens(100, 500, 1001)
    few = np.concatenate([inputs for inputs, _ in data.validation_windows(59, context=10, batch_size=2)])
    assert few[:, 0].tolist() == [0, 200, 400, 600, 800]
    assert data.validation_bytes_per_token() == 2.0
    with pytest.raises(DataError, match="validation: 0 tokens"):
        next(with_tokens(100, 100).validation_windows(1, context=10, batch_size=1))


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
    assert sum(len(inputs) for inputs, _ in pool.validation_windows(320, context=16, batch_size=4)) == 20
    assert pool.validation_bytes == sum(data.validation_bytes for data in alone)
    assert pool.validation_bytes_per_token() == 1.0
    with pytest.raises(ConfigError, match=r"world\.data\.pool: set together with files"):
        make(changed(config, pool=members))
    with pytest.raises(ConfigError, match=r"world\.data\.pool\[0\]\.filez: unknown key"):
        make(changed(config, files=[], pool=[{"filez": []}]))
