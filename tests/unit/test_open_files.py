"""Many clients in one process hold few files open; where files are short nevertheless, the message names the limit."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.worlds import crowd

from worldlm_ray.client.shared import BufferStore
from worldlm_ray.config.schema import DataConfig
from worldlm_ray.data import cache, prepare
from worldlm_ray.errors import DataError
from worldlm_ray.plan.plan import Plan
from worldlm_ray.simulation.simulator import simulate
from worldlm_ray.storage import open_files

Tiny = Callable[..., Plan]


@pytest.fixture
def few_files() -> Iterator[int]:
    """This process may open no more than some thirty files more."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    there = max(int(name) for name in os.listdir("/dev/fd")) + 32
    resource.setrlimit(resource.RLIMIT_NOFILE, (there, before[1]))
    yield there
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_map_needs_no_open_file(tmp_path: Path, few_files: int) -> None:
    values = np.arange(1000, dtype=np.uint16)
    maps = []
    for number in range(few_files * 2):
        path = tmp_path / str(number)
        path.write_bytes((values + number).tobytes())
        with path.open("rb") as file:
            maps.append(open_files.mapped(file, np.uint16))
    assert all(np.array_equal(found, values + number) for number, found in enumerate(maps))
    with pytest.raises(ValueError, match="read-only"):
        maps[0][0] = 1
    with (tmp_path / "empty").open("w+b") as file:
        assert open_files.mapped(file, np.uint16).size == 0


def test_a_map_that_can_be_written_is_its_file_and_goes_with_its_last_view(tmp_path: Path) -> None:
    path = tmp_path / "values"
    path.write_bytes(bytes(4096))
    with path.open("r+b") as file:
        values = open_files.mapped(file, np.float32, writable=True)
    view = values[10:20]
    values[10] = 2.5
    del values
    assert view[0] == np.fromfile(path, np.float32)[10] == 2.5
    if Path("/proc/self/maps").exists():
        assert str(path) in Path("/proc/self/maps").read_text()
        del view
        assert str(path) not in Path("/proc/self/maps").read_text()


def test_buffers_beyond_the_memory_limit_need_no_open_files(few_files: int) -> None:
    store = BufferStore(limit_bytes=0)
    kept = [store.keep(np.full(8, number, np.float32)) for number in range(few_files * 2)]
    kept[3][:] = 7.0
    assert [values[0] for values in kept[:5]] == [0.0, 1.0, 2.0, 7.0, 4.0]


def test_more_clients_than_files_may_be_open_are_simulated(tiny: Tiny, tmp_path: Path, few_files: int) -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    copies = 18  # two files each: more than the thirty that are left
    plan = tiny([crowd("phone", tmp_path, copies=copies)], budget={"rounds": 1}, training={"local_steps": 1})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_files, "raise_limit", lambda: None)  # as where the limit is a hard one
        outcome = simulate(plan)
    assert soft == open_files.limit()
    assert len(outcome.summary["nodes"]) == copies + 1


def test_the_limit_is_raised_to_what_the_system_allows(few_files: int) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert open_files.limit() == few_files
    open_files.raise_limit()
    assert open_files.limit() == hard


def test_fewer_parts_are_cut_at_once_where_files_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for limit in (64, 256, 1024):
        monkeypatch.setattr(open_files, "limit", lambda limit=limit: limit)
        found[limit] = open_files.at_once(64, each=2)
    assert found == {64: 1, 256: 48, 1024: 64}


def test_an_error_names_the_limit_not_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("words words\n\n" * 800)
    config = DataConfig(files=[str(tmp_path / "a.txt")], cache_dir=str(tmp_path / "cache"))

    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(open_files, "limit", lambda: 256)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "replacing", refuse)
        with pytest.raises(DataError, match=r"may hold 256 files open: raise the limit with `ulimit -n") as caught:
            prepare(config, context=8, key="data")
        assert "space" not in str(caught.value)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        with pytest.raises(DataError, match="ulimit -n"):
            prepare(config, context=8, key="data")
