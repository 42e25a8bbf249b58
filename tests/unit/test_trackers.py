"""Trackers on request: each draws a run, and one that fails never stops it."""

from __future__ import annotations

import csv
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from worldlm_ray.config.loading import from_mapping
from worldlm_ray.config.schema import BudgetConfig
from worldlm_ray.config.tracking import TrackingConfig
from worldlm_ray.errors import ConfigError
from worldlm_ray.records import PushRecord
from worldlm_ray.tracking import guarded
from worldlm_ray.tracking.sinks import SINKS, RunFacts, Sink, chosen_sinks, sink
from worldlm_ray.tracking.tracker import Tracker

KINDS = {"world": "world", "world/a": "client"}


def tracked(folder: Path, tracking: TrackingConfig, *, bytes_sent: int = 7) -> Tracker:
    """A short run that has ended."""
    tracker = Tracker(
        folder,
        kinds=KINDS,
        hparams={"seed": 3},
        budget=BudgetConfig(tokens=10),
        texts={"2 tree": "a tree"},
        sinks=chosen_sinks(tracking),
        wall=lambda: 50.0,
    )
    tracker.record(PushRecord(node="world/a", now_s=2.0, bytes=bytes_sent))
    tracker.close()
    return tracker


def named(*names: str, **settings: Any) -> TrackingConfig:
    raw = {"budget": {"rounds": 1}, "tracking": {"sinks": list(names), **settings}}
    return from_mapping(raw).tracking


def test_csv_has_the_columns_of_the_curves_and_a_resumed_run_appends(tmp_path: Path) -> None:
    for _ in range(2):
        assert tracked(tmp_path, named("csv")).warnings == []
    rows = list(csv.reader((tmp_path / "metrics.csv").read_text(encoding="utf-8").splitlines()))
    assert rows[0] == ["now_s", "tokens", "node", "name", "value"]
    assert [row for row in rows[1:] if row[3] == "bytes_up"] == [
        ["2.0", "0", "world/a", "bytes_up", "7"],
        ["2.0", "0", "world/a", "bytes_up", "14"],
    ]
    assert not (tmp_path / "tensorboard").exists(), "only what the configuration names"


def test_an_unknown_tracker_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"tracking\.sinks.*did you mean 'wandb'"):
        named("wandbb")


class Failing(Sink):
    """Fails at its first point."""

    def __init__(self, run: RunFacts) -> None:
        self.calls = 0

    def scalars(self, node: str, kind: str, values: Mapping[str, float | None], *, now_s: float, tokens: int) -> None:
        self.calls += 1
        raise ValueError("the service\nis away")


@contextmanager
def registered(name: str, open_sink: Any, *, by_default: bool) -> Iterator[None]:
    open_sink.__doc__ = "A sink. Source: this test."
    sink(name, by_default=by_default)(open_sink)
    try:
        yield
    finally:
        SINKS.remove(name)
        from worldlm_ray.tracking.sinks import ON_REQUEST

        ON_REQUEST.discard(name)


@pytest.mark.parametrize("by_default", [True, False])
def test_a_tracker_that_fails_is_one_warning_and_the_others_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, by_default: bool
) -> None:
    with registered("failing", Failing, by_default=by_default), caplog.at_level(logging.WARNING):
        tracker = tracked(tmp_path, named("failing", "jsonl"))
    said = "the tracker failing has failed (the service is away); the run goes on without it"
    assert [(warning["node"], warning["text"]) for warning in tracker.warnings] == [("world", said)]
    assert [record.getMessage() for record in caplog.records] == [said]
    assert "bytes_up" in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")


