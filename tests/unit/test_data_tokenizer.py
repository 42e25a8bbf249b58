"""Tokenizers: bytes, and tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.texts import train_bpe

from worldlm_ray.data import load_tokenizer
from worldlm_ray.errors import DataError


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
