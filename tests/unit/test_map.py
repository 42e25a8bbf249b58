"""A map: the worlds of its cells, its numbers and its figure, continuation, and what it refuses."""

from __future__ import annotations

import csv
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from support.texts import numbered
from typer.testing import CliRunner

from worldlm_ray.cli import main as cli
from worldlm_ray.config.loading import load
from worldlm_ray.config.schema import RunConfig
from worldlm_ray.data import Dataset, prepare
from worldlm_ray.data.dataset import Pool
from worldlm_ray.errors import ConfigError, RunError
from worldlm_ray.experiments import map_run
from worldlm_ray.experiments.map_cells import Cell, Worlds, grid, kinships_of, size, sources, texts_of, worlds
from worldlm_ray.experiments.map_report import cells_of, draw, edges, markdown, write
from worldlm_ray.experiments.map_run import Result, numbers, plan_work
from worldlm_ray.experiments.methods import configure
from worldlm_ray.plan.plan import make_plan

QUARTERS = [Fraction(0), Fraction(1, 4), Fraction(1)]
TINY = ["model.hidden_size=16", "model.layers=2", "model.heads=2", "model.kv_heads=1", "model.intermediate_size=16"]
TINY += ["model.context=16", "training.local_steps=2", "training.batch_size=4", "budget.rounds=2"]
TINY += ["evaluation.tokens=64", "evaluation.final_tokens=128", "evaluation.validation_tokens=64"]


def folder_of_texts(tmp_path: Path, *, own: int = 200, common: int = 1200) -> Path:
    """Four small sources and a large one, in which every document names its source."""
    folder = tmp_path / "texts"
    for name, count in {"a/one": own, "a/two": own, "b/one": own, "b/two": own, "c/common": common}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        text = "\n\n".join(f"{name} {document}" for document in numbered(count))
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


def base(tmp_path: Path, *more: str) -> RunConfig:
    return load("federating", ["name=map", *TINY, f"data.cache_dir={tmp_path / 'cache'}", *more])


def small(tmp_path: Path, *, clients: int = 4) -> Worlds:
    common, own = sources(str(folder_of_texts(tmp_path)), common=None, clients=clients)
    return worlds(base(tmp_path), common, own, QUARTERS)


def text(dataset: Dataset, part: str) -> bytes:
    """A part as UTF-8; blank lines stand for the tokens that no byte has."""
    return b"".join(bytes([token]) if token < 256 else b"\n\n" for token in getattr(dataset, part).tolist())


@pytest.mark.parametrize("kinship", QUARTERS)
def test_a_share_of_every_part_of_a_clients_text_is_of_the_common_source(tmp_path: Path, kinship: Fraction) -> None:
    found = small(tmp_path)
    plan = make_plan(found.config(Cell(text=8_000, kinship=kinship)))
    common_blocks = set()
    for index, spec in enumerate(plan.root.clients):
        dataset = prepare(spec.settings.data, context=16, key="data")
        assert isinstance(dataset, Pool)
        assert len(dataset.members) == found.parts == 4
        assert 7_900 < dataset.train_bytes <= 8_000
        for number, member in enumerate(dataset.members):
            is_common = number < kinship * 4
            name = b"c/common" if is_common else found.own[index].name.replace("-", "/").encode()
            assert len(text(member, "train")) >= 1_950
            for part in ("train", "validation", "heldout"):
                names = {each.split(b" <")[0] for each in text(member, part).split(b"\n\n")[1:-1]}
                assert names == {name}, part
            if is_common:
                common_blocks |= {text(member, part) for part in ("train", "validation", "heldout")}
        # Batches and measurements take equally much of each part.
        inputs, _ = next(dataset.batches(0, 0, steps=1, batch_size=spec.settings.training.batch_size, context=16))
        assert len(inputs) == found.base.training.batch_size
    documents = [each for block in common_blocks for each in block.split(b"\n\n")[1:-1]]
    assert len(documents) == len(set(documents))
    assert bool(documents) == bool(kinship)


def test_clients_are_in_two_federations_if_there_are_four() -> None:
    config = load("federating")
    common, own = sources(None, common=None, clients=4)
    assert common.data == {"corpus": "python_stdlib"}
    paths = [
        c.path
        for c in make_plan(worlds(config, common, own, QUARTERS).config(Cell(text=9, kinship=QUARTERS[0]))).root.clients
    ]
    assert paths == [
        "world/federation0/cpp_headers",
        "world/federation0/docstrings",
        "world/federation1/package_descriptions",
        "world/federation1/python_reference",
    ]
    three = worlds(config, common, own[:3], QUARTERS).config(Cell(text=9, kinship=QUARTERS[0]))
    assert [client.path for client in make_plan(three).root.clients] == [f"world/{source.name}" for source in own[:3]]


