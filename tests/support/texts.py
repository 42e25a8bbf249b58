"""Text of which the tests of worldlm_ray/data make datasets."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from worldlm_ray.config.schema import DataConfig
from worldlm_ray.data import Dataset, prepare

KEY = "world.data"


def numbered(count: int) -> list[str]:
    """Documents that can be told apart, of different lengths."""
    rng = random.Random(0)
    return [f"<{index}> " + "lorem ipsum " * rng.randrange(5, 60) + f"</{index}>" for index in range(count)]


def text_config(folder: Path) -> DataConfig:
    """A section with a file of 400 documents, and a cache beside it."""
    (folder / "a.txt").write_text("\n\n".join(numbered(400)))
    return DataConfig(files=[str(folder / "a.txt")], cache_dir=str(folder / "cache"))


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
