"""Bits of small synchronous and asynchronous runs, as they were before: a change that computes nothing new keeps them.

The values stand in tests/golden.json, with the kind of processor that computed them. Other processors add in another
order: there the losses are compared, to a thousandth. `PYTHONPATH=tests python tests/unit/test_golden.py` writes the
file anew, for a change that is meant to compute something else; the commit says why.
"""

from __future__ import annotations

import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from support.golden import CASES, outcome

FILE = Path(__file__).resolve().parents[1] / "golden.json"


def processor() -> str:
    """What decides in which order numbers are added."""
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} torch {torch.__version__.partition('+')[0]}"


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", CASES)
def test_the_bits_of_a_run_are_those_of_before(golden: dict[str, Any], tmp_path: Path, name: str) -> None:
    found, before = outcome(name, tmp_path), golden["runs"][name]
    if golden["processor"] == processor():
        assert found == before
    losses = {path: node.pop("loss", None) for path, node in found["nodes"].items()}
    expected = {path: node.pop("loss", None) for path, node in before["nodes"].items()}
    assert found["nodes"] == before["nodes"]
    assert losses == {path: loss and pytest.approx(loss, rel=1e-3) for path, loss in expected.items()}


if __name__ == "__main__":
    runs = {}
    for case in CASES:
        with tempfile.TemporaryDirectory() as place:
            runs[case] = outcome(case, Path(place))
            print(case, runs[case]["params_sha256"][:12])
    FILE.write_text(json.dumps({"processor": processor(), "runs": runs}, indent=1) + "\n", encoding="utf-8")