def test_methods_draw_a_clients_text_in_the_same_order(tmp_path: Path) -> None:
    config = small(tmp_path).config(Cell(text=8_000, kinship=Fraction(1, 4)))
    drawn = {}
    for method in ("worldlm", "local", "pooled"):
        spec = make_plan(configure(config, method)).root.clients[0]
        dataset = prepare(spec.settings.data, context=16, key="data", order=spec.path)
        drawn[method] = next(dataset.batches(0, 0, steps=1, batch_size=1, context=16))[0][:4].tolist()
    assert drawn["worldlm"] == drawn["local"] == drawn["pooled"]


def test_corners_have_several_seeds() -> None:
    cells = grid([10, 20, 30], [Fraction(0), Fraction(1, 2), Fraction(1)], corner_seeds=3)
    assert [len(cell.seeds) for cell in cells] == [3, 1, 3, 1, 1, 1, 3, 1, 3]
    assert [cell.folder for cell in cells[:4]] == ["10-0", "20-0", "30-0", "10-1_2"]


def test_what_the_user_types_is_read() -> None:
    assert texts_of("48kB, 12_000,1.5MB") == [12_000, 48_000, 1_500_000]
    assert kinships_of("1,0,0.25, 1/2") == [Fraction(0), Fraction(1, 4), Fraction(1, 2), Fraction(1)]
    assert [size(each) for each in (900, 12_000, 1_500_000)] == ["900 B", "12 kB", "1.5 MB"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--text", "12kB,much"], "--text: 'much' is no amount of text"),
        (["--text", "0"], "--text: '0' is no amount of text"),
        (["--kinship", "0,3/2"], "--kinship: '3/2' is no share"),
        (["--kinship", "1/0"], "--kinship: '1/0' is no share"),
        (["--kinship", "1/3"], "training.batch_size: got 16, but a batch takes equally many sequences of 3 parts"),
        (["--clients", "1"], "--clients: got 1"),
        (["--clients", "6"], "--clients: got 6, but there are 5 sources beside python_stdlib"),
        (["--common", "cobol"], "--common: 'cobol' is no source"),
        (["--jobs", "0"], "--jobs"),
        (["data_dir=/none"], "data_dir: '/none' holds no .txt file"),
        (["data.train_bytes=5"], "data.train_bytes: a map sets it itself; use --text"),
        (["world.children[0].client=x"], "world.children[0].client: a map sets it itself; use --clients"),
        (["budget.seconds=5"], "budget: in seconds"),
        (["training.lrr=1"], "training.lrr"),
    ],
)
def test_wrong_input_is_answered_in_one_line(tmp_path: Path, words: list[str], said: str) -> None:
    out = tmp_path / "out"
    found = CliRunner().invoke(cli.app, ["map", "--out", str(out), *words])
    assert isinstance(found.exception, ConfigError)
    assert said in str(found.exception)
    assert not (out / "map.json").exists()


def test_the_common_source_may_be_a_folder(tmp_path: Path) -> None:
    common, own = sources(str(folder_of_texts(tmp_path)), common="a", clients=3)
    assert [Path(file).name for file in common.data["files"]] == ["one.txt", "two.txt"]
    assert [source.name for source in own] == ["b-one", "b-two", "c-common"]


def run_of(method: str, seed: int, losses: list[float]) -> dict[str, Any]:
    """A run of a comparison with these own losses."""
    clients = [
        {"client": f"world/{index}", "own": loss, "world": loss, "validation": loss}
        for index, loss in enumerate(losses)
    ]
    numbers = {"tokens": 1, "flops": 1, "virtual_s": 1.0, "levels": [], "world_curve": []}
    return {"method": method, "seed": seed, "clients": clients, **numbers}


RUNS = [
    *(run_of("local", seed, [2.0, 2.0]) for seed in (0, 1)),
    *(run_of("worldlm", seed, losses) for seed, losses in enumerate(([1.8, 1.8], [1.4, 2.2]))),
    *(run_of("pooled+ft", seed, [1.6, 1.6]) for seed in (0, 1)),
]


def test_the_numbers_of_a_cell() -> None:
    found = numbers(RUNS)
    assert found["gain"] == pytest.approx(0.1)
    assert found["headroom"] == pytest.approx(0.2)
    assert found["of_headroom"] == pytest.approx(0.5)
    assert found["error"] == pytest.approx(0.0, abs=1e-9)  # both seeds have a mean of 1.8
    assert (found["gains"], found["clients"]) == (1, 2)
    assert found["worst_vs_local"] == pytest.approx(0.0, abs=1e-9)
    assert numbers([run for run in RUNS if run["seed"] == 0])["error"] is None


