"""A data section -> its `Dataset`: tokenized and split now, or mapped from the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from worldlm_ray.config.schema import DataConfig
from worldlm_ray.data import cache
from worldlm_ray.data.conversations import prepare_conversations
from worldlm_ray.data.dataset import Dataset, pool_of, require_window
from worldlm_ray.data.fidelity import check_fidelity
from worldlm_ray.data.text import check_shard, describe, find_sources, members_of
from worldlm_ray.data.tokenizer import load_tokenizer
from worldlm_ray.errors import ConfigError
from worldlm_ray.storage import open_files
from worldlm_ray.storage.filesystem import expanded

SHARDS_AT_ONCE = 64
"""Shards that are written in one pass over a text. Each has three files open: fewer where few may be."""


def prepare(config: DataConfig, *, context: int, key: str, order: str = "") -> Dataset:
    """Tokenize and split a client's text, or map what an earlier call cached.

    Args:
        config: the data section.
        context: tokens per sequence; every part must hold at least one window.
        key: dotted key of the section, such as `world.children[0].data`, for messages.
        order: names the random order of the text unless the section does.

    Raises:
        ConfigError: a value of the section cannot be used.
        DataError: the text is damaged or too short, the tokenizer loses most of it, or the cache cannot be written.
    """
    if not 0.0 < config.heldout_fraction < 1.0:
        got = f"got {config.heldout_fraction}"
        raise ConfigError(f"{key}.heldout_fraction", got, "give a number between 0 and 1")
    found = find_sources(config, key)
    if config.pool:
        members = [
            prepare(member, context=context, key=f"{key}.pool[{index}]", order=f"{config.order or order}/{index}")
            for index, member in enumerate(members_of(config, key))
        ]
        return pool_of(members)
    if config.format == "conversations":
        return prepare_conversations(config, found, context=context, key=key, order=order)
    tokenizer = load_tokenizer(config.tokenizer)
    source = cache.source_of(config, found.paths)
    whole = cache.fingerprint_of(replace(config, shard=None), source, tokenizer)
    lossy = check_fidelity(config, tokenizer, key=key, known_as=whole)
    fingerprint = cache.fingerprint_of(config, source, tokenizer)
    folder = expanded(config.cache_dir) / fingerprint
    parts = cache.cached(folder) or cache.build({folder: config}, tokenizer, key=key)[folder]
    cures = {"train": "give more text", "heldout": f"give more text or raise {key}.heldout_fraction"}
    if config.validation_fraction:
        cures["train"] = f"give more text, or set {key}.validation_fraction to 0"
        cures["validation"] = f"give more text, raise {key}.validation_fraction or set it to 0"
    for part, cure in cures.items():
        text = describe(config) + (f", shard {config.shard}" if config.shard is not None else "")
        require_window(parts[part].tokens, f"{part} part of {key} ({text})", context, cure=cure)
    return Dataset(
        train=cache.mapped(folder / "train.bin", tokenizer.dtype),
        validation=cache.mapped(folder / "validation.bin", tokenizer.dtype),
        heldout=cache.mapped(folder / "heldout.bin", tokenizer.dtype),
        train_bytes=parts["train"].bytes,
        validation_bytes=parts["validation"].bytes,
        heldout_bytes=parts["heldout"].bytes,
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer,
        fingerprint=fingerprint,
        order=config.order or order,
        left_out=(*found.left_out, *lossy),
    )


def prepare_shards(configs: Sequence[DataConfig], *, context: int, key: str) -> None:
    """Fill the cache for many shards of one text. The text is read once per `SHARDS_AT_ONCE` missing shards.

    `prepare` then finds each of them. Sections without `shard` and conversations are left to `prepare`.

    Args:
        configs: data sections that differ in `shard` alone.
        context: tokens per sequence.
        key: dotted key of the section, for messages.

    Raises:
        ConfigError: a value of the section cannot be used.
        DataError: the text is damaged, or the cache cannot be written.
    """
    texts = [config for config in configs if config.format == "text" and not config.pool]
    shared = [config for config in texts if config.shard is not None]
    if len(shared) < 2:
        return
    if len({repr(replace(config, shard=None)) for config in shared}) > 1:
        raise ValueError("the sections are not parts of one text")
    found, tokenizer = find_sources(shared[0], key), load_tokenizer(shared[0].tokenizer)
    source = cache.source_of(shared[0], found.paths)
    missing = dict[str, DataConfig]()
    for config in shared:
        check_shard(config, key)
        folder = expanded(config.cache_dir) / cache.fingerprint_of(config, source, tokenizer)
        if not (folder / "meta.json").is_file():
            missing[str(folder)] = config
    folders = list(missing)
    number = open_files.at_once(SHARDS_AT_ONCE, each=3)
    for first in range(0, len(folders), number):
        some = {Path(folder): missing[folder] for folder in folders[first : first + number]}
        cache.build(some, tokenizer, key=key)
