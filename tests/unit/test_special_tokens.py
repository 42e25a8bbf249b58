"""Special tokens of a tokenizer.json: no text writes one, and one of them ends a text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import worlds

from worldlm_ray.config.schema import DataConfig
from worldlm_ray.data import load_tokenizer, prepare
from worldlm_ray.data.special_tokens import byte_characters
from worldlm_ray.errors import DataError


def word_level(path: Path, *, words: list[str], added: list[dict[str, Any]] | None = None, unknown: str = "?") -> Path:
    """A tokenizer that holds whole words; special tokens may be among them."""
    import tokenizers
    from tokenizers import models, pre_tokenizers

    made = tokenizers.Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token=unknown))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    state = json.loads(made.to_str())
    state["added_tokens"] = [worlds.added_token(words.index(token["content"]), **token) for token in added or []]
    path.write_text(json.dumps(state), encoding="utf-8")
    return path


def unigram(path: Path) -> Path:
    """As converted from SentencePiece: control tokens are pieces of the vocabulary, too."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    pieces += [(piece, -3.0) for piece in ("\u2581", "a", "b", "<", ">", "/", "s", "\u2581ab")]
    made = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.save(str(path))
    return path


def test_text_that_spells_a_special_token_is_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(worlds.tokenizer(tmp_path / "tok.json")))
    text = "The marker <|endoftext|> ends a document. <|endoftext|>"
    ids = tokenizer.encode(text)
    assert tokenizer.end == 0
    assert 0 not in ids
    assert tokenizer.decode(ids) == text


def test_nor_does_a_vocabulary_that_holds_its_name_as_a_piece(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(unigram(tmp_path / "tok.json")))
    ids = tokenizer.encode("ab</s>ab<s>")
    assert tokenizer.end == 2
    assert not {1, 2} & set(ids.tolist())
    assert tokenizer.decode(ids) == "ab</s>ab<s>"
    assert tokenizer.encode("z").tolist() == [3, 0]  # what the vocabulary lacks is unknown, as before


def test_nor_a_token_that_only_its_settings_call_special(tmp_path: Path) -> None:
    words = ["?", "<end>", "<", "e", "n", "d", ">", "one"]
    plain = [{"content": "<end>", "special": False}]
    file = word_level(tmp_path / "tokenizer.json", words=words, added=plain)
    assert load_tokenizer(str(file)).end is None
    assert load_tokenizer(str(file)).encode("one <end>").tolist() == [7, 1]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<end>"}}))
    tokenizer = load_tokenizer(str(file))
    assert tokenizer.end == 1
    assert tokenizer.encode("one <end>").tolist() == [7, 2, 3, 4, 5, 6]


def test_a_token_that_cannot_be_written_as_text_is_an_error(tmp_path: Path) -> None:
    words = ["<end>", "one", "<s>"]
    added = [{"content": "<end>", "special": True}]
    file = word_level(tmp_path / "tokenizer.json", words=words, added=added, unknown="none")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    with pytest.raises(DataError, match="cannot write '<end>' as text"):
        load_tokenizer(str(file)).encode("one <end>")


@pytest.mark.parametrize(
    ("settings", "map_", "end"),
    [
        ({}, {}, "</s>"),  # by its usual name
        ({"eos_token": "<x>"}, {"eos_token": "<y>"}, "<x>"),
        ({"eos_token": None}, {"eos_token": {"content": "<y>"}}, "<y>"),
        ({"eos_token": "<not there>"}, {}, "</s>"),
    ],
)
def test_the_end_of_a_text_is_what_its_folder_says(
    tmp_path: Path, settings: dict[str, Any], map_: dict[str, Any], end: str
) -> None:
    words = ["?", "</s>", "<x>", "<y>"]
    added = [{"content": word, "special": True} for word in words[1:]]
    file = word_level(tmp_path / "tokenizer.json", words=words, added=added)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(map_))
    assert load_tokenizer(str(file)).end == words.index(end)


def test_files_beside_a_tokenizer_of_another_name_are_not_its_own(tmp_path: Path) -> None:
    file = word_level(tmp_path / "tok.json", words=["?", "<x>"], added=[{"content": "<x>", "special": True}])
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<x>"}')
    assert load_tokenizer(str(file)).end is None


@pytest.mark.parametrize("text", ["{", "[]"])
def test_settings_that_are_none_are_named(tmp_path: Path, text: str) -> None:
    worlds.tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(DataError, match=r"tokenizer_config\.json: is .*download it again, or remove it"):
        load_tokenizer(str(tmp_path))


