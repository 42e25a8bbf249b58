"""What all tests share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.worlds import TINY_MODEL, two_levels

from worldlm_ray.cli import common
from worldlm_ray.config.loading import from_mapping
from worldlm_ray.plan import plan
from worldlm_ray.tracking import log_lines


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., plan.Plan]:
    """Makes plans of tiny worlds: `tiny(children, budget=..., aggregation=...)`."""

    def make(children: list[dict[str, Any]] | None = None, **changes: Any) -> plan.Plan:
        raw: dict[str, Any] = {
            "name": "tiny",
            "run_dir": str(tmp_path / "run"),
            "model": TINY_MODEL,
            "budget": {"rounds": 2},
            "training": {"local_steps": 4, "batch_size": 4},
            "evaluation": {"tokens": 64, "final_tokens": 128},
            "data": {"cache_dir": str(tmp_path / "cache")},
            "world": {"children": children or two_levels(tmp_path)},
        }
        merge = {"client": 1.0} | changes.pop("merge", {})  # one model per client, unless a test says otherwise
        return plan.make_plan(from_mapping(raw | {"merge": merge} | changes))

    return make


@pytest.fixture(autouse=True)
def no_configuration_is_remembered() -> None:
    """A command remembers its configuration for its error messages: a test must not meet that of another one."""
    common._spoken_of.clear()


@pytest.fixture(autouse=True)
def loggers_are_as_before() -> Iterator[None]:
    """Loggers belong to the process: a test that logs as a node leaves them as it found them."""
    loggers = [logging.getLogger(name) for name in log_lines.LOGGERS]
    before = [(list(logger.handlers), logger.level) for logger in loggers]
    yield
    for logger, (handlers, level) in zip(loggers, before, strict=True):
        for handler in set(logger.handlers) - set(handlers):
            handler.close()
        logger.handlers[:] = handlers
        logger.setLevel(level)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--soak", action="store_true", help="run the tests of mutations and faults a hundred times as long"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--soak"):
        for item in items:
            item.add_marker(pytest.mark.timeout(0), append=False)
