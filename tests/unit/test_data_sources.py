"""Which files a folder or a glob stands for, what is left out of it and said, and what is found before a run starts."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import random
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from support.worlds import client

from worldlm_ray.config.schema import DataConfig, ResourcesConfig
from worldlm_ray.data import check_sources, prepare, read_documents, sources
from worldlm_ray.data.text import find_sources
from worldlm_ray.errors import ConfigError, DataError
from worldlm_ray.launch import preflight
from worldlm_ray.plan.plan import Plan
from worldlm_ray.reports.describe import left_out as left_out_of
from worldlm_ray.simulation.simulator import simulate

KEY = "world.children[0].data"
PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def read(*entries: Path | str, **settings: Any) -> list[str]:
    return list(read_documents(DataConfig(files=[str(entry) for entry in entries], **settings), KEY))


def left_out(*entries: Path | str, **settings: Any) -> list[str]:
    return find_sources(DataConfig(files=[str(entry) for entry in entries], **settings), KEY).left_out


def refused(*entries: Path | str, **settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        check_sources(DataConfig(files=[str(entry) for entry in entries], **settings), KEY)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# ---- folders and globs ---------------------------------------------------------------------------------------


def put(folder: Path, name: str, rng: random.Random) -> Path:
    """A file of a random kind: text of every format, an empty one, or one that is not read."""
    text, packed = f"text {folder.name} {name}", rng.choice(list(PACKED))
    line, pack = json.dumps({"text": text}) + "\n", PACKED[packed]
    match rng.choice(["txt", "lines", "lines", "array", "empty", "other"]):
        case "txt":
            return write(folder / f"{name}.txt{packed}", pack(text.encode()))
        case "lines":
            return write(folder / f"{name}{rng.choice(['.jsonl', '.NDJSON', '.json'])}{packed}", pack(line.encode()))
        case "array":
            return write(folder / f"{name}.json", json.dumps([{"text": text}], indent=1))
        case "empty":
            return write(folder / f"{name}.txt{packed}", pack(b""))
        case _:
            return write(folder / f"{name}{rng.choice(['.md', '', '.csv.gz'])}", text)


def grow(folder: Path, rng: random.Random, everything: list[Path], depth: int = 0) -> None:
    """A random tree: files of all kinds, some hidden, links to files and folders, loops."""
    for number in range(rng.randint(2, 5)):
        name = f"{rng.choice(['', '', '', '.'])}{rng.choice('abAB[')}{len(everything)}-{number}"
        everything.append(put(folder, name, rng))
    if rng.random() < 0.5:
        target = rng.choice(everything)
        (folder / f"link-{len(everything)}{''.join(target.suffixes)}").symlink_to(target)
    for number in range(rng.randint(0, 3) if depth < 3 else 0):
        below = folder / f"{rng.choice(['', '', '.'])}folder{number}"
        below.mkdir()
        grow(below, rng, everything, depth + 1)
    if rng.random() < 0.6:  # to itself or to any folder above: a loop
        (folder / f"loop{len(everything)}").symlink_to(rng.choice([folder, *list(folder.parents)[:depth]]))


def by_hand(folder: Path) -> list[str]:
    """What Python reads in a tree: links followed, every file once, no hidden ones."""
    found: dict[str, str] = {}
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                found[os.path.realpath(Path(place, name))] = name
    texts: list[str] = []
    opened: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    for real, name in found.items():
        path = Path(name.lower())
        kind = Path(path.stem).suffix if path.suffix in opened else path.suffix
        if kind not in (".txt", ".jsonl", ".ndjson", ".json"):
            continue
        with opened.get(path.suffix, open)(real, "rb") as handle:
            raw = handle.read().decode()
        if raw and kind == ".txt":
            texts.append(raw)
        elif raw:
            value = json.loads(raw)
            texts += [record["text"] for record in (value if isinstance(value, list) else [value])]
    return sorted(texts)


@pytest.mark.parametrize("seed", range(25))
def test_a_folder_its_glob_and_python_read_the_same_documents(tmp_path: Path, seed: int) -> None:
    folder = tmp_path / "tree"
    folder.mkdir()
    write(folder / "one.txt", "the first")
    outside = tmp_path / "another disk"
    outside.mkdir()
    rng = random.Random(seed)
    grow(outside, rng, everything := [])
    grow(folder, rng, everything)
    (folder / "linked").symlink_to(outside)
    documents = read(folder)
    assert sorted(documents) == by_hand(folder)
    assert sorted(documents) == sorted(read(folder / "**" / "*")) == sorted(read(folder / "**"))
    assert sorted(documents) == sorted(read(folder / "**", folder, folder / "*", folder / "**/*"))
    assert left_out(folder)[0].split(" left out: ")[1] == left_out(folder / "**/*")[0].split(" left out: ")[1]


def test_many_links_between_folders_take_no_longer_than_the_folders(tmp_path: Path) -> None:
    for number in range(12):
        write(tmp_path / f"d{number}" / "a.txt", f"text {number}")
        for other in range(12):
            (tmp_path / f"d{number}" / f"to{other}").symlink_to(tmp_path / f"d{other}")
    assert sorted(read(tmp_path)) == sorted(f"text {number}" for number in range(12))
    assert len(read(tmp_path / "**/to3/*.txt")) == 1


def test_what_is_left_out_is_counted_by_kind(tmp_path: Path) -> None:
    for name in ("a.txt", "b.md", "c.MD", "d.csv.gz", "noname", ".hidden.txt", ".git/config", ".git/x.txt"):
        write(tmp_path / name, "text")
    write(tmp_path / "empty.jsonl", "")
    write(tmp_path / "empty.txt.gz", gzip.compress(b""))
    write(tmp_path / "blank.txt", " \n\n")
    write(tmp_path / "dataset_info.json", json.dumps({"name": "mine", "rows": 1}, indent=1))
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    [line] = left_out(tmp_path)
    assert line.startswith(f"11 files of {str(tmp_path)!r} left out: 3 empty, ")
    kinds = ["2 hidden", "2 .md", "1 .csv.gz", "1 without a suffix", "1 broken link", "1 .json without 'text'"]
    assert sum(kind in line for kind in kinds) == 4, line
    assert line.endswith(", 2 others")
    assert read(tmp_path) == ["text"]
    [line] = left_out(tmp_path / "*.txt")
    assert line.endswith("left out: 1 hidden, 1 broken link, 1 empty")
    assert left_out(tmp_path / "a.txt") == []


def test_a_folder_that_only_a_pattern_matches_is_said(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "text")
    write(tmp_path / "below" / "b.txt", "text")
    assert left_out(tmp_path / "*")[0].endswith("left out: 1 folder")


def test_hidden_files_are_read_where_they_are_named(tmp_path: Path) -> None:
    write(tmp_path / ".data" / ".a.txt", "hidden")
    assert read(tmp_path / ".data" / ".a.txt") == ["hidden"]
    assert read(tmp_path / ".data" / ".*.txt") == ["hidden"]
    assert read(tmp_path / ".d*" / ".a*") == ["hidden"]
    assert "holds no text files (1 hidden)" in refused(tmp_path / ".data")


def test_names_without_links_go_first(tmp_path: Path) -> None:
    write(tmp_path / "z" / "a.txt", "text")
    (tmp_path / "a").symlink_to(tmp_path / "z")
    [path] = check_sources(DataConfig(files=[str(tmp_path)]), KEY)
    assert path == tmp_path / "z" / "a.txt"


def test_brackets_in_the_name_of_a_folder_that_exists_are_no_pattern(tmp_path: Path) -> None:
    write(tmp_path / "dir[1]" / "deep" / "a.txt", "mine")
    write(tmp_path / "dir1" / "deep" / "a.txt", "another")
    assert read(tmp_path / "dir[1]" / "deep" / "*.txt") == ["mine"]
    assert read(tmp_path / "dir[1]" / "**" / "*.txt") == ["mine"]
    assert read(tmp_path / "dir[1]") == ["mine"]
    assert read(tmp_path / "dir[0-9]" / "deep" / "*.txt") == ["another"]


@pytest.mark.parametrize("place", ["s3://bucket/a", "gs://b", "hf://datasets/x", "https://host/a.jsonl", "S3://b"])
def test_text_elsewhere_is_refused_in_one_line(place: str) -> None:
    assert "is not on a file system" in refused(place)
    assert "copy it to a folder" in refused(place)


# ---- formats -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [*PACKED, ".zst"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".ndjson", ".json", ".TXT", ".Jsonl"])
def test_every_format_is_read_compressed_or_not(tmp_path: Path, suffix: str, packed: str) -> None:
    pack = pytest.importorskip("zstandard").ZstdCompressor().compress if packed == ".zst" else PACKED[packed]
    raw = "one" if suffix.lower() == ".txt" else '{"text": "one"}\n'
    assert read(write(tmp_path / f"a{suffix}{packed}", pack(raw.encode()))) == ["one"]
    assert read(tmp_path) == ["one"]


@pytest.mark.parametrize(
    "raw",
    [
        '{"text": "a"}\n{"text": "b"}\n',
        '\ufeff[{"text": "a"}, {"text": "b"}]',
        '[\n  {\n    "text": "a"\n  },\n  {"text": "b"}\n]\n',
        '{\n "text": "a"\n}\n{\n "text": "b"\n}',
    ],
)
def test_json_is_lines_or_an_array(tmp_path: Path, raw: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.json", raw)
    assert read(path) == ["a", "b"]
    monkeypatch.setattr("worldlm_ray.data.readers.CHUNK_CHARS", 3)
    assert read(path) == ["a", "b"], "whatever the places at which it is cut"


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ('[{"text": "a"}, {"text": ', "record 2: is not valid JSON"),
        ('[{"text": "a"}', "ends in the middle of its array"),
        ('[{"text": "a"}] {"text": "b"}', "holds more than its array"),
        ('{"text": "a"}\n{text: b}', "record 2: is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ('[{"text": "a"}, "b"]', "record 2: is a str, not an object"),
    ],
)
def test_bad_json_is_named(tmp_path: Path, raw: str, words: str) -> None:
    path = write(tmp_path / "a.json", raw)
    with pytest.raises(DataError, match=r"a\.json: ") as caught:
        read(path)
    assert words in str(caught.value)


def test_fields_of_fields(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps({"meta": {"text": "inner"}, "id": 1}))
    assert read(path, text_key="meta.text") == ["inner"]
    both = write(tmp_path / "b.jsonl", json.dumps({"meta": {"text": "inner"}, "meta.text": "literal"}))
    assert read(both, text_key="meta.text") == ["literal"]
    assert "did you mean 'meta.text'?" in refused(path)
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.table({"meta": [{"text": "inner", "n": 1}, None, {"text": None, "n": 2}], "n": [1, 2, 3]})
    pq.write_table(table, tmp_path / "c.parquet")
    assert read(tmp_path / "c.parquet", text_key="meta.text") == ["inner"]
    assert "did you mean 'meta.text'?" in refused(tmp_path / "c.parquet")
    assert "is a int64, not a string" in refused(tmp_path / "c.parquet", text_key="meta.n")


# ---- found before a run starts -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.parquet", "a.jsonl.gz"])
def test_a_pointer_of_git_lfs_is_refused_by_name(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, POINTER)
    assert "git lfs pull" in refused(path)
    assert str(path) in refused(tmp_path)
    with pytest.raises(DataError, match="git lfs pull"):
        read(path)


def test_a_wrong_text_key_is_found_in_any_file_before_the_run(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", '{"text": "fine"}\n')
    write(tmp_path / "b.jsonl.gz", gzip.compress(b'{"content": "x", "id": "3"}\n'))
    error = refused(tmp_path)
    assert f"{tmp_path / 'b.jsonl.gz'}:1: has no key 'text' (keys: content, id)" in error
    assert f"set {KEY}.text_key" in error
    write(tmp_path / "c.jsonl", '{"body": "x", "contents": "y"}\n')
    assert "did you mean 'contents'?" in refused(tmp_path / "c.jsonl", text_key="content")


def test_several_json_records_without_text_are_an_error_not_left_out(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "fine")
    write(tmp_path / "b.json", '{"content": "x"}\n{"content": "y"}\n')
    assert "has no key 'text'" in refused(tmp_path)


def test_a_client_without_any_text_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", '{"text": " "}\n' * 100)
    assert "there is no text in it" in refused(tmp_path)
    write(tmp_path / "b.txt", "")
    (tmp_path / "a.jsonl").unlink()
    assert "holds no text files (1 empty)" in refused(tmp_path)


def test_a_dataset_knows_what_was_left_out(tmp_path: Path) -> None:
    write(tmp_path / "texts" / "a.txt", "words words words\n\n" * 800)
    write(tmp_path / "texts" / "b.md", "words")
    config = DataConfig(files=[str(tmp_path / "texts")], cache_dir=str(tmp_path / "cache"), heldout_fraction=0.5)
    assert prepare(config, context=8, key=KEY).left_out == (f"1 file of {str(tmp_path / 'texts')!r} left out: 1 .md",)


def test_sources_name_no_more_kinds_than_fit_a_line() -> None:
    kinds = sources.Counter({f".{number}": 20 - number for number in range(10)})
    assert sources.counted(kinds) == "20 .0, 19 .1, 18 .2, 17 .3, 16 .4, 65 others"


# ---- said --------------------------------------------------------------------------------------------------------


def with_a_note(folder: Path, name: str, **settings: Any) -> dict[str, Any]:
    """A client whose folder holds a file that is not read."""
    (folder / name).mkdir()
    write(folder / name / "README.md", "a note")
    made = client("text", folder / name, 1)
    return made | {"client": name, "data": {"files": [str(folder / name)]}, **settings}


def test_a_run_says_once_per_client_what_was_left_out(tiny: Callable[..., Plan], tmp_path: Path) -> None:
    silent = {"unit": "record", "noise_multiplier": 1.0, "target_epsilon": 1e6, "grad_sample_mode": "hooks"}
    children = [with_a_note(tmp_path, "a", copies=2), with_a_note(tmp_path, "b"), client("c", tmp_path, 3)]
    children.append(with_a_note(tmp_path, "private", privacy=silent))
    plan = tiny(children)
    lines = {path: f"1 file of {str(tmp_path / path[0])!r} left out: 1 .md" for path in ("a-1", "b")}
    said = [(each["node"], each["text"]) for each in simulate(plan).summary["warnings"]]
    assert said == [(f"world/{path}", line) for path, line in lines.items()], "nothing of a private client"
    shown = left_out_of(plan)
    assert [line for line in shown if "private" not in line] == [f"world/{path}: {t}" for path, t in lines.items()]
    assert len(shown) == 3, "`worldlm show` runs where the text is"


def test_a_machine_of_a_cluster_looks_into_the_texts_too(tmp_path: Path) -> None:
    there = DataConfig(files=[str(write(tmp_path / "a.jsonl", '{"content": "x"}\n'))])
    absent = DataConfig(files=[str(tmp_path / "b.jsonl")])
    marker = write(tmp_path / "marker", "")
    clients = {"one": (there, ResourcesConfig()), "two": (absent, ResourcesConfig())}
    [wrong_key, missing], _ = preflight._look(str(marker), clients, version("worldlm_ray"))
    assert wrong_key.endswith("set one.data.text_key: did you mean 'content'?")
    assert "there is no file" in missing
    assert missing.endswith("or set two.placement.labels to where it is")
