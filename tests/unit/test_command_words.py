"""Words of the command line that no command can use, and output that cannot be written, are errors of one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from worldlm_ray.cli import main as cli
from worldlm_ray.errors import ConfigError
from worldlm_ray.training.sampling import generate


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["sample", "run", "--prompt", "a\udcff"], "--prompt"),
        (["sample", "run", "--prompt=a\udcff"], "--prompt"),
        (["show", "quickstart", "name=a\udcff"], "name"),
        (["show", "a\udcff"], "argument 2"),
    ],
)
def test_a_word_that_is_not_utf_8_is_named(
    words: list[str], name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["worldlm", *words])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    assert capsys.readouterr().err == f"worldlm: {name}: 'a\\udcff' is not valid UTF-8; give text in UTF-8\n"


def test_a_negative_seed_of_a_sample_is_refused() -> None:
    error = CliRunner().invoke(cli.app, ["sample", "run", "--seed", "-1"]).exception
    assert isinstance(error, ConfigError)
    assert str(error) == "--seed: got -1; give a number that is not negative"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_output_that_cannot_be_written_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "worldlm_ray", "presets"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=120)
    said = "worldlm: cannot write the output: No space left on device; make room, or write elsewhere\n"
    assert (done.returncode, done.stderr) == (2, said)


@pytest.mark.filterwarnings("error")
def test_a_temperature_that_cannot_be_divided_by_is_none() -> None:
    def model(ids_BT: torch.Tensor) -> torch.Tensor:
        return torch.arange(8.0).expand(1, ids_BT.shape[1], 8)

    prompt = np.array([1])
    assert generate(model, prompt, context=4, tokens=2, temperature=1e-320) == [7, 7]
