"""Bits of small synchronous and asynchronous runs, as they were before: a change that computes nothing new keeps them.

The values stand in tests/golden.json, by the kind of processor that computed them. Other processors add in another
order: there the losses are compared, to a thousandth. `PYTHONPATH=tests python tests/unit/test_golden.py` writes this
machine's values anew. For a change that is meant to compute something else it also removes those of other processors,
with `--alone`; the commit says why.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from support.golden import CASES, outcome

FILE = Path(__file__).resolve().parents[1] / "golden.json"


def processor() -> str:
    """What decides in which order numbers are added. torch's kernels for matrices depend on the maker, too."""
    instructions, version = torch.backends.cpu.get_cpu_capability(), torch.__version__.partition("+")[0]
    return f"{platform.machine()} {maker()} {instructions} torch {version}"


def maker() -> str:
    """Who made the processor, as Linux names it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "unknown")


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", CASES)
def test_the_bits_of_a_run_are_those_of_before(golden: dict[str, Any], tmp_path: Path, name: str) -> None:
    found, known = outcome(name, tmp_path), golden.get(processor())
    if known is not None:
        assert found == known[name]
    before = next(iter(golden.values()))[name]
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
    others = {} if "--alone" in sys.argv else json.loads(FILE.read_text(encoding="utf-8"))
    FILE.write_text(json.dumps(others | {processor(): runs}, indent=1) + "\n", encoding="utf-8")