def test_the_result_is_a_table_and_a_figure(tmp_path: Path) -> None:
    some = numbers(RUNS)
    cells = grid([12_000, 48_000], [Fraction(0), Fraction(1)], corner_seeds=2)
    results = [Result(cell=cell, numbers=some | {"gain": 0.1 - 0.1 * index}) for index, cell in enumerate(cells[:3])]
    results.append(Result(cell=cells[3], numbers=None, note="too small"))
    assert cells_of(results[0])["gain"] == "+10.0%"
    assert cells_of(results[2])["gain"] == "-10.0%"
    assert cells_of(results[3])["note"] == "too small"
    assert "| 12 kB | 0 | 2 | 2.0000 | 1.8000 | 1.6000 | +10.0% |" in markdown(results)
    assert write(results, tmp_path).read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "map.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["gain"] for row in rows] == ["0.1", "0.0", "-0.1", ""]
    assert [row["seeds"] for row in rows] == ["2", "2", "2", "0"]
    assert edges([0.0, 0.25, 1.0], around=1.0) == [-0.125, 0.125, 0.625, 1.375]


def test_no_label_of_a_line_lies_on_the_numbers_of_a_cell() -> None:
    headroom = iter([0.046, -0.004, -0.031, 0.063, 0.031, 0.025, 0.127, 0.079, 0.063])
    cells = grid([12_000, 48_000, 192_000], [Fraction(0), Fraction(1, 2), Fraction(1)], corner_seeds=1)
    figure = Figure(figsize=(9, 6))
    draw(figure, [Result(cell=cell, numbers=numbers(RUNS) | {"headroom": next(headroom)}) for cell in cells])
    figure.draw_without_rendering()
    texts = figure.axes[0].texts
    labels = [text for text in texts if text.get_text().startswith("H")]
    assert labels, "some remain"
    for label in labels:
        assert not any(label.get_window_extent().overlaps(t.get_window_extent()) for t in texts if t not in labels)


def test_cells_with_too_little_text_are_left_out_and_settings_may_not_change(tmp_path: Path) -> None:
    found, out = small(tmp_path, clients=2), tmp_path / "out"
    cells = grid([4_000, 10_000_000], [Fraction(0)], corner_seeds=1)
    work = plan_work(found, cells, out)
    assert [task.method for task in work.tasks] == list(map_run.METHODS)
    assert list(work.short) == [cells[1]]
    assert "one.txt, shard 1/4: " in work.short[cells[1]]
    assert str(work) == "3 runs (1 worlds, 3 methods)"
    plan_work(found, grid([4_000, 5_000], [Fraction(1)], corner_seeds=1), out)  # more cells are welcome
    other = replace(found, base=replace(found.base, training=replace(found.base.training, lr=1.0)))
    with pytest.raises(RunError, match="holds a map of another configuration; give another --out"):
        plan_work(other, cells, out)
    with pytest.raises(RunError, match="another configuration"):
        plan_work(replace(found, parts=2), cells, out)


def test_one_client_is_no_federation(tmp_path: Path) -> None:
    found = small(tmp_path)
    with pytest.raises(ConfigError, match="two clients"):
        worlds(found.base, found.common, found.own[:1], QUARTERS)


@pytest.mark.slow
def test_a_map_runs_and_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["map", "--text", "2kB,4kB", "--kinship", "1/2", "--corner-seeds", "1", "--clients", "2", "--out", "out"]
    words += [f"data_dir={folder_of_texts(tmp_path)}", "data.cache_dir=cache", *TINY]
    first = CliRunner().invoke(cli.app, words)
    assert first.exit_code == 0, first.output
    assert "6 runs (2 worlds, 3 methods) in" in first.output
    written = {name: (tmp_path / "out" / name).read_bytes() for name in ("map.csv", "map.md")}
    assert written["map.csv"].count(b"\n") == 3
    ages = _ages(tmp_path / "out")
    gone = tmp_path / "out" / "cells" / "2000-1_2" / "runs" / "local-0" / "measures.json"
    gone.unlink()
    again = CliRunner().invoke(cli.app, words)
    assert "6 runs (2 worlds, 3 methods), 5 of them done in" in again.output
    assert {name: (tmp_path / "out" / name).read_bytes() for name in written} == written
    now = _ages(tmp_path / "out")
    assert {path for path in ages if ages[path] != now[path]} == {gone}


def _ages(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in out.rglob("measures.json")}