def test_a_tracker_whose_package_is_not_installed_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)
    warnings = tracked(tmp_path, named("wandb", "mlflow", "jsonl")).warnings
    assert sorted(warning["text"] for warning in warnings) == [
        f"the tracker {name} has failed (the package {name} is not installed; pip install 'worldlm_ray[{name}]'); "
        "the run goes on without it"
        for name in ("mlflow", "wandb")
    ]


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A tracker that does not open before the test is over, for which a run waits 0.05 s at its end."""
    monkeypatch.setattr(guarded, "CLOSE_S", 0.05)
    released = threading.Event()

    def hang(run: RunFacts) -> Sink:
        released.wait()
        return Sink()

    with registered("hanging", hang, by_default=False):
        yield
    released.set()


def test_a_tracker_that_hangs_holds_up_nothing(hanging: None, tmp_path: Path) -> None:
    tracker = tracked(tmp_path, named("hanging"))
    assert "not done 0 s after the end" in tracker.warnings[0]["text"]


def test_a_tracker_that_does_not_keep_up_says_what_it_drops(
    hanging: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guarded, "KEPT_CALLS", 1)
    tracker = tracked(tmp_path, named("hanging"))
    assert "the tracker hanging is too slow" in tracker.snapshot()["trouble"]


@pytest.mark.skipif(find_spec("wandb") is None, reason="the extra wandb is not installed")
def test_wandb_offline_writes_into_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    code = (
        "import sys; sys.path[:0] = ['tests', 'tests/unit']; from pathlib import Path; "
        "from test_trackers import named, tracked; "
        "print(tracked(Path(sys.argv[1]), named('wandb', wandb={'mode': 'offline', 'project': 'mine'})).warnings)"
    )
    folder = tmp_path / "run"
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr
    [file] = folder.glob("wandb/offline-run-*/run-*.wandb")
    held = file.read_bytes()
    assert b"bytes_up/world/a" in held
    assert b"mine" in held


@pytest.mark.skipif(find_spec("wandb") is None, reason="the extra wandb is not installed")
def test_wandb_without_a_key_asks_no_one_and_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setattr(type(wandb.api), "api_key", None)
    [warning] = tracked(tmp_path, named("wandb")).warnings
    assert "there is no key; run `wandb login`" in warning["text"]


def metrics_of(uri: str) -> tuple[Any, list[tuple[str, float, int]]]:
    """The one run of the experiment `worldlm`, and its points."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("worldlm")
    [run] = client.search_runs([experiment.experiment_id])
    points = client.get_metric_history(run.info.run_id, "bytes_up/world/a")
    return run, sorted((point.key, point.value, point.step) for point in points)


def check_mlflow(folder: Path, uri: str) -> None:
    """A run, and the same continued, are one run of MLflow's."""
    for _ in range(2):
        assert tracked(folder, named("mlflow", mlflow={"uri": uri})).warnings == []
    run, points = metrics_of(uri)
    assert points == [("bytes_up/world/a", 7.0, 2), ("bytes_up/world/a", 14.0, 2)]
    assert (run.info.status, run.data.params["seed"], run.info.run_name) == ("FINISHED", "3", folder.name)


@pytest.mark.skipif(find_spec("mlflow") is None, reason="the extra mlflow is not installed")
def test_mlflow_writes_to_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    check_mlflow(tmp_path / "run", (tmp_path / "mlruns").as_uri())


@pytest.mark.long
@pytest.mark.skipif(
    find_spec("mlflow") is None or find_spec("sqlalchemy") is None or find_spec("flask") is None,
    reason="the whole mlflow, which has the server, is not installed (230 MB)",
)
def test_mlflow_sends_to_a_server(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    server = subprocess.Popen(
        [*command, "--backend-store-uri", store, "--artifacts-destination", str(tmp_path / "artifacts")],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        uri = f"http://127.0.0.1:{port}"
        until_healthy(f"{uri}/health", server)
        check_mlflow(tmp_path / "run", uri)
    finally:
        os.killpg(server.pid, 15)
        server.wait(timeout=30)


def until_healthy(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 100
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            assert server.poll() is None, "the server has ended"
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.2)


def test_the_settings_of_trackers_survive_config_yaml(tmp_path: Path) -> None:
    found = named("csv", "wandb", wandb={"mode": "offline"})
    again = from_mapping({"budget": {"rounds": 1}, "tracking": json.loads(json.dumps(found, default=vars))}).tracking
    assert again == found
