"""Reading documents: every format, and every way in which a user's files can be wrong."""

from __future__ import annotations

import builtins
import gzip
import importlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from worldlm_ray.config.schema import DataConfig
from worldlm_ray.data import check_sources, describe, read_documents
from worldlm_ray.errors import ConfigError, DataError

KEY = "world.children[0].data"
TEXTS = ["Hello, world.", "Zwei Zeilen\nmit Umlaut: ä"]


def read(path: Path | str, **settings: Any) -> list[str]:
    return list(read_documents(DataConfig(files=[str(path)], **settings), KEY))


def jsonl(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def refused(config: DataConfig) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        check_sources(config, KEY)
    assert "\n" not in str(caught.value)
    return caught.value


def test_txt_documents_are_separated_by_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff\none\r\nstill one\r\n\r\n \n\ntwo".encode())
    assert read(path) == ["one\nstill one", "two"]


def test_every_json_lines_format_gives_the_same_documents(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    raw = jsonl([*TEXTS, "  "]) + b"\n"
    frames = [zstandard.ZstdCompressor().compress(part) for part in (raw[:20], raw[20:])]
    (tmp_path / "a.jsonl").write_bytes(raw)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(raw))
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    for suffix in ("", ".gz", ".zst"):
        assert read(tmp_path / f"a.jsonl{suffix}") == TEXTS, suffix


def test_parquet_reads_the_chosen_column_and_skips_nulls(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"content": [TEXTS[0], None, TEXTS[1]], "n": [1, 2, 3]}), path)
    assert read(path, text_key="content") == TEXTS
    with pytest.raises(DataError, match=r"a\.parquet: has no column 'text' \(columns: content, n\).*text_key"):
        read(path)
    with pytest.raises(DataError, match=r"row 1: 'n' is a int"):
        read(path, text_key="n")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read"):
        read(path)


def test_folders_and_globs_are_sorted_and_name_each_file_once(tmp_path: Path) -> None:
    for name in ("b.txt", "deep/a.txt", "a[1].txt", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == ["a[1].txt", "b.txt", "deep/a.txt"]
    assert read(tmp_path / "**/a.txt") == ["deep/a.txt"]
    assert read(tmp_path / "a[1].txt") == ["a[1].txt"]
    both = DataConfig(files=[str(tmp_path / "b.txt"), str(tmp_path)])
    assert [path.name for path in check_sources(both, KEY)] == ["b.txt", "a[1].txt", "a.txt"]


def test_max_bytes_cuts_between_characters(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("abc\n\nää", encoding="utf-8")
    assert read(path, max_bytes=6) == ["abc", "ä"]
    assert read(path, max_bytes=3) == ["abc"]
    assert read(path, max_bytes=100) == ["abc", "ää"]


@pytest.mark.parametrize(
    ("settings", "key", "words"),
    [
        ({}, ".files", "neither files nor a corpus"),
        ({"files": ["good.txt"], "corpus": "licenses"}, ".corpus", "together with files"),
        ({"files": ["good.txt", "absent.txt"]}, ".files[1]", "there is no file"),
        ({"files": ["*.parquet"]}, ".files[0]", "matches no file"),
        ({"files": ["*.md"]}, ".files[0]", "supported suffix"),
        ({"files": ["notes.md"]}, ".files[0]", "unsupported suffix"),
        ({"files": ["empty.txt"]}, ".files[0]", "is empty"),
        ({"files": ["pipe.txt"]}, ".files[0]", "is no regular file"),
        ({"files": ["folder"]}, ".files[0]", "holds no text files"),
        ({"corpus": "python_stdlb"}, ".corpus", "did you mean 'python_stdlib'?"),
        ({"corpus": "x"}, ".corpus", "expected one of"),
        ({"corpus": "licenses", "tokenizer": "absent.json"}, ".tokenizer", "No such file"),
        ({"corpus": "licenses", "tokenizer": "notes.md"}, ".tokenizer", "is not JSON"),
        ({"corpus": "licenses", "tokenizer": "other.json"}, ".tokenizer", "holds no tokenizer"),
        ({"corpus": "licenses", "max_bytes": 0}, ".max_bytes", "above 0"),
    ],
)
def test_mistakes_are_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], key: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    for name, text in {"good.txt": "x", "notes.md": "x", "empty.txt": "", "other.json": "{}"}.items():
        (tmp_path / name).write_text(text)
    error = refused(DataConfig(**settings))
    assert error.key == KEY + key
    assert words in str(error)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": ', "is not valid JSON"),
        (b'["text"]', "is a list"),
        (b'{"body": "x"}', f"has no key 'text' (keys: body); set {KEY}.text_key"),
        (b'{"text": 3}', "is a int, not a string"),
        (b'{"text": "\xff"}', "is not valid UTF-8"),
        (b'{"text": "\\ud800"}', "surrogate"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, words: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(["fine", "fine too"]) + line + b"\n")
    with pytest.raises(DataError) as caught:
        read(path)
    assert f"{path}:3: " in str(caught.value)
    assert words in str(caught.value)


def test_invalid_utf8_in_txt_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\n\ncaf\xe9\n")
    with pytest.raises(DataError, match=r"a\.txt:3: is not valid UTF-8"):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_a_damaged_archive_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress(jsonl(TEXTS))
    path.write_bytes(whole[:-12] if damage == "cut" else b"not an archive")
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: cannot be read"):
        read(path)


def test_a_damaged_zstandard_file_is_named(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    path = tmp_path / "a.jsonl.zst"
    whole = zstandard.ZstdCompressor().compress(jsonl(TEXTS))
    for raw in (b"not an archive", whole[:-6], whole + whole[:8]):
        path.write_bytes(raw)
        with pytest.raises(DataError, match=r"a\.jsonl\.zst: cannot be read"):
            read(path)


def test_missing_zstandard_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def without(name: str, package: str | None = None) -> Any:
        if name == "zstandard":
            raise builtins.ImportError(name)
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", without)
    (tmp_path / "a.jsonl.zst").write_bytes(b"x")
    with pytest.raises(DataError, match="pip install zstandard"):
        read(tmp_path / "a.jsonl.zst")


def test_describe() -> None:
    assert describe(DataConfig(corpus="licenses")) == "corpus licenses"
    assert describe(DataConfig(files=["a.txt"])) == "a.txt"
    assert describe(DataConfig(files=["a.txt", "b", "c"])) == "a.txt and 2 more"
