"""What the unit tests of the core share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.pretrained import save_pretrained
from support.worlds import TINY_MODEL, write_text

from worldlm_ray.config.schema import BudgetConfig
from worldlm_ray.model.shape import ModelShape
from worldlm_ray.tensors.layout import Layout, make_layout

KEYS = ["model.embed.*", "head.*"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small pre-trained model, as transformers writes it."""
    return save_pretrained(tmp_path_factory.mktemp("base"))


@pytest.fixture
def layout() -> Layout:
    """Seven numbers: a backbone of three, and two key layers of two each."""
    shapes = [("model.embed.weight", (2,)), ("body.weight", (3,)), ("head.weight", (2,))]
    return make_layout(shapes, KEYS, layers=0)


@pytest.fixture
def shape() -> ModelShape:
    """A decoder of a few thousand parameters."""
    return ModelShape(hidden_size=16, layers=2, heads=2, kv_heads=2, intermediate_size=32, context=16, vocab_size=64)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(7))


@pytest.fixture
def endless() -> BudgetConfig:
    """A budget that a node never ends by itself."""
    return BudgetConfig(rounds=1_000)


@pytest.fixture
def many(request: pytest.FixtureRequest) -> Callable[..., int]:
    """How often: the number given, or a hundred times that in a soak, or as many times as a test says."""
    soak = request.config.getoption("--soak")
    return lambda number, times=100: number * (times if soak else 1)


@pytest.fixture
def text(tmp_path: Path) -> str:
    return str(write_text(tmp_path / "text.txt", seed=1, size=12_500))


@pytest.fixture
def raw(text: str) -> dict[str, Any]:
    """A configuration in order: europe with italy and germany, and japan directly under the world."""
    return {
        "model": dict(TINY_MODEL),
        "budget": {"rounds": 2},
        "data": {"files": [text]},
        "world": {
            "children": [
                {"federation": "europe", "children": [{"client": "italy"}, {"client": "germany"}]},
                {"client": "japan"},
            ]
        },
    }
