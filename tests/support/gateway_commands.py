"""`worldlm gateway ...` as an operator types it, on a terminal of 80 columns."""

from __future__ import annotations

import pytest
from click.testing import Result
from typer.testing import CliRunner

from worldlm_ray.cli.main import app
from worldlm_ray.errors import WorldLMError


def run(*words: str, answer: str = "") -> Result:
    """What a command has printed; its error is raised."""
    done = CliRunner().invoke(app, ["gateway", *words], input=answer, env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def refused(*words: str) -> str:
    """The error of a command: one line."""
    with pytest.raises(WorldLMError) as error:
        run(*words)
    assert "\n" not in str(error.value)
    assert ";" in str(error.value)  # what is wrong; what to do
    return str(error.value)
