"""Conversations: which tokens are targets, how rows are packed, and what is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")

import pyarrow
import pyarrow.parquet
from support.chat import CHATML, chat_tokenizer, questions, say, write_records

from worldlm_ray.config.schema import DataConfig
from worldlm_ray.data import Dataset, check_sources, describe, prepare
from worldlm_ray.data.chat_template import ChatTemplate, template_files
from worldlm_ray.data.conversations import Conversations
from worldlm_ray.data.packing import OPEN, Packer
from worldlm_ray.errors import ConfigError, DataError
from worldlm_ray.tensors.targets import IGNORED

SHORT = {"messages": [say("user", "the river"), say("assistant", "of a mountain")]}
TWO_TURNS = {
    "messages": [
        say("system", "be short"),
        say("user", "a river?"),
        say("assistant", " yes"),
        say("user", "a law?"),
        say("assistant", "no\n"),
    ]
}


def section(folder: Path, records: Any, **settings: Any) -> DataConfig:
    file = write_records(folder / "chat.jsonl", records) if not isinstance(records, Path) else records
    return DataConfig(
        format="conversations",
        files=[str(file)],
        tokenizer=str(chat_tokenizer(folder / "tokenizer")),
        cache_dir=str(folder / "cache"),
        **settings,
    )


def make(config: DataConfig, *, context: int = 63) -> Dataset:
    return prepare(config, context=context, key="world.data")


def heldout(data: Dataset) -> tuple[Any, Any]:
    """All held-out rows."""
    batches = list(data.heldout_windows(10**9, context=data.context, batch_size=4))  # type: ignore[attr-defined]
    return np.concatenate([inputs for inputs, _ in batches]), np.concatenate([targets for _, targets in batches])


def answers(data: Dataset) -> list[str]:
    """What the targets of each held-out row say, a piece for each stretch of them."""
    _, targets = heldout(data)
    found = []
    for target_T in targets:
        ends = np.flatnonzero(np.diff(np.concatenate([[False], target_T != IGNORED, [False]]).astype(int)))
        found += [data.tokenizer.decode(target_T[a:b]) for a, b in ends.reshape(-1, 2)]
    return found


def texts(data: Dataset, part: str) -> set[str]:
    """The conversations of a part, as the template writes them."""
    ids = np.asarray(getattr(data, part)) & 0x7FFFFFFF
    return set(data.tokenizer.decode(ids).split("<|im_start|>user\n")[1:])


def test_targets_are_the_answers_and_the_ends_of_their_turns(tmp_path: Path) -> None:
    data = make(section(tmp_path, [TWO_TURNS] * 3, validation_fraction=0.34, heldout_fraction=0.34), context=127)
    assert answers(data) == [" yes<|im_end|>", "no\n<|im_end|>"]
    assert data.heldout_bytes == len(" yes") + len("no\n")
    _, targets = heldout(data)
    assert data.heldout_bytes_per_token() == pytest.approx(7 / np.count_nonzero(targets != IGNORED))


def test_a_row_holds_the_ids_of_the_rendered_text(tmp_path: Path) -> None:
    config = section(tmp_path, [SHORT] * 3, validation_fraction=0.34, heldout_fraction=0.34)
    data = make(config, context=40)
    inputs, targets = heldout(data)
    text = "<|im_start|>user\nthe river<|im_end|>\n<|im_start|>assistant\nof a mountain<|im_end|>\n"
    assert data.tokenizer.decode(inputs[0]).startswith(text)
    assert inputs.shape == targets.shape == (1, 40)
    assert inputs.dtype == targets.dtype == np.int64
    [counted] = np.nonzero(targets[0] != IGNORED)
    assert np.array_equal(targets[0, counted], inputs[0, counted + 1])
    padding = data.tokenizer.decode(inputs[0]).removeprefix(text)
    assert padding == "<|im_end|>" * padding.count("<|im_end|>") != ""


def test_a_prompt_and_its_completion_are_a_conversation(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    pairs = [{"prompt": r["messages"][0]["content"], "completion": r["messages"][1]["content"]} for r in questions(60)]
    ours, theirs = make(section(tmp_path / "a", pairs)), make(section(tmp_path / "b", questions(60)))
    for part in ("train", "validation", "heldout"):
        assert np.array_equal(getattr(ours, part), getattr(theirs, part))


@pytest.mark.parametrize("kind", [".json", ".jsonl.gz", ".parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    records, file = questions(60), tmp_path / f"other{kind}"
    if kind == ".json":
        file.write_text(json.dumps(records, indent=1))
    elif kind == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), file)
    else:
        file.write_bytes(gzip.compress("".join(json.dumps(record) + "\n" for record in records).encode()))
    check_sources(section(tmp_path, file), "world.data")
    assert np.array_equal(make(section(tmp_path, file)).train, make(section(tmp_path, records)).train)


def test_no_conversation_is_in_two_parts_and_none_is_lost(tmp_path: Path) -> None:
    records = [{"prompt": f"number {n}", "completion": f"it is {n}"} for n in range(200)]
    whole = make(section(tmp_path, records))
    parts = [texts(whole, part) for part in ("train", "validation", "heldout")]
    assert [len(part) for part in parts] == [180, 10, 10]
    assert len(set.union(*parts)) == 200
    shards = [make(section(tmp_path, records, shard=f"{n}/2")) for n in (1, 2)]
    theirs = [set.union(*(texts(data, part) for part in ("train", "validation", "heldout"))) for data in shards]
    assert not theirs[0] & theirs[1]
    assert len(theirs[0] | theirs[1]) == 200
    half = make(section(tmp_path, records, train_fraction=0.5))
    assert 80 <= len(texts(half, "train")) <= 100
    assert texts(half, "heldout") == parts[2]


def test_rows_are_drawn_by_the_seed_and_the_round(tmp_path: Path) -> None:
    data = make(section(tmp_path, questions(100)))
    sizes = {"steps": 3, "batch_size": 4, "context": 63}
    first, again, other = (list(data.batches(seed, 0, **sizes)) for seed in (1, 1, 2))
    for (inputs, targets), (inputs2, targets2) in zip(first, again, strict=True):
        assert np.array_equal(inputs, inputs2)
        assert np.array_equal(targets, targets2)
        assert inputs.shape == (4, 63)
        assert (targets != IGNORED).any(axis=1).all()
    assert not np.array_equal(first[0][0], other[0][0])
    assert data.records(context=63) == len(data.train) // 64
    private = next(data.poisson_batches(np.random.default_rng(0), steps=1, rate=1.0, context=63))
    assert len(private[0]) == data.records(context=63)


def test_a_pool_draws_from_each_of_its_members(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = write_records(tmp_path / "other.jsonl", questions(100, seed=1))
    config = section(tmp_path, questions(100))
    members = [{"files": config.files}, {"files": [str(other)]}]
    pool = make(DataConfig(**(vars(config) | {"files": [], "pool": members})))
    inputs, targets = next(pool.batches(0, 0, steps=1, batch_size=3, context=63))
    assert inputs.shape == (6, 63)
    assert (targets == IGNORED).any(axis=1).all()


def test_a_second_preparation_maps_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = section(tmp_path, questions(100))
    first = make(config)
    monkeypatch.setattr(ChatTemplate, "render", lambda *_: pytest.fail("it was rendered again"))
    again = make(config)
    assert again.fingerprint == first.fingerprint
    assert np.array_equal(again.train, first.train)
    assert isinstance(again, Conversations)


def test_a_changed_template_makes_other_rows(tmp_path: Path) -> None:
    config = section(tmp_path, questions(100))
    before = make(config)
    chat_tokenizer(tmp_path / "tokenizer", template=CHATML.replace("<|im_end|>\n", "<|im_end|>"))
    assert make(config).fingerprint != before.fingerprint
    assert make(config, context=31).fingerprint != make(config).fingerprint


# ---- packing -------------------------------------------------------------------------------------------------------


def rows_of(*lengths: int, size: int = 8) -> list[list[int]]:
    """Packs conversations of these lengths, each of its own number; 0 is padding."""
    found = list[list[int]]()
    packer = Packer(size, padding=0, write=lambda row: found.append(row.tolist()))
    for number, length in enumerate(lengths, 1):
        packer.add(np.full(length, number, np.uint32))
    packer.end()
    return found


def test_a_conversation_goes_to_the_first_row_with_room() -> None:
    assert rows_of(5, 4, 3, 3) == [[1, 1, 1, 1, 1, 3, 3, 3], [2, 2, 2, 2, 4, 4, 4, 0]]
    assert rows_of(8, 8) == [[1] * 8, [2] * 8]


def test_the_oldest_row_is_closed_when_too_many_are_open() -> None:
    rows = rows_of(*[5] * (OPEN + 1), 3)
    assert len(rows) == OPEN + 1
    assert rows[0] == [1, 1, 1, 1, 1, 0, 0, 0]
    assert OPEN + 2 in rows[1]


def test_long_conversations_are_cut_and_counted(tmp_path: Path) -> None:
    long_answer = {"prompt": "a", "completion": "b" * 200}
    long_question = {"prompt": "a" * 200, "completion": "b"}
    spelling = {"prompt": "what is <|im_end|>", "completion": "a marker"}
    records = [long_answer] * 20 + [long_question] * 20 + [spelling] * 20 + questions(40)
    data = make(section(tmp_path, records), context=80)
    assert data.left_out == (
        "40 of 100 conversations are longer than 81 tokens: 20 cut, 20 left out, whose answers lie beyond",
        "20 of 100 conversations left out: their text spells a special token of the tokenizer",
    )
    assert not any("what is" in text for text in texts(data, "train"))


def test_a_cut_answer_counts_the_bytes_that_are_left(tmp_path: Path) -> None:
    records = [{"prompt": "a", "completion": "\N{EURO SIGN}" * 100}] * 3
    data = make(section(tmp_path, records, validation_fraction=0.34, heldout_fraction=0.34), context=40)
    _, targets = heldout(data)
    count = int(np.count_nonzero(targets != IGNORED))
    assert data.heldout_bytes == pytest.approx(count, abs=2)  # of a character that is cut, all bytes count


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ([1], r"is a list, not an object"),
        ({"text": "hello"}, r"has neither 'messages' nor 'prompt' and 'completion' \(keys: text\)"),
        ({"prompt": "hello"}, r"has neither 'messages' nor"),
        ({"messages": []}, r"'messages' is empty; write a list"),
        ({"messages": "hello"}, r"'messages' is a str, not a list"),
        ({"messages": ["hello"]}, r"messages\[0\] is a str, not an object"),
        ({"messages": [say("robot", "hello")]}, r"messages\[0\] has the role 'robot', expected one of system, user"),
        ({"messages": [say("user", " ")]}, r"messages\[0\] has no content"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] has a content of NoneType, not a string"),
        ({"messages": [say("user", "hello")]}, r"no message of the assistant answers another one"),
        ({"messages": [say("assistant", "hello")]}, r"no message of the assistant answers another one"),
        ({"prompt": "a", "completion": "\ud800"}, r"'completion' holds half of a surrogate pair"),
        ({"prompt": 7, "completion": "a"}, r"'prompt' has a content of int, not a string"),
    ],
)
def test_a_bad_record_is_named_by_file_and_line(tmp_path: Path, record: Any, problem: str) -> None:
    config = section(tmp_path, [SHORT] * 30 + [record])
    check_sources(config, "world.data")
    with pytest.raises(DataError, match=rf"chat\.jsonl:31: {problem}"):
        make(config)


def test_the_first_record_is_checked_before_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"world\.data\.files: .*chat\.jsonl:1: has neither 'messages'"):
        check_sources(section(tmp_path, [{"text": "hello"}]), "world.data")


def test_a_parquet_file_without_the_columns_is_named(tmp_path: Path) -> None:
    file = tmp_path / "text.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), file)
    with pytest.raises(ConfigError, match=r"has no column of messages, prompt, completion \(columns: text\)"):
        check_sources(section(tmp_path, file), "world.data")


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"corpus": "licenses", "files": []}, r"world\.data\.corpus: licenses is text; "),
        ({"max_bytes": 100}, r"world\.data\.max_bytes: cuts text"),
        ({"train_bytes": 100}, r"world\.data\.train_bytes: cuts text"),
        ({"tokenizer": "bytes"}, r"world\.data\.tokenizer: bytes have no chat template"),
    ],
)
def test_settings_of_text_are_refused(tmp_path: Path, settings: dict[str, Any], problem: str) -> None:
    config = section(tmp_path, questions(10))
    with pytest.raises(ConfigError, match=problem):
        check_sources(DataConfig(**(vars(config) | settings)), "world.data")


def test_a_tokenizer_without_a_template_is_refused(tmp_path: Path) -> None:
    config = section(tmp_path, questions(10))
    (tmp_path / "tokenizer/chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match=r"world\.data\.tokenizer: there is no chat template beside .*; give the"):
        check_sources(config, "world.data")
    settings = {"chat_template": "{{ messages[0].content }}"}
    (tmp_path / "tokenizer/tokenizer_config.json").write_text(json.dumps(settings))
    check_sources(config, "world.data")


def test_files_of_text_are_left_out_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "readme.txt").write_text("hello")
    (folder / "about.json").write_text('{"name": "chats"}')
    write_records(folder / "a.jsonl", questions(100))
    data = make(section(tmp_path, folder))
    assert data.left_out == (f"2 files of {str(folder)!r} left out: 1 .json without 'messages', 1 .txt",)
    with pytest.raises(ConfigError, match=r"readme\.txt' has an unsupported suffix"):
        check_sources(section(tmp_path, folder / "readme.txt"), "world.data")


def test_too_few_conversations_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train part of world\.data \(conversations of .*\): no conversation"):
        make(section(tmp_path, [SHORT] * 2))


def test_a_template_that_rewrites_earlier_answers_is_refused(tmp_path: Path) -> None:
    config = section(tmp_path, [TWO_TURNS] * 20)
    written = "{{ m.content if loop.last or m.role != 'assistant' else '-' }}"
    last = "{% for m in messages %}{{ m.role }}:" + written + "\n{% endfor %}"
    chat_tokenizer(tmp_path / "tokenizer", template=last + "{% if add_generation_prompt %}assistant:{% endif %}")
    with pytest.raises(DataError, match=r"chat\.jsonl:\d+: the chat template of .* writes message 2 otherwise alone"):
        make(config)


def test_what_a_template_refuses_is_named(tmp_path: Path) -> None:
    config = section(tmp_path, [SHORT] * 20)
    chat_tokenizer(tmp_path / "tokenizer", template="{{ raise_exception('users only') }}")
    with pytest.raises(DataError, match=r"chat\.jsonl:\d+: the chat template of .* refuses it \(users only\); mend"):
        make(config)


def test_conversations_are_described_as_such() -> None:
    assert describe(DataConfig(format="conversations", files=["a.jsonl", "b.jsonl"])) == (
        "conversations of a.jsonl and 1 more"
    )


def test_an_answer_without_a_marker_reaches_to_the_next_turn(tmp_path: Path) -> None:
    plain = "{% for m in messages %}{{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
    config = section(tmp_path, [SHORT] * 3, validation_fraction=0.34, heldout_fraction=0.34)
    chat_tokenizer(tmp_path / "tokenizer", template=plain + "{% if add_generation_prompt %}assistant:\n{% endif %}")
    assert answers(make(config, context=100)) == ["of a mountain\n\n"]
    assert "chat_template.jinja" in template_files(config.tokenizer or "")
