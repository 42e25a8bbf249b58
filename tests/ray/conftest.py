"""One local Ray cluster for the whole session: starting one takes seconds."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with Ray share a cluster."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.alone)


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A local cluster with more logical cores than any test's world wants; `launch.train` uses it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init(
            "local",
            num_cpus=16,
            object_store_memory=512 * 1024**2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def nothing_is_kept(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test has done to its run, all that it had reserved on the cluster is given back."""
    yield
    if "cluster" in request.fixturenames and ray.is_initialized():
        deadline = time.monotonic() + 20.0
        while (free := ray.available_resources()["CPU"]) < ray.cluster_resources()["CPU"]:
            assert time.monotonic() < deadline, f"only {free:g} cores are free"
            time.sleep(0.1)
