"""What a tokenizer loses of a text: said, or refused where it is most of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from support import worlds
from tokenizers import decoders, models, normalizers, pre_tokenizers

from worldlm_ray.config.schema import DataConfig
from worldlm_ray.data import load_tokenizer, prepare
from worldlm_ray.data.fidelity import lost
from worldlm_ray.errors import DataError
from worldlm_ray.plan.plan import Plan
from worldlm_ray.simulation.simulator import simulate

TEXT = "The river speaks of the mountain, and the law of the Caf\u00e9 speaks of 17 rivers.\n\n" * 400


def saved(made: Any, path: Path) -> Path:
    made.save(str(path))
    return path


def two_letters(path: Path) -> Path:
    """It knows a and b, and drops every other character without a word."""
    return saved(tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[])), path)


def without(path: Path, letter: str) -> Path:
    made = tokenizers.Tokenizer.from_file(str(worlds.tokenizer(path)))
    made.normalizer = normalizers.Replace(letter, "")
    return saved(made, path)


def uncased(path: Path) -> Path:
    """As the tokenizers of uncased BERT models: lower case, no accents, pieces of words."""
    letters = sorted(set("abcdefghijklmnopqrstuvwxyz0123456789,."))
    vocab = {token: at for at, token in enumerate(["[UNK]", *letters, *(f"##{letter}" for letter in letters)])}
    made = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    return saved(made, path)


def words(path: Path) -> Path:
    """Two words; all others become the unknown token."""
    vocab = {"[UNK]": 0, "the": 1, "of": 2}
    made = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return saved(made, path)


def prepared(folder: Path, tokenizer: Path, **settings: Any) -> tuple[str, ...]:
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    named = {"files": [str(folder / "text.txt")], "tokenizer": str(tokenizer), "cache_dir": str(folder / "cache")}
    return prepare(DataConfig(**named | settings), context=8, key="world.children[0].data").left_out


@pytest.mark.parametrize("make", [two_letters, words])
def test_a_tokenizer_that_drops_most_of_a_text_is_refused(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    file = make(tmp_path / "tok.json")
    with pytest.raises(DataError, match=r"^world\.children\[0\]\.data\.tokenizer: .*tok\.json: .*loses \d\d% .*; give"):
        prepared(tmp_path, file)


def test_a_tokenizer_that_drops_a_letter_is_said_from_the_cache_too(tmp_path: Path) -> None:
    file = without(tmp_path / "tok.json", "e")
    for settings in ({}, {}, {"shard": "2/2"}):
        [line] = prepared(tmp_path, file, **settings)
        assert line.startswith("the tokenizer loses 12% of the characters in a sample of ")


def test_a_run_names_the_client_whose_text_is_lost(tiny: Callable[..., Plan], tmp_path: Path) -> None:
    file = without(tmp_path / "tok.json", "e")
    children = [worlds.client("a", tmp_path, 1), worlds.client("b", tmp_path, 2)]
    summary = simulate(tiny(children, data={"tokenizer": str(file)}, budget={"rounds": 1})).summary
    said = [(each["node"], each["text"]) for each in summary["warnings"]]
    assert [node for node, text in said if "the tokenizer loses" in text] == ["world/a", "world/b"]


def test_case_and_accents_are_a_warning_at_most(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(uncased(tmp_path / "tok.json")))
    assert lost([TEXT], tokenizer) == pytest.approx(1 / 66, abs=0.003), "the accent alone"
    assert lost([TEXT.replace("\u00e9", "e")], tokenizer) == 0.0


def test_a_byte_level_tokenizer_loses_nothing_even_without_a_decoder(tmp_path: Path) -> None:
    file = worlds.tokenizer(tmp_path / "tok.json")
    assert lost([TEXT, "\u6c34 \U0001f30a"], load_tokenizer(str(file))) == 0.0
    made = tokenizers.Tokenizer.from_file(str(file))
    made.decoder = None
    assert lost(["\u6c34 \u00e9"], load_tokenizer(str(saved(made, tmp_path / "bare.json")))) == 0.0
    assert prepared(tmp_path, file) == ()


def test_an_id_that_no_vocabulary_has_is_refused(tmp_path: Path) -> None:
    made = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 2**31}, merges=[]))
    with pytest.raises(DataError, match=r"has the id 2,147,483,648, ids are below 16,777,216"):
        load_tokenizer(str(saved(made, tmp_path / "tok.json")))