def test_another_end_is_another_encoding(tmp_path: Path) -> None:
    worlds.tokenizer(tmp_path / "tokenizer.json")
    first = load_tokenizer(str(tmp_path)).fingerprint
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "the"}')
    assert load_tokenizer(str(tmp_path)).fingerprint != first


def test_the_table_of_bytes_is_that_of_byte_level_tokenizers() -> None:
    from tokenizers import pre_tokenizers

    assert sorted(byte_characters()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("a \u00e4\n")
    assert "".join(piece for piece, _ in split) == "".join(byte_characters()[byte] for byte in "a \u00e4\n".encode())


# ------------------------------------------------------------------------------------- between two documents


@pytest.fixture
def prepared(tmp_path: Path) -> Callable[..., Any]:
    def make(name: str, contents: str, **settings: Any) -> Any:
        (tmp_path / name).write_text(contents, encoding="utf-8")
        given: dict[str, Any] = {"tokenizer": str(worlds.tokenizer(tmp_path / "tok.json")), "heldout_fraction": 0.2}
        given |= {"files": [str(tmp_path / name)], "cache_dir": str(tmp_path / "cache")}
        config = DataConfig(**(given | settings))
        return prepare(config, context=8, key="data")

    return make


def records(count: int) -> str:
    return "".join(json.dumps({"text": f"Record {at}, which holds\n\na blank line."}) + "\n" for at in range(count))


def decoded(data: Any, part: Any) -> str:
    return str(data.tokenizer.decode(np.asarray(part)))


def test_documents_are_joined_with_the_end_of_text(prepared: Callable[..., Any]) -> None:
    data = prepared("a.jsonl", records(400))
    for part, length in ((data.train, data.train_bytes), (data.heldout, data.heldout_bytes)):
        found = decoded(data, part).split("<|endoftext|>")
        assert len(found) > 50
        assert all(text.startswith("Record ") and text.endswith("a blank line.") for text in found)
        assert np.count_nonzero(np.asarray(part) == data.tokenizer.end) == len(found) - 1
        # The end stands for a blank line of two bytes, so that losses per byte stay comparable.
        assert length == sum(len(text) for text in found) + 2 * (len(found) - 1)
        assert data.tokenizer.token_bytes[np.asarray(part)].sum() == length


def test_the_paragraphs_of_a_text_file_are_one_document(prepared: Callable[..., Any]) -> None:
    data = prepared("a.txt", "\n\n".join(f"Paragraph {at} of a text." for at in range(1_000)))
    text = decoded(data, data.train)
    assert "of a text.\n\nParagraph" in text
    # What was held out was cut out of the text: there, and only there, is an end.
    gaps = [part.split("Paragraph ") for part in text.split("<|endoftext|>")]
    for before, after in zip(gaps, gaps[1:], strict=False):
        assert int(after[1].split()[0]) > int(before[-1].split()[0]) + 1


def test_documents_of_several_files_are_several(prepared: Callable[..., Any], tmp_path: Path) -> None:
    for at in range(40):
        (tmp_path / f"many-{at:02}.txt").write_text(f"File {at}.\n\n" + 200 * "Its end. ", encoding="utf-8")
    data = prepared(
        "a.txt", "File 40.\n\n" + 200 * "Its end. ", files=[str(tmp_path / "many-*.txt"), str(tmp_path / "a.txt")]
    )
    assert decoded(data, data.heldout).count("<|endoftext|>") + decoded(data, data.train).count("<|endoftext|>") > 30


def test_bytes_and_tokenizers_without_an_end_have_blank_lines(prepared: Callable[..., Any], tmp_path: Path) -> None:
    plain = prepared("a.jsonl", records(400), tokenizer="bytes")
    file = tmp_path / "plain.json"
    state = json.loads(worlds.tokenizer(file).read_text(encoding="utf-8"))
    file.write_text(json.dumps(state | {"added_tokens": []}), encoding="utf-8")
    other = prepared("a.jsonl", records(400), tokenizer=str(file))
    assert decoded(plain, plain.train) == decoded(other, other.train)
    assert "a blank line.\n\nRecord" in decoded(plain, plain.train)


def test_parts_of_a_text_end_where_they_are_cut_out(prepared: Callable[..., Any]) -> None:
    text = "\n\n".join(f"Paragraph {at} of a text." for at in range(4_000))
    data = prepared("a.txt", text, shard="1/2")
    assert decoded(data, data.train).count("<|endoftext|>") > 5
