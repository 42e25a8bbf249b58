"""TensorBoard's event files: written in time, bounded in memory, whole after a full disk."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from support.tracked import (
    event_files,
    eventually,
    lines,
    points,
    round_of,
)
from tensorboard.compat.proto.event_pb2 import Event

from worldlm_ray.config.schema import BudgetConfig
from worldlm_ray.tracking import tensorboard
from worldlm_ray.tracking.tensorboard import Board, EventFiles
from worldlm_ray.tracking.tracker import Tracker


def test_many_nodes_take_neither_threads_nor_open_files(tmp_path: Path) -> None:
    clients = [f"world/client-{i}" for i in range(300)]
    threads, open_files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    run = Tracker(
        tmp_path,
        kinds={"world": "world", **dict.fromkeys(clients, "client")},
        hparams={},
        budget=BudgetConfig(tokens=1),
    )
    for tokens in (100, 200):
        run.record(*(round_of(client, tokens=tokens, loss=None) for client in clients))
        run.flush()
    assert threading.active_count() <= threads + 1
    assert len(os.listdir("/proc/self/fd")) <= open_files + 2
    run.close()
    assert threading.active_count() == threads
    assert lines(tmp_path, clients[-1], "train_loss") == [(10.0, 2.5), (10.0, 2.5)]


def test_events_reach_the_files_without_a_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorboard, "FLUSH_EVERY_S", 0.01)
    board = Board(tmp_path / "tensorboard", root="world", started_at=0.0)
    board.scalars("world", {"version": 1}, now_s=1.0)
    assert eventually(lambda: event_files(tmp_path, "world") != [])
    assert eventually(lambda: points(tmp_path, "world", "version") == [(1, 1)])
    board.scalars("world", {"version": 2}, now_s=2.0)
    assert eventually(lambda: points(tmp_path, "world", "version") == [(1, 1), (2, 2)])
    board.close()


def test_events_that_wait_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorboard, "FLUSH_EVERY_S", 1_000.0)
    monkeypatch.setattr(tensorboard, "WAITING_BYTES", 200)
    board = Board(tmp_path / "tensorboard", root="world", started_at=0.0)
    for step in range(100):
        board.scalars("world", {"version": step}, now_s=step)
    written = len(points(tmp_path, "world", "version"))
    board.close()
    assert 90 < written <= 100
    assert len(points(tmp_path, "world", "version")) == 100


def test_events_wait_while_the_disk_refuses_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorboard, "FLUSH_EVERY_S", 0.01)
    in_the_way = tmp_path / "tensorboard"
    in_the_way.write_text("a file stands where the folder should be")
    board = Board(in_the_way, root="world", started_at=0.0)
    board.scalars("world", {"version": 1}, now_s=1.0)
    assert eventually(lambda: bool(board.trouble))
    assert "cannot write" in board.trouble
    board.scalars("world", {"version": 2}, now_s=2.0)
    in_the_way.unlink()
    assert eventually(lambda: not board.trouble)
    board.scalars("world", {"version": 3}, now_s=3.0)
    board.close()
    assert [value for _, value in points(tmp_path, "world", "version")] == [1, 2, 3]


def test_what_a_full_disk_tore_apart_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorboard, "FLUSH_EVERY_S", 1_000.0)
    board = Board(tmp_path / "tensorboard", root="world", started_at=0.0)
    board.scalars("world", {"version": 1}, now_s=1.0)
    board.flush()
    [first] = (tmp_path / "tensorboard/world").iterdir()
    whole = first.read_bytes()
    opened = Path.open

    class Full:
        """Takes half of what it is given, and then there is no space left."""

        def __init__(self, path: Path) -> None:
            self.file = opened(path, "ab+", buffering=0)

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def seek(self, offset: int, whence: int) -> int:
            return self.file.seek(offset, whence)

        def write(self, data: bytes) -> None:
            self.file.write(data[: len(data) // 2])
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, *_, **__: Full(path))
        board.scalars("world", {"version": 2}, now_s=2.0)
        board.flush()
        assert "No space left" in board.trouble
    assert first.read_bytes() == whole
    board.close()
    assert [value for _, value in points(tmp_path, "world", "version")] == [1, 2]


def test_events_that_the_disk_refuses_for_long_are_dropped_at_a_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorboard, "FLUSH_EVERY_S", 1_000.0)
    monkeypatch.setattr(tensorboard, "WAITING_BYTES", 200)
    monkeypatch.setattr(tensorboard, "KEPT_BYTES", 1_000)
    in_the_way = tmp_path / "tensorboard"
    in_the_way.write_text("a file stands where the folder should be")
    board = Board(in_the_way, root="world", started_at=0.0)
    for step in range(1_000):
        board.scalars("world", {"version": step}, now_s=step)
    in_the_way.unlink()
    board.close()
    assert 10 < len(points(tmp_path, "world", "version")) < 100


def test_closed_event_files_take_no_more(tmp_path: Path) -> None:
    files = EventFiles(tmp_path, started_at=0.0)
    files.close()
    with pytest.raises(ValueError, match="closed"):
        files.add("world", Event())
    assert list(tmp_path.iterdir()) == []


def test_a_clock_that_is_set_back_puts_no_event_file_before_an_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wall = time.time()
    names = []
    for step_s in (0.0, 3_600.0, -3_600.0, 0.0):
        monkeypatch.setattr(time, "time", lambda step_s=step_s: wall + step_s)
        board = Board(tmp_path, root="world", started_at=wall)
        board.scalars("world", {"loss_by_time": 1.0}, now_s=float(len(names)))
        board.close()
        [name] = {path.name for path in (tmp_path / "world").iterdir()} - set(names)
        names.append(name)
    assert names == sorted(names)
